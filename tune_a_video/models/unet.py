"""The video network: a 2-D UNet of diffusers whose frames know each other (paper, section 4; its figure 3)."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# ModelMixin looks unused, but diffusers asks for it: a saved pipeline names this module as the library of its network,
# and on loading the base classes are looked up as attributes of that very module.
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401
from diffusers.models.attention_processor import (
    AttentionProcessor,
    AttnProcessor,
    AttnProcessor2_0,
    AttnProcessorNPU,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XLAFlashAttnProcessor2_0,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from tune_a_video.models.frame_attention import FrameSpec, SpatioTemporalAttnProcessor, check_spec
from tune_a_video.models.frames import FrameCount, fold, recorded, unfold
from tune_a_video.models.inflated_weights import cast, fresh_temporal, load, settled_options
from tune_a_video.models.inflation import TEMPORAL_NAMES, inflate, set_frame_attention
from tune_a_video.models.lora_layers import lora_buffers, merge_updates
from tune_a_video.models.temporal import FrameAxisAttnProcessor, TemporalConfig
from tune_a_video.models.weights import read_config, read_delta, read_network, write_delta

#: What the released recipe trains: all parameters of modules whose name ends so.
TRAINABLE_MODULES = ("attn1.to_q", "attn2.to_q", "attn_temp")

_BLOCKS = ("down_block_types", "up_block_types", "mid_block_type")
#: Processors that compute plain attention, each in its own way.
_STOCK = (
    AttnProcessor,
    AttnProcessor2_0,
    AttnProcessorNPU,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XLAFlashAttnProcessor2_0,
)
_CONFIG_NAMES = ("attention", "group_norm", "temporal")


def _in_2d(value: Any) -> Any:
    """Names of blocks as diffusers has them: `CrossAttnDownBlock3D` is `CrossAttnDownBlock2D`."""
    if value is None:
        return None
    return value.replace("3D", "2D") if isinstance(value, str) else tuple(_in_2d(name) for name in value)


def _in_3d(value: Any) -> Any:
    """Names of blocks as the released configurations have them."""
    if value is None:
        return None
    return value.replace("2D", "3D") if isinstance(value, str) else tuple(_in_3d(name) for name in value)


class TuneAVideoUNet(UNet2DConditionModel):
    """A denoiser of latent videos with the weights of a denoiser of latent images.

    Everything that works on diffusers' 2-D UNet works here on folded rows `(b f, ...)`: gradient checkpointing,
    ControlNet and T2I-Adapter residuals, LoRA, FreeU, channels_last, compilation. Keys of the state dict are the
    image model's, with `attn_temp` and `norm_temp` in every transformer block; they equal the released code's.

    Args:
        *args, **config: of `diffusers.UNet2DConditionModel`, same names and defaults. Names of blocks may say 2D or 3D;
            `config` keeps the 3-D ones, as released folders do.
        attention: which frames a frame attends to, see `tune_a_video.models.frame_attention.key_frames`.
        group_norm: `joint` over the frames, as in the released code, or `per_frame`.
        temporal: see `TemporalConfig`.

    Raises:
        ValueError: an argument that means nothing.
    """

    def __init__(
        self,
        *args: Any,
        attention: FrameSpec = "first_prev",
        group_norm: str = "joint",
        temporal: TemporalConfig | Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        given = inspect.signature(UNet2DConditionModel.__init__).bind(self, *args, **config).arguments
        given = {name: value for name, value in given.items() if name != "self"}
        super().__init__(**{name: _in_2d(value) if name in _BLOCKS else value for name, value in given.items()})
        temporal = TemporalConfig.of(temporal)
        self.frame_count = FrameCount()
        inflate(self, self.frame_count, attention, group_norm, temporal)
        self.register_to_config(
            **{name: _in_3d(self.config[name]) for name in _BLOCKS},
            attention=check_spec(attention),
            group_norm=group_norm,
            temporal=dict(vars(temporal)),
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The prediction for noisy latent videos.

        Args:
            sample: `(b, c, f, h, w)`.
            timestep: a number or `(b,)`: one per video.
            encoder_hidden_states: text `(b, L, d)`, one per video; or `(b f, L, d)`, one per frame.
            *args, **kwargs: of `diffusers.UNet2DConditionModel.forward`; residuals have rows `(b f, ...)`, class labels
                and added conditions one row per video.
            return_dict: see diffusers.

        Returns:
            With `sample` `(b, c, f, h, w)`.

        Raises:
            ValueError: `sample` has not five dimensions, or there are neither b nor b f texts.
        """
        if sample.ndim != 5:
            raise ValueError(f"sample is {tuple(sample.shape)}: a latent video is (b, c, f, h, w)")
        videos, frames = sample.shape[0], sample.shape[2]
        texts = encoder_hidden_states.shape[0]
        if texts not in (videos, videos * frames):
            raise ValueError(f"{texts} texts for {videos} videos of {frames} frames: give one per video or frame")
        self.frame_count.frames = frames
        self.frame_count.shared_text = frames > 1 and texts == videos

        def rows(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == videos and frames > 1:
                return value.unsqueeze(1).expand(-1, frames, *value.shape[1:]).flatten(0, 1)
            return value

        for name in ("class_labels", "timestep_cond", "encoder_attention_mask"):
            if name in kwargs:
                kwargs[name] = rows(kwargs[name])
        if kwargs.get("added_cond_kwargs"):
            kwargs["added_cond_kwargs"] = {name: rows(value) for name, value in kwargs["added_cond_kwargs"].items()}
        # A single timestep is broadcast by diffusers, which computes its embedding for all rows alike.
        if isinstance(timestep, Tensor) and (timestep.ndim if recorded() else timestep.numel() > 1):
            timestep = rows(timestep)
        out = super().forward(fold(sample), timestep, rows(encoder_hidden_states), *args, return_dict=False, **kwargs)[
            0
        ]
        out = unfold(out, frames)
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    # ------------------------------------------------------------------ from weights
    @classmethod
    def from_unet2d(
        cls,
        unet: UNet2DConditionModel,
        *,
        attention: FrameSpec | None = None,
        group_norm: str | None = None,
        temporal: TemporalConfig | Mapping[str, Any] | None = None,
    ) -> TuneAVideoUNet:
        """The video network with an image network's weights, on its device and in its precision.

        Args:
            unet: of Stable Diffusion 1.x or 2.x, personalised ones included; its tensors are copied.
            attention, group_norm, temporal: see the class; None: what a tuned network says, or the class's default.

        Raises:
            ValueError: `unet` has parameters that the video network has no place for (LoRA that is not fused), or was
                tuned as a video network with other attention or norms.
        """
        options = {"attention": attention, "group_norm": group_norm, "temporal": temporal}
        state = {name: value.detach().clone() for name, value in unet.state_dict().items()}
        made = cls._inflated(dict(unet.config), state, type(unet).__name__, options)
        return made.train(unet.training)

    @classmethod
    def _inflated(
        cls, config: Mapping[str, Any], state: Mapping[str, Tensor], source: str, options: Mapping[str, Any]
    ) -> TuneAVideoUNet:
        tuned = any("attn_temp" in name for name in state)
        options = settled_options(config, options, source, tuned=tuned)
        known = inspect.signature(UNet2DConditionModel.__init__).parameters
        with torch.device("meta"):
            made = cls(**{name: value for name, value in config.items() if name in known and name != "self"}, **options)
        fresh = fresh_temporal(made, next(iter(state.values())))
        load(made, {**fresh, **state}, source)
        return made

    @classmethod
    def from_pretrained_2d(
        cls,
        path: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        attention: FrameSpec | None = None,
        group_norm: str | None = None,
        temporal: TemporalConfig | Mapping[str, Any] | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> TuneAVideoUNet:
        """The video network from a local folder with an image network of diffusers.

        Args:
            path: the folder, or the pipeline's.
            subfolder: `unet` for a pipeline's folder.
            attention, group_norm, temporal: see `from_unet2d`.
            variant: `fp16` reads `diffusion_pytorch_model.fp16.safetensors`.
            torch_dtype: of the parameters; None: float32.

        Raises:
            FileNotFoundError: there is no such network.
            ValueError: its weights do not fit, or it was tuned as a video network with other attention or norms.
        """
        config, state = read_network(path, subfolder, variant)
        options = {"attention": attention, "group_norm": group_norm, "temporal": temporal}
        return cls._inflated(config, cast(state, torch_dtype), str(path), options).eval()

    @classmethod
    def from_official(
        cls,
        path: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        attention: FrameSpec | None = None,
        group_norm: str | None = None,
        temporal: TemporalConfig | Mapping[str, Any] | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> TuneAVideoUNet:
        """A tuned network from a folder as the released code (or this one) writes it, `.bin` or safetensors.

        Args:
            path, subfolder, variant, torch_dtype: see `from_pretrained_2d`.
            attention, group_norm, temporal: None: what the folder says; where it says nothing, as released.

        Raises:
            FileNotFoundError: there is no such network.
            ValueError: its weights do not fit, or it is an image network.
        """
        config, state = read_network(path, subfolder, variant)
        if "temporal" not in config and not any("attn_temp" in name for name in state):
            raise ValueError(f"{path} holds an image network: load it with from_pretrained_2d")
        known = inspect.signature(cls.__init__).parameters
        config = {name: value for name, value in config.items() if name in known and name != "self"}
        for name, value in zip(_CONFIG_NAMES, (attention, group_norm, temporal), strict=True):
            if value is not None:
                config[name] = value
        with torch.device("meta"):
            made = cls(**config)
        load(made, cast(state, torch_dtype), str(path))
        return made.eval()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> TuneAVideoUNet:
        """As every model of diffusers; a folder of an image network is inflated.

        diffusers would leave the temporal tensors of such a folder without memory.
        """
        folder = Path(path) / (kwargs.get("subfolder") or "")
        if folder.is_dir() and any(folder.glob("*.bin.*json")) and not any(folder.glob("*.safetensors")):
            kwargs.setdefault("use_safetensors", False)  # else diffusers does not look for shards
        if folder.is_dir() and "temporal" not in read_config(folder):
            options = {name: kwargs[name] for name in ("variant", "torch_dtype", *_CONFIG_NAMES) if name in kwargs}
            _, state = read_network(folder, None, kwargs.get("variant"))
            tuned = any("attn_temp" in name for name in state)
            return (cls.from_official if tuned else cls.from_pretrained_2d)(folder, **options)
        return super().from_pretrained(path, **kwargs)

    # ------------------------------------------------------------------ what is trained and kept
    def trainable_parameters(self, modules: Sequence[str] | str = TRAINABLE_MODULES) -> dict[str, nn.Parameter]:
        """Parameters by name of all modules whose name is, or ends with, one of `modules`; `all` is every parameter.

        Raises:
            ValueError: no module has such a name.
        """
        if modules == "all" or list(modules) == ["all"]:
            return dict(self.named_parameters())
        names = [modules] if isinstance(modules, str) else list(modules)
        found: dict[str, nn.Parameter] = {}
        for name in names:
            part = {
                f"{path}.{key}": parameter
                for path, module in self.named_modules()
                if path == name or path.endswith(f".{name}")
                for key, parameter in module.named_parameters()
            }
            if not part:
                raise ValueError(
                    f"trainable_modules: no module's name ends with {name!r}; use attn1.to_q, attn2.to_q, attn_temp, "
                    "norm_temp, attn1, attn2, ff, ... or all"
                )
            found |= part
        return {name: parameter for name, parameter in self.named_parameters() if name in found}

    def set_trainable(self, modules: Sequence[str] | str = TRAINABLE_MODULES) -> list[str]:
        """Gives gradients to `trainable_parameters(modules)` and to nothing else; their names."""
        chosen = self.trainable_parameters(modules)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in chosen)
        return list(chosen)

    def delta_state_dict(self, modules: Sequence[str] | str | None = None) -> dict[str, Tensor]:
        """The tensors that tuning has changed, detached.

        Args:
            modules: see `trainable_parameters`; None: whatever has gradients, with the temporal tensors.
        """
        if modules is None:
            chosen = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        else:
            chosen = set(self.trainable_parameters(modules))
        chosen |= {name for name, _ in self.named_parameters() if any(part in name for part in TEMPORAL_NAMES)}
        chosen |= set(lora_buffers(self))
        return {name: value.detach() for name, value in self.state_dict().items() if name in chosen}

    def save_delta(
        self,
        path: str | os.PathLike[str],
        modules: Sequence[str] | str | None = None,
        **about: Any,
    ) -> Path:
        """Writes `delta_state_dict` as `PATH.safetensors` with `PATH.json` beside it.

        Args:
            path: with or without suffix.
            modules: see `delta_state_dict`.
            **about: what the JSON says beside the network's own settings, e.g. `base=`, `caption=`, `frames=`.
        """
        settings = json.loads(json.dumps({name: self.config[name] for name in _CONFIG_NAMES}))
        return write_delta(path, self.delta_state_dict(modules), {**settings, **about})

    def load_delta(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Loads tensors that `save_delta` wrote, or a `tuneavideo-<step>.pth` of the LOVEU-TGVE fork.

        Low-rank updates are added to the matrices that they were trained for.

        Returns:
            What the JSON beside the file says; empty without one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a tensor has no place here, or the file was made with other attention or norms.
        """
        state, about = read_delta(path)
        for name in _CONFIG_NAMES:
            mine = json.loads(json.dumps(self.config[name]))
            if name in about and about[name] != mine:
                raise ValueError(f"{path} was tuned with {name}={about[name]!r}, this network has {mine!r}")
        own = self.state_dict()
        if not lora_buffers(self):
            state = merge_updates(state, own, str(path))
        strange = sorted(set(state) - set(own))
        wrong = sorted(name for name in set(state) & set(own) if state[name].shape != own[name].shape)
        if strange or wrong:
            raise ValueError(
                f"{path} does not fit: unknown {strange or 'nothing'}, of another shape {wrong or 'nothing'}"
            )
        self.load_state_dict(state, strict=False)
        return about

    # ------------------------------------------------------------------ attention
    def set_frame_attention(self, spec: FrameSpec) -> None:
        """Changes which frames a frame attends to.

        Raises:
            ValueError: an unknown specification.
        """
        set_frame_attention(self, self.frame_count, spec)
        self.register_to_config(attention=check_spec(spec))

    def set_attn_processor(self, processor: AttentionProcessor | dict[str, AttentionProcessor]) -> None:
        """As in diffusers, except that its stock processors leave the attention over frames as it is.

        Adapters, fused projections and attention slicing install stock processors everywhere; frames would forget each
        other silently.

        Raises:
            ValueError: another processor of diffusers, which knows no frames, where they attend to each other.
        """
        current = self.attn_processors
        chosen = processor if isinstance(processor, dict) else dict.fromkeys(current, processor)
        super().set_attn_processor(
            {name: _over_frames(name, value, current.get(name)) for name, value in chosen.items()}
        )

    def set_default_attn_processor(self) -> None:
        """As in diffusers, which knows no processors over frames and refuses: these stay, all others are plain."""
        self.set_attn_processor(AttnProcessor())

    def set_attention_slice(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """Nothing: fused kernels hold no scores, so there is nothing to slice."""


def _over_frames(name: str, given: AttentionProcessor, own: AttentionProcessor | None) -> AttentionProcessor:
    """The processor that an attention gets when `given` is installed everywhere."""
    if not isinstance(own, SpatioTemporalAttnProcessor | FrameAxisAttnProcessor):
        return given
    if type(given) in _STOCK:
        made = copy.copy(own)
        made.fused = type(given) is FusedAttnProcessor2_0
        return made
    if type(given).__module__.startswith("diffusers."):
        raise ValueError(
            f"{name}: {type(given).__name__} knows no frames, which attend to each other here: give a dict that names "
            "the processors of attn2 alone"
        )
    return given


def _signature() -> inspect.Signature:
    """diffusers reads a constructor's signature to know which entries of a saved configuration it takes."""
    own = inspect.signature(TuneAVideoUNet.__init__).parameters
    parent = inspect.signature(UNet2DConditionModel.__init__).parameters
    ours = [own[name] for name in _CONFIG_NAMES]
    return inspect.Signature([*parent.values(), *ours], return_annotation=None)


TuneAVideoUNet.__init__.__signature__ = _signature()
