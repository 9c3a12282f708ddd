"""Tune-A-Video as a pipeline of diffusers: prompts and inverted latents in, videos out.

pipe = TuneAVideoPipeline.from_pretrained("tuned").to("cuda")
latents = pipe.invert(pipe.encode_video(frames))
save_video(pipe("mickey mouse is skiing", latents=latents).videos[0], "mickey.gif")
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from einops import rearrange
from PIL import Image
from torch import Tensor

from tune_a_video.inference.inversion import check_steps, ddim_invert
from tune_a_video.inference.inversion_cache import cached_inversion
from tune_a_video.inference.text import adapters_scaled, as_prompts, check_parts, text_states
from tune_a_video.inference.windows import predict_in_windows
from tune_a_video.interop.control import Share, as_module, prepare
from tune_a_video.interop.folders import (
    check_folder,
    check_pickles,
    check_scheduler,
    check_tuned,
    ddim,
    own_variant,
    pickled_shards,
    read_parts,
)
from tune_a_video.interop.lora import merge_lora
from tune_a_video.interop.single_file import read_single_file
from tune_a_video.models import TemporalConfig, TuneAVideoUNet
from tune_a_video.models.frame_attention import FrameSpec

OUTPUT_TYPES = ("pt", "np", "pil", "latent")

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass
class TuneAVideoPipelineOutput(BaseOutput):
    """What the pipeline gives, in two layouts of the same memory.

    frames: as diffusers' video pipelines give them: `(b, f, 3, H, W)` in [0, 1] for `pt`, `(b, f, H, W, 3)` for `np`,
        lists of lists of images for `pil`. `frames[0]` is a video for `diffusers.utils.export_to_video`.
    videos: `(b, 3, f, H, W)` in [0, 1] as tensor or array; the lists for `pil`.

    Both are latents `(b, c, f, h, w)` for `latent`.
    """

    frames: Tensor | np.ndarray | list[list[Image.Image]]
    videos: Tensor | np.ndarray | list[list[Image.Image]]


class TuneAVideoPipeline(
    DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
):
    """Text and noise (or inverted latents) to video.

    Load a saved one with this class: `DiffusionPipeline.from_pretrained` cannot know it.

    Args:
        vae: image autoencoder; frames are encoded one by one.
        text_encoder, tokenizer: of the image model.
        unet: the video network.
        scheduler: any of diffusers; inversion takes its noise levels for DDIM.
        controlnet: a `ControlNetModel` of diffusers or a list of them, whose frames a call gives as `control_video`.

    Raises:
        core.errors.VitrineError: the parts do not belong together.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["controlnet"]
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: TuneAVideoUNet,
        scheduler: Any,
        controlnet: Any = None,
    ) -> None:
        super().__init__()
        check_parts(tokenizer, text_encoder, unet)
        check_scheduler(scheduler)
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_modules(controlnet=as_module(controlnet))
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    # ------------------------------------------------------------------ from folders
    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> TuneAVideoPipeline:
        """A tuned pipeline that `save_pretrained` wrote; arguments are those of `DiffusionPipeline.from_pretrained`.

        Raises:
            tune_a_video.interop.folders.NotAPipeline: the folder is an image pipeline's, which `from_base` reads, or
                one of the released code, which `from_official` reads.
        """
        folder = Path(path).expanduser()
        if "unet" not in kwargs:
            check_tuned(folder, kwargs.get("variant"))
        for part, kind in (("unet", TuneAVideoUNet), ("vae", AutoencoderKL)):
            # diffusers finds pickled shards only where every part of a pipeline is pickled.
            if part not in kwargs and (pickled := pickled_shards(folder / part)):
                check_pickles(folder / part)
                options = {name: kwargs[name] for name in ("variant", "torch_dtype") if name in kwargs} | pickled
                kwargs[part] = kind.from_pretrained(folder / part, **options)
        return super().from_pretrained(path, **kwargs)

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike[str] | DiffusionPipeline | None,
        *,
        attention: FrameSpec | None = None,
        group_norm: str | None = None,
        temporal: TemporalConfig | Mapping[str, Any] | None = None,
        lora: str | os.PathLike[str] | None = None,
        lora_scale: float = 1.0,
        variant: str | None = None,
        config: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> TuneAVideoPipeline:
        """An untuned pipeline over an image model, with DDIM sampling.

        Args:
            base: local folder of a Stable Diffusion 1.x or 2.x pipeline (personalised ones are the same), an original
                single file (`.safetensors`, `.ckpt`), or a pipeline in memory, which stays as it is: its network is
                copied, its other parts are shared.
            attention, group_norm, temporal: see `TuneAVideoUNet`; None: what a tuned base was tuned with, or the
                defaults there.
            lora: a file of LoRA weights, or PEFT's folder of an adapter, that is merged into the image model first, see
                `tune_a_video.interop.lora`.
            lora_scale: its strength.
            variant: `fp16` for files of that name; parts that lack it are read without.
            config: of a single file, which holds weights alone: local folder of a pipeline of the same kind, see
                `tune_a_video.interop.single_file.read_single_file`.
            torch_dtype: of all parameters; None: float32.

        Raises:
            tune_a_video.interop.folders.NotAPipeline: the folder is none.
            ValueError: weights do not fit, or a tuned base is asked for other attention than it was tuned with.
        """
        options = {"attention": attention, "group_norm": group_norm, "temporal": temporal}
        if isinstance(base, DiffusionPipeline) or (base is not None and Path(base).is_file()):
            image = base if isinstance(base, DiffusionPipeline) else read_single_file(base, config, torch_dtype)
            unet = TuneAVideoUNet.from_unet2d(image.unet, **options)
            parts = {"vae": image.vae, "text_encoder": image.text_encoder, "tokenizer": image.tokenizer}
            parts["scheduler"] = ddim({**image.scheduler.config, "_class_name": type(image.scheduler).__name__})
        else:
            folder = check_folder(base)
            unet = TuneAVideoUNet.from_pretrained_2d(
                folder, "unet", **options, variant=own_variant(folder, "unet", variant), torch_dtype=torch_dtype
            )
            parts = read_parts(folder, variant=variant, torch_dtype=torch_dtype)
        if lora is not None:
            if isinstance(base, DiffusionPipeline):
                parts["text_encoder"] = copy.deepcopy(parts["text_encoder"])
            merge_lora(unet, parts["text_encoder"], lora, lora_scale)
        return cls(unet=unet, **parts)

    @classmethod
    def from_official(
        cls,
        path: str | os.PathLike[str],
        *,
        attention: FrameSpec | None = None,
        group_norm: str | None = None,
        temporal: TemporalConfig | Mapping[str, Any] | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> TuneAVideoPipeline:
        """A tuned pipeline from a folder as the released code writes it (`.bin` files, old class names), with DDIM.

        Args:
            path: the folder.
            attention, group_norm, temporal: see `TuneAVideoUNet.from_official`.
            variant, torch_dtype: see `from_base`.

        Raises:
            tune_a_video.interop.folders.NotAPipeline: the folder is none.
            ValueError: weights do not fit, or the network is an image model's.
        """
        folder = check_folder(path)
        unet = TuneAVideoUNet.from_official(
            folder,
            "unet",
            attention=attention,
            group_norm=group_norm,
            temporal=temporal,
            variant=own_variant(folder, "unet", variant),
            torch_dtype=torch_dtype,
        )
        return cls(unet=unet, **read_parts(folder, variant=variant, torch_dtype=torch_dtype))

    # ------------------------------------------------------------------ text and pictures
    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], *, lora_scale: float | None = None) -> Tensor:
        """Text states `(b, L, d)` in the network's precision.

        Args:
            prompt: one or several.
            lora_scale: strength of the text encoder's adapters; None: as they are set.

        Raises:
            ValueError: no text.
        """
        prompts = as_prompts(prompt)
        prompts = [self.maybe_convert_prompt(text, self.tokenizer) for text in prompts]
        with adapters_scaled(self.text_encoder, lora_scale):
            states = text_states(self.tokenizer, self.text_encoder, prompts, self._execution_device)
        return states.to(self.unet.dtype)

    @torch.no_grad()
    def encode_video(
        self, video: Tensor, *, sample: bool = False, generator: torch.Generator | None = None, at_once: int = 8
    ) -> Tensor:
        """Latents of frames, scaled as the network expects: `(b, c, f, h, w)`, float32.

        Args:
            video: `(f, 3, H, W)` or `(b, f, 3, H, W)` in [-1, 1].
            sample: draw from the posterior instead of taking its mean.
            generator: for the draw.
            at_once: frames that pass through the autoencoder together.

        Raises:
            ValueError: another shape, or sides that the autoencoder cannot divide.
        """
        mean, std = self.posterior(video, at_once=at_once)
        if not sample:
            return mean
        return mean + std * randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)

    @torch.no_grad()
    def posterior(self, video: Tensor, at_once: int = 8) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each `(b, c, f, h, w)`; see `encode_video`."""
        video = video[None] if video.ndim == 4 else video
        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"video is {tuple(video.shape)}: (b, f, 3, H, W) or (f, 3, H, W) is expected")
        self._check_size(*video.shape[-2:])
        rows = rearrange(video, "b f c h w -> (b f) c h w").to(self._execution_device, self.vae.dtype)
        posteriors = [self.vae.encode(part).latent_dist for part in rows.split(at_once)]
        scale, videos = self.vae.config.scaling_factor, len(video)
        mean, std = (
            rearrange(
                torch.cat([getattr(p, name) for p in posteriors]).float() * scale, "(b f) c h w -> b c f h w", b=videos
            )
            for name in ("mean", "std")
        )
        return mean, std

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, at_once: int = 8) -> Tensor:
        """Videos `(b, 3, f, H, W)` in [0, 1], float32, from latents `(b, c, f, h, w)`.

        Args:
            latents: scaled.
            at_once: frames that pass through the decoder together; one with `enable_vae_slicing`.

        Raises:
            ValueError: latents that are not finite.
        """
        if not torch.isfinite(latents).all():
            raise ValueError(
                "latents are not finite, the video would be black: float16 has overflown; use torch.bfloat16 or float32"
            )
        frames = latents.shape[2]
        rows = rearrange(latents, "b c f h w -> (b f) c h w") / self.vae.config.scaling_factor
        rows = rows.to(self._execution_device, self.vae.dtype)
        step = 1 if getattr(self.vae, "use_slicing", False) else at_once
        decoded = torch.cat([self.vae.decode(part).sample.float() for part in rows.split(step)])
        return rearrange((decoded / 2 + 0.5).clamp(0, 1), "(b f) c h w -> b c f h w", f=frames)

    def enable_vae_slicing(self) -> None:
        """Frames are decoded one by one: less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Several frames are decoded together again."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Large frames pass through the autoencoder in overlapping tiles: less memory, faint differences at seams."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Frames pass through the autoencoder whole again."""
        self.vae.disable_tiling()

    def _check_size(self, height: int, width: int) -> None:
        unit = self.vae_scale_factor
        if height % unit or width % unit or min(height, width) < unit:
            near = tuple(max(round(side / unit), 1) * unit for side in (height, width))
            raise ValueError(f"{height} x {width} is no multiple of {unit} pixels: use {near[0]} x {near[1]}")

    # ------------------------------------------------------------------ inversion
    @torch.no_grad()
    def invert(
        self,
        latents: Tensor,
        prompt: str | Sequence[str] = "",
        steps: int = 50,
        *,
        iterations: int = 0,
        trajectory: bool = False,
        window: int | None = None,
        overlap: int = 0,
        cache: str | os.PathLike[str] | None = None,
    ) -> Tensor:
        """The noise from which DDIM sampling without guidance leads back to the latents.

        Args:
            latents: `(b, c, f, h, w)`, see `encode_video`.
            prompt: under which the network predicts; the paper's is empty.
            steps: as many as sampling will take.
            iterations: fixed-point iterations per step, for inversions that lead back more exactly.
            trajectory: all levels, `(steps + 1, b, c, f, h, w)`, the clean ones first.
            window, overlap: frames at a time, see `tune_a_video.inference.windows`; None: all.
            cache: folder in which results are kept by weights, latents and settings.

        Returns:
            `(b, c, f, h, w)`, float32.

        Raises:
            ValueError: latents of another shape, another number of prompts, more steps than there are noise levels, or
                a scheduler that has no noise levels.
        """
        check_scheduler(self.scheduler)
        self._check_latents(latents)
        prompts = as_prompts(prompt)
        if len(prompts) not in (1, len(latents)):
            raise ValueError(f"{len(prompts)} prompts for {len(latents)} videos: give one for all, or one for each")
        device = self._execution_device
        latents = latents.to(device, torch.float32)
        text = self.encode_prompt(prompts).expand(len(latents), -1, -1)

        def compute() -> Tensor:
            with self.progress_bar(total=steps * (iterations + 1)) as bar:

                def predict(x: Tensor, t: Tensor) -> Tensor:
                    bar.update()
                    return self._predict(x, t, text, window, overlap)

                return ddim_invert(
                    predict, self.scheduler, latents, steps, iterations=iterations, trajectory=trajectory
                )

        if cache is None:
            result = compute()
        else:
            settings = {"steps": steps, "iterations": iterations, "trajectory": trajectory}
            settings |= {} if window is None else {"window": window, "overlap": overlap}
            result = cached_inversion(Path(cache), self.unet, self.scheduler, latents, text, settings, compute)
        self.maybe_free_model_hooks()
        return result.to(device)

    # ------------------------------------------------------------------ sampling
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        video_length: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 12.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        strength: float | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        window: int | None = None,
        overlap: int = 0,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cross_attention_kwargs: dict[str, Any] | None = None,
        controlnet: Any = None,
        control_video: Any = None,
        controlnet_conditioning_scale: Share = 1.0,
        control_guidance_start: Share = 0.0,
        control_guidance_end: Share = 1.0,
    ) -> TuneAVideoPipelineOutput | tuple[Any]:
        """Videos of the prompts, all in one batch.

        Args:
            prompt: one or several.
            video_length: frames; None: that of `latents`, which otherwise has to agree.
            height, width: pixels; None: of `latents`, or of the network's training.
            num_inference_steps: as many as the inversion took, if there was one.
            guidance_scale: of classifier-free guidance; 1 and below: none.
            negative_prompt: in place of the empty prompt; one, or one for each.
            num_videos_per_prompt: from different noise.
            eta: of DDIM: 0 is deterministic, 1 draws as DDPM.
            generator: one for the batch, or one per video: then a video does not depend on its neighbours.
            latents: noise of unit variance or inverted latents, `(1, c, f, h, w)` for all videos or one for each.
            strength: the latents are clean, and noised so far (SDEdit, Meng et al. 2022): 1 nearly hides them, 0.1
                leaves little to do; of the steps that share is taken.
            prompt_embeds, negative_prompt_embeds: text states `(b, L, d)` in place of texts; the second also
                `(steps, b, L, d)`, as `tune_a_video.inference.null_text` finds them.
            window, overlap: frames at a time for long videos, see `tune_a_video.inference.windows`; None: all.
            output_type: `pt`, `np`, `pil` or `latent`.
            return_dict: False: a tuple of `frames`.
            callback_on_step_end: called with pipeline, step, timestep and tensors; what it returns replaces them.
            callback_on_step_end_tensor_inputs: which: `latents`, `prompt_embeds`.
            cross_attention_kwargs: for the attention processors, such as the scale of a LoRA.
            controlnet: in place of the pipeline's own for this call.
            control_video: its frames (depth, pose, edges, ...), as many and as large as the video's, see
                `tune_a_video.interop.control.prepare`; a list of such for several ControlNets.
            controlnet_conditioning_scale: strength, or one for each ControlNet.
            control_guidance_start, control_guidance_end: shares of the steps between which it takes part.

        Raises:
            ValueError: arguments that do not go together.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"no output_type {output_type!r}: use {', '.join(OUTPUT_TYPES)}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callbacks get {', '.join(self._callback_tensor_inputs)}, not {', '.join(sorted(unknown))}"
            )
        whole = {"num_inference_steps": num_inference_steps, "num_videos_per_prompt": num_videos_per_prompt}
        for name, number in whole.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}={number!r}: a whole number from 1")
        check_scheduler(self.scheduler)
        lora_scale = (cross_attention_kwargs or {}).get("scale")
        text = self._texts(prompt, prompt_embeds, lora_scale).repeat_interleave(num_videos_per_prompt, dim=0)
        guided = guidance_scale > 1
        if guided:
            if negative_prompt is None and negative_prompt_embeds is None:
                negative_prompt = ""
            by_step = None
            if negative_prompt_embeds is not None and negative_prompt_embeds.ndim == 4:
                by_step, negative_prompt_embeds = negative_prompt_embeds, negative_prompt_embeds[0]
            empty = self._texts(negative_prompt, negative_prompt_embeds, lora_scale, "negative_prompt")
            if len(empty) not in (1, len(text), len(text) // num_videos_per_prompt):
                raise ValueError(f"{len(empty)} negative prompts for {len(text)} videos: give one, or one for each")
            if empty.shape[1] != text.shape[1]:
                raise ValueError(
                    f"the prompt has {text.shape[1]} text states, the negative prompt {empty.shape[1]}: give "
                    "prompt_embeds and negative_prompt_embeds of one length"
                )
            empty = empty.repeat_interleave(len(text) // len(empty), dim=0)
            text = torch.cat([empty, text])
        videos = len(text) // (2 if guided else 1)
        latents = self._start(latents, videos, video_length, height, width, generator)
        control = prepare(
            controlnet if controlnet is not None else self.controlnet,
            control_video,
            controlnet_conditioning_scale,
            control_guidance_start,
            control_guidance_end,
            videos=videos,
            latents=latents,
            unit=self.vae_scale_factor,
        )
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        timesteps = self.scheduler.timesteps
        check_steps(self.scheduler, num_inference_steps, timesteps)
        if strength is None:
            latents = latents * self.scheduler.init_noise_sigma
        else:
            latents, timesteps = self._noised(latents, strength, num_inference_steps, generator)
        if guided and by_step is not None and len(by_step) != len(timesteps):
            raise ValueError(f"negative_prompt_embeds are of {len(by_step)} steps, sampling takes {len(timesteps)}")
        extra = self._step_arguments(eta, generator)
        for i, t in enumerate(self.progress_bar(timesteps)):
            if guided and by_step is not None:
                empty = by_step[i].to(text).repeat_interleave(videos // by_step.shape[1], dim=0)
                text = torch.cat([empty, text[videos:]])
            noisy = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
            residuals = None
            if control is not None:
                residuals = partial(control.residuals, timestep=t, text=text, steps=(i, len(timesteps)))
            output = self._predict(noisy, t, text, window, overlap, cross_attention_kwargs, residuals).float()
            if guided:
                without, with_text = output.chunk(2)
                output = without + guidance_scale * (with_text - without)
            latents = self.scheduler.step(output, t, latents, **extra).prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "prompt_embeds": text}
                given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                given = callback_on_step_end(self, i, t, given) or {}
                latents, text = given.get("latents", latents), given.get("prompt_embeds", text)
        frames, videos = self._converted(latents, output_type)
        self.maybe_free_model_hooks()
        return TuneAVideoPipelineOutput(frames=frames, videos=videos) if return_dict else (frames,)

    def _converted(self, latents: Tensor, output_type: str) -> tuple[Any, Any]:
        """`frames` and `videos` of `TuneAVideoPipelineOutput`."""
        if output_type == "latent":
            return latents, latents
        decoded = self.decode_latents(latents)
        frames = self.video_processor.postprocess_video(decoded, output_type, do_denormalize=[False] * decoded.shape[2])
        if output_type == "pil":
            return frames, frames
        return frames, frames.transpose(1, 2) if output_type == "pt" else frames.transpose(0, 4, 1, 2, 3)

    def _predict(
        self,
        noisy: Tensor,
        timestep: Tensor,
        text: Tensor,
        window: int | None,
        overlap: int,
        cross_attention_kwargs: dict[str, Any] | None = None,
        residuals: Callable[..., dict[str, Any]] | None = None,
    ) -> Tensor:
        def once(part: Tensor, frames: Sequence[int]) -> Tensor:
            options = {"encoder_hidden_states": text, "cross_attention_kwargs": cross_attention_kwargs}
            if residuals is not None:
                options |= residuals(part, frames=frames)
            return self.unet(part.to(self.unet.dtype), timestep, **options).sample

        return (
            once(noisy, range(noisy.shape[2])) if window is None else predict_in_windows(once, noisy, window, overlap)
        )

    def _texts(self, prompt: Any, embeds: Tensor | None, lora_scale: float | None, name: str = "prompt") -> Tensor:
        if embeds is None:
            if prompt is None:
                raise ValueError(f"give {name}, or {name}_embeds")
            embeds = self.encode_prompt(as_prompts(prompt, name), lora_scale=lora_scale)
        elif prompt:
            raise ValueError(f"give {name} or {name}_embeds, not both")
        width = self.unet.config.cross_attention_dim
        if embeds.ndim != 3 or 0 in embeds.shape or (isinstance(width, int) and embeds.shape[2] != width):
            raise ValueError(f"{name}_embeds are {tuple(embeds.shape)}: text states (b, L, {width}) are expected")
        return embeds.to(self._execution_device, self.unet.dtype)

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.unet.config.in_channels
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise ValueError(f"latents are {tuple(latents.shape)}: (b, {channels}, f, h, w) is expected")

    def _start(
        self,
        latents: Tensor | None,
        videos: int,
        frames: int | None,
        height: int | None,
        width: int | None,
        generator: Generators | None,
    ) -> Tensor:
        """Given or drawn noise `(b, c, f, h, w)`, float32."""
        if isinstance(generator, Sequence) and len(generator) != videos:
            raise ValueError(f"{len(generator)} generators for {videos} videos: give one for each")
        unit, device = self.vae_scale_factor, self._execution_device
        if height is not None or width is not None:
            self._check_size(width if height is None else height, height if width is None else width)
        if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int) or frames < 1):
            raise ValueError(f"video_length={frames!r}: a whole number of frames from 1")
        if latents is not None:
            self._check_latents(latents)
            if len(latents) not in (1, videos):
                raise ValueError(f"latents are {tuple(latents.shape)} for {videos} videos: (1 or b, c, f, h, w)")
            asked = (frames, height and height // unit, width and width // unit)
            for name, want, have in zip(("video_length", "height", "width"), asked, latents.shape[2:], strict=True):
                if want is not None and want != have:
                    raise ValueError(f"{name} says {want} frames or latent rows, the latents have {have}: leave it out")
            return latents.to(device, torch.float32).expand(videos, -1, -1, -1, -1)
        if frames is None:
            raise ValueError("video_length is needed where no latents are given")
        size = self.unet.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size or (64, 64)
        shape = (
            videos,
            self.unet.config.in_channels,
            frames,
            height // unit if height else rows,
            width // unit if width else columns,
        )
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _noised(
        self, latents: Tensor, strength: float, steps: int, generator: Generators | None
    ) -> tuple[Tensor, Tensor]:
        """Clean latents at the noise level from which a share of the steps is left, and the timesteps of those."""
        skipped = steps - round(steps * strength)
        if not 0 < strength <= 1 or skipped == steps:
            raise ValueError(f"strength={strength}: above 0 (at least one of {steps} steps), at most 1")
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        # Schedulers of second order look at most steps twice.
        begin = skipped * self.scheduler.order
        timesteps = self.scheduler.timesteps[begin:]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return self.scheduler.add_noise(latents, noise, timesteps[:1].expand(len(latents))), timesteps

    def _step_arguments(self, eta: float, generator: Generators | None) -> dict[str, Any]:
        """What of `eta` and `generator` the scheduler's step takes."""
        known = inspect.signature(self.scheduler.step).parameters
        given = {"eta": eta, "generator": list(generator) if isinstance(generator, Sequence) else generator}
        if eta and "eta" not in known:
            raise ValueError(f"{type(self.scheduler).__name__} has no eta")
        return {name: value for name, value in given.items() if name in known}
