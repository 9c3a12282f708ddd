"""What one step of one-shot tuning is, and how a tuned network edits (paper, section 4; the released recipe)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from mmengine.dist import all_gather_object
from torch import Tensor

from core.data import hash_state
from core.engine.state.randomness import own_rows
from core.errors import ConfigError
from core.trainer import Batch, Inference, Trainer
from tune_a_video.data.video_io import to_pixels
from tune_a_video.inference.editing import Edits, Sampling, edit, plain_scores, reconstruct, starting_latents
from tune_a_video.inference.prompts import Prompts, prompts_of
from tune_a_video.interop.folders import check_folder
from tune_a_video.interop.pipeline import TuneAVideoPipeline
from tune_a_video.losses import NOISES, add_noise, denoising_loss, frame_noise, min_snr_weight, prediction_target
from tune_a_video.models import TRAINABLE_MODULES, TuneAVideoUNet
from tune_a_video.models.frame_attention import FrameSpec
from tune_a_video.models.inflated_weights import settled_options
from tune_a_video.models.inflation import TEMPORAL_NAMES
from tune_a_video.models.lora_layers import add_lora
from tune_a_video.models.weights import read_config
from tune_a_video.trainer.prior import Prior, untuned

#: Networks of Stable Diffusion, for profiles and counts without weights, at 512 x 512 pixels as they are tuned.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd1": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
}


#: What a clip is known by: sample_id, caption and a checksum of each frame.
ClipKey = tuple[str, str, tuple[int, ...]]


class TuneAVideoTrainer(Trainer):
    """Tunes a few projections of an image model, and a new temporal attention, on one clip.

    Batches hold `video` `(B, f, 3, H, W)` in [-1, 1], `caption` and `sample_id`; latents' posterior and text states are
    computed once per sample. `latents` and `text` in a batch are used as they are; `posterior_noise`, `noise`
    `(B, c, f, h, w)` and `timesteps` `(B,)` in place of draws.

    Args:
        base: local folder of a Stable Diffusion 1.x or 2.x pipeline, or an original single file. Built without memory
            (`meta`), a trainer needs none.
        architecture: of the network where there is no base: `sd1`, `sd2` or arguments of `TuneAVideoUNet`.
        base_lora: file of LoRA weights that is merged into the base first.
        base_lora_scale: its strength.
        base_config: local folder of a pipeline that says what a single file holds, see
            `tune_a_video.interop.single_file.read_single_file`.
        variant: of the base's files, such as `fp16`.
        attention, group_norm, temporal: see `TuneAVideoUNet`.
        trainable_modules: names of modules, see `TuneAVideoUNet.trainable_parameters`; `[all]` for everything.
            Convolutions over frames are always among them, `attn_temp` only where there is one.
        lora: `{rank: 8, alpha: 8}`: of the trainable modules, those of the image model get low-rank updates in place of
            whole ones; linear layers only.
        delta: file of tuned tensors to start from, see `TuneAVideoUNet.load_delta`.
        noise: of training, see `tune_a_video.losses.frame_noise`.
        noise_offset: see there.
        min_snr_gamma: caps the weight of easy timesteps; None: none, as in the paper.
        caption_dropout: share of steps without caption.
        prior_weight: of prior preservation, the denoising loss of images that the untuned model has drawn.
        prior: of those images, see `tune_a_video.trainer.prior.Prior`.
        cache_latents: False encodes clip and caption in every step, as the released code does.
        gradient_checkpointing: less memory, more time, same gradients.
        prompts: of the edits; None: those that the data set gives (`edits`).
        sample: see `tune_a_video.inference.editing.Sampling`.
        clip: how `tools/infer.py` reads a file: arguments of `tune_a_video.data.OneShotVideoDataset` without path.
        n_frames: of profiles.
        frozen: see `core.Trainer`.

    Raises:
        ConfigError: arguments that mean nothing, a base that is none, LoRA of layers that are not linear.
    """

    sanity_check = False  # editing a clip takes minutes

    def __init__(
        self,
        base: str | None = None,
        architecture: str | Mapping[str, Any] = "sd1",
        base_lora: str | None = None,
        base_lora_scale: float = 1.0,
        base_config: str | None = None,
        variant: str | None = None,
        attention: FrameSpec = "first_prev",
        group_norm: str = "joint",
        temporal: Mapping[str, Any] | None = None,
        trainable_modules: Sequence[str] = TRAINABLE_MODULES,
        lora: Mapping[str, Any] | None = None,
        delta: str | None = None,
        noise: str = "iid",
        noise_offset: float = 0.0,
        min_snr_gamma: float | None = None,
        caption_dropout: float = 0.0,
        cache_latents: bool = True,
        gradient_checkpointing: bool = False,
        prompts: Prompts = None,
        sample: Mapping[str, Any] | None = None,
        clip: Mapping[str, Any] | None = None,
        n_frames: int = 24,
        frozen: Sequence[str] = (),
        prior_weight: float = 0.0,
        prior: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(frozen)
        if prior_weight < 0:
            raise ConfigError(f"model.prior_weight={prior_weight}: 0 or more")
        if noise not in NOISES:
            raise ConfigError(f"model.noise={noise}: use {', '.join(NOISES)}")
        if not 0 <= caption_dropout <= 1:
            raise ConfigError(f"model.caption_dropout={caption_dropout}: a share from 0 to 1")
        if prompts is not None and not callable(prompts) and not torch.empty(0).is_meta:
            prompts_of({"sample_id": ["the clip"]}, 0, prompts)
        options = {"attention": attention, "group_norm": group_norm, "temporal": temporal}
        # The pipeline stays outside of the module tree: its frozen parts are neither saved nor kept on the device.
        self._pipes: list[TuneAVideoPipeline] = []
        try:
            self.sample, self.prior = Sampling.of(sample), Prior.of(prior)
            if torch.empty(0).is_meta:
                self.network = _skeleton(base, architecture, options)
            else:
                files = {"lora": base_lora, "lora_scale": base_lora_scale, "config": base_config, "variant": variant}
                made = TuneAVideoPipeline.from_base(base, **files, **options)
                made.set_progress_bar_config(disable=True)
                for part in (made.vae, made.text_encoder):
                    part.requires_grad_(False).eval()
                self._pipes.append(made)
                self.network = made.unet
            # Kept from before the delta: the prior is the base's, also when a run goes on.
            kept = self.network.named_parameters() if prior_weight and self._pipes else ()
            self._base = {
                name: value.detach().clone()
                for name, value in kept
                if list(trainable_modules) == ["all"]
                or any(part in name for part in (*trainable_modules, *TEMPORAL_NAMES))
            }
            if delta is not None and self._pipes:
                self.network.load_delta(delta)
            self._choose_trained(list(trainable_modules), lora)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from error
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.noise, self.noise_offset, self.min_snr_gamma = noise, noise_offset, min_snr_gamma
        self.caption_dropout, self.cache_latents, self.prior_weight = caption_dropout, cache_latents, prior_weight
        self._priors: dict[str, tuple[Tensor, Tensor]] = {}
        self.prompts, self.clip, self.n_frames = prompts, dict(clip or {}), n_frames
        # By `_clip_key`: two files of one name, or one file read in two ways, are two clips.
        self._encodings: dict[ClipKey, tuple[Tensor, Tensor, Tensor]] = {}
        self._seen: dict[ClipKey, tuple[str, str, int]] = {}
        self._empty_text: Tensor | None = None
        self._shown: dict[ClipKey, Edits] = {}

    def _choose_trained(self, modules: list[str], lora: Mapping[str, Any] | None) -> None:
        if self.network.config.temporal["conv"] != "none" and "conv_temp" not in modules and modules != ["all"]:
            modules = [*modules, "conv_temp"]
        if not self.network.config.temporal["enabled"]:
            modules = [name for name in modules if name != "attn_temp"]
        if not modules:
            raise ValueError("trainable_modules leave nothing to train: name at least one kind of module that is there")
        self.trainable_modules = modules
        self.trained = self.network.set_trainable(modules)
        if lora is None:
            return
        whole = [name for name in self.trained if any(part in name for part in TEMPORAL_NAMES)]
        layers = sorted({name.rpartition(".")[0] for name in self.trained if name not in whole})
        unknown = sorted(set(lora) - {"rank", "alpha"})
        if unknown:
            raise ValueError(f"lora has no {', '.join(unknown)}: rank, alpha")
        rank = int(lora.get("rank", 8))
        updates = add_lora(self.network, layers, rank, float(lora.get("alpha", rank)))
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in updates or name in whole)
        self.trained = [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]

    # ------------------------------------------------------------------ parts
    @property
    def pipe(self) -> TuneAVideoPipeline:
        """The pipeline around the network.

        Raises:
            ConfigError: the trainer was built without memory.
        """
        if not self._pipes:
            raise ConfigError("this trainer was built without weights (meta): it can be counted, not run")
        return self._pipes[0]

    @contextlib.contextmanager
    def _parts_here(self) -> Iterator[TuneAVideoPipeline]:
        """The pipeline with autoencoder and text encoder beside the network; afterwards they leave the GPU again."""
        pipe = self.pipe
        parts = (pipe.vae, pipe.text_encoder)
        for part in parts:
            part.to(self.device)
        try:
            yield pipe
        finally:
            if self.cache_latents and self.device.type == "cuda":
                for part in parts:
                    part.to("cpu")

    def encoding(self, video: Tensor, caption: str, sample_id: str) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior mean and deviation `(1, c, f, h, w)` of a clip `(f, 3, H, W)`, and text `(1, L, d)`."""
        key = _clip_key(video, caption, sample_id)
        self._seen[key] = sample_id, caption, len(video)
        if self.cache_latents and key in self._encodings:
            return self._encodings[key]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), self._parts_here() as pipe:
            encoded = (*pipe.posterior(video), pipe.encode_prompt(caption))
        if self.cache_latents:
            self._encodings[key] = encoded
        return encoded

    # ------------------------------------------------------------------ training
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_denoising`: the squared error of the prediction (section 3); with a prior also `loss_prior`."""
        latents, text = self._clean(batch)
        alphas, kind = self.noise_levels()
        noise = batch.get("noise")
        if noise is None:
            shape, options = latents.shape[1:], {"device": latents.device}
            noise = own_rows(lambda n: frame_noise((n, *shape), self.noise, self.noise_offset, **options), len(latents))
        timesteps = batch.get("timesteps")
        if timesteps is None:
            timesteps = own_rows(lambda n: torch.randint(len(alphas), (n,), device=latents.device), len(latents))
        if self.caption_dropout and self.training:
            chance = own_rows(lambda n: torch.rand(n, 1, 1, device=latents.device), len(latents))
            dropped = chance < self.caption_dropout
            text = torch.where(dropped, self._empty(), text)
        noisy = add_noise(latents, noise, timesteps, alphas)
        target = prediction_target(latents, noise, timesteps, alphas, kind)
        prediction = self.network(noisy, timesteps, encoder_hidden_states=text).sample
        weight = None
        if self.min_snr_gamma is not None:
            weight = min_snr_weight(timesteps, alphas, self.min_snr_gamma, kind)
        losses = {"loss_denoising": denoising_loss(prediction, target, weight)}
        if self.prior_weight and self.training:
            losses["loss_prior"] = self.prior_weight * self._prior_loss(
                batch.get("caption", [""] * len(latents)), latents
            )
        return losses

    def _prior_loss(self, captions: Sequence[str], latents: Tensor) -> Tensor:
        """The denoising loss of one image of the untuned model for each clip."""
        drawn = [self.prior_images(caption, tuple(latents.shape[-2:])) for caption in captions]
        chance = own_rows(lambda n: torch.rand(n, device=latents.device), len(drawn))
        chosen = [int(share * len(images)) for share, (images, _) in zip(chance.tolist(), drawn, strict=True)]
        images = torch.stack([images[i] for i, (images, _) in zip(chosen, drawn, strict=True)])
        text = torch.stack([text[i] for i, (_, text) in zip(chosen, drawn, strict=True)])
        alphas, kind = self.noise_levels()
        noise = own_rows(lambda n: torch.randn(n, *images.shape[1:], device=images.device), len(images))
        timesteps = own_rows(lambda n: torch.randint(len(alphas), (n,), device=images.device), len(images))
        noisy = add_noise(images, noise, timesteps, alphas)
        prediction = self.network(noisy, timesteps, encoder_hidden_states=text).sample
        return denoising_loss(prediction, prediction_target(images, noise, timesteps, alphas, kind))

    def prior_images(self, caption: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Latents `(N, c, 1, h, w)` that the untuned model draws, and their texts `(N, L, d)`; drawn once."""
        key = caption if self.prior.prompts is None else ""
        if key not in self._priors:
            off = torch.autocast(self.device.type, enabled=False)
            with off, self._parts_here() as pipe, untuned(self.network, self.trained, self._base):
                self._priors[key] = self.prior.draw(pipe, caption, size)
        return self._priors[key]

    def noise_levels(self) -> tuple[Tensor, str]:
        """Cumulative products `(T,)` of the base's schedule, and what its network predicts."""
        if not self._pipes:
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=self.device).square()
            return torch.cumprod(1 - betas, dim=0), "epsilon"
        scheduler = self.pipe.scheduler
        return scheduler.alphas_cumprod, scheduler.config.prediction_type

    def _clean(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Latents drawn from the posterior `(B, c, f, h, w)`, and text `(B, L, d)`."""
        if "latents" in batch:
            return batch["latents"], batch["text"]
        encoded = [
            self.encoding(video, caption, sample_id)
            for video, caption, sample_id in zip(batch["video"], batch["caption"], batch["sample_id"], strict=True)
        ]
        mean, std, text = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        draw = batch.get("posterior_noise")
        if draw is None:
            draw = own_rows(lambda n: torch.randn(n, *mean.shape[1:], device=mean.device), len(mean))
        return mean + std * draw, text

    def _empty(self) -> Tensor:
        if self._empty_text is None:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False), self._parts_here() as pipe:
                self._empty_text = pipe.encode_prompt("")
        return self._empty_text

    # ------------------------------------------------------------------ edits
    def predict(self, batch: Batch) -> dict[str, Any]:
        """All edits of the clips, one row for each clip and prompt.

        Returns:
            `video` and `source` `(R, 3, f, H, W)` in [0, 1]; `from_noise` `(R, f)`, frames that did not start from the
            source; R texts `prompt` and `source_prompt`; `sample_id` `CLIP/NUMBER`; whatever else the batch holds for
            each clip; and per clip `scores`, see `tune_a_video.inference.editing.plain_scores`.
        """
        made = [self._edits_of(batch, i) for i in range(len(batch["video"]))]
        self._shown = {_key_of(batch, i): one for i, one in enumerate(made)}
        clips = [i for i, one in enumerate(made) for _ in one.prompts]
        skipped = ("video", "caption", "edits", "noise", "posterior_noise", "timesteps", "sample_id")
        return {
            **{key: _repeated(value, clips) for key, value in batch.items() if key not in skipped},
            "video": torch.cat([one.videos for one in made]),
            "source": torch.stack([made[i].source for i in clips]),
            "from_noise": self.sample.from_noise(batch["video"].shape[1]).repeat(len(clips), 1),
            "prompt": [prompt for one in made for prompt in one.prompts],
            "source_prompt": [made[i].caption for i in clips],
            "sample_id": [f"{one.sample_id}/{k}" for one in made for k in range(len(one.prompts))],
            "scores": [plain_scores(one) for one in made],
        }

    def _edits_of(self, batch: Batch, index: int) -> Edits:
        prompts = prompts_of(batch, index, self.prompts)
        return self.edits(batch["video"][index], batch["caption"][index], prompts, batch["sample_id"][index])

    def edits(self, video: Tensor, caption: str, prompts: Sequence[str], sample_id: str) -> Edits:
        """Edits of a clip `(f, 3, H, W)` in [-1, 1] by the prompts."""
        latents = self.encoding(video, caption, sample_id)[0]
        with torch.no_grad(), self._parts_here() as pipe:
            start = starting_latents(pipe, latents, caption, self.sample)
            inverted = self.sample.inverted_every is not None
            inversion = reconstruct(pipe, start, caption, self.sample) if inverted else None
            videos = edit(pipe, latents, caption, prompts, self.sample, start)
        source = rearrange(video.float() / 2 + 0.5, "f c h w -> c f h w").clamp(0, 1)
        return Edits(sample_id, caption, source, inversion, list(prompts), videos)

    def media(self, batch: Batch) -> dict[str, Any]:
        """Source, inversion and edits of the first clip side by side: `{"edits": (f, H', W', 3) uint8}`."""
        shown = self._shown.get(_key_of(batch, 0)) or self._edits_of(batch, 0)
        return {"edits": shown.grid()}

    @property
    def shown(self) -> list[Edits]:
        """The clips of the last prediction."""
        return list(self._shown.values())

    def infer(self, file: Path) -> Inference:
        """Edits of a user's clip by `model.prompts`: GIFs, frames, how far each edit is from the source, and the page.

        The page's videos have the clip's rate.

        The caption is `model.clip.prompt`.

        Raises:
            ConfigError: no caption or prompts; the clip is too short.
        """
        from tune_a_video.data import OneShotVideoDataset
        from tune_a_video.inference.page import write_page

        if not self.clip.get("prompt"):
            raise ConfigError("set model.clip.prompt to the caption of the clip")
        clip = OneShotVideoDataset(path=file, **self.clip)
        sample, rate = clip[0], {} if clip.fps is None else {"fps": clip.fps}
        batch = {"caption": [sample["caption"]], "sample_id": [sample["sample_id"]]}
        prompts = prompts_of(batch, 0, self.prompts)
        made = self.edits(sample["video"].to(self.device), sample["caption"], prompts, sample["sample_id"])
        pictures: dict[str, Any] = {"side_by_side": made.grid()}
        columns = made.columns()
        before = len(columns) - len(prompts)
        for i, (name, video) in enumerate(columns):
            name = name if i < before else f"edit_{i - before}"
            pixels = to_pixels(video)
            pictures |= {name: pixels} | {f"{name}_{k:05d}": frame for k, frame in enumerate(pixels)}
        record = {"caption": made.caption, "prompts": prompts, "scores": plain_scores(made)}
        return Inference(record, pictures, write=lambda folder: write_page(made, folder, **rate))

    # ------------------------------------------------------------------ state
    def provenance(self) -> dict[str, Any]:
        """What the tuned tensors belong to: clips with captions and frames, trained modules, a hash of the base.

        Clips are those of all processes, which have to call this together.
        """
        own = set(self.state_dict())
        frozen = {name: value for name, value in super().state_dict().items() if name not in own}
        seen: dict[ClipKey, tuple[str, str, int]] = {}
        for part in all_gather_object(self._seen):
            seen |= part
        return {
            "clips": [sample_id for sample_id, _, _ in seen.values()],
            "caption": [caption for _, caption, _ in seen.values()],
            "frames": [frames for _, _, frames in seen.values()],
            "trainable_modules": self.trainable_modules,
            "base_hash": hash_state(frozen),
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Only what tuning changes, and the temporal tensors; everything else is the base's."""
        state = super().state_dict(*args, **kwargs)
        kept = {f"network.{name}" for name in self.trained}
        mine = [name for name in state if name in kept or any(part in name for part in TEMPORAL_NAMES)]
        return type(state)((name, state[name]) for name in mine)

    # ------------------------------------------------------------------ what tools look at
    def example_inputs(self, batch_size: int, device: torch.device | str) -> tuple[Any, ...]:
        """Noisy latents, a timestep and text of the network's own size."""
        config = self.network.config
        size = config.sample_size if isinstance(config.sample_size, int) else 64
        latents = torch.zeros(batch_size, config.in_channels, self.n_frames, size, size, device=device)
        return latents, torch.zeros((), device=device), torch.zeros(batch_size, 77, _text_width(config), device=device)

    def example_batch(self, batch_size: int, device: torch.device | str) -> Batch:
        """Latents and text, as they are when they have been computed before."""
        latents, _, text = self.example_inputs(batch_size, device)
        return {"latents": latents, "text": text, "sample_id": [str(i) for i in range(batch_size)]}

    def table_figures(self, cfg: Any) -> dict[str, int]:
        """Figures for tables: `temporal_parameters` (new beside the image model's) and `image_parameters`."""
        named = dict(self.network.named_parameters())
        new = sum(value.numel() for name, value in named.items() if any(part in name for part in TEMPORAL_NAMES))
        return {"temporal_parameters": new, "image_parameters": sum(value.numel() for value in named.values()) - new}


def _key_of(batch: Batch, index: int) -> ClipKey:
    return _clip_key(batch["video"][index], batch["caption"][index], batch["sample_id"][index])


def _clip_key(video: Tensor, caption: str, sample_id: str) -> ClipKey:
    """A key of a clip `(f, 3, H, W)`: what it is called, and what is in it, read where the clip is."""
    bits = video.detach().to(torch.float32).contiguous().view(torch.int32).flatten(1)
    # Sums of products with odd numbers, which wrap around: alike on every device, and different for other frames.
    weights = torch.arange(bits.shape[1], device=bits.device) * 0x9E3779B97F4A7C1 | 1
    sums = torch.stack([(frame.long() * weights).sum() for frame in bits])
    return sample_id, caption, (*video.shape, *sums.tolist())


def _skeleton(base: str | None, architecture: str | Mapping[str, Any], options: Mapping[str, Any]) -> TuneAVideoUNet:
    """A network without memory, of the base's size where that is there."""
    if base is not None and Path(base).is_dir():
        config = read_config(check_folder(base) / "unet")
        named = {name: value for name, value in config.items() if not name.startswith("_")}
        return TuneAVideoUNet.from_config({**named, **settled_options(config, options, str(base))})
    if isinstance(architecture, str):
        if architecture not in ARCHITECTURES:
            raise ConfigError(f"model.architecture={architecture}: use {', '.join(ARCHITECTURES)} or a mapping")
        architecture = ARCHITECTURES[architecture]
    return TuneAVideoUNet(**{**architecture, **options})


def _repeated(value: Any, clips: Sequence[int]) -> Any:
    """A batch's entry with the row of each clip as often as it has prompts."""
    if isinstance(value, Tensor) and value.ndim:
        return value[list(clips)]
    if isinstance(value, Mapping):
        return {key: _repeated(inner, clips) for key, inner in value.items()}
    return [value[i] for i in clips] if isinstance(value, list) else value


def _text_width(config: Any) -> int:
    width = config.cross_attention_dim
    return width if isinstance(width, int) else width[0]
