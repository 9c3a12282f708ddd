"""Pieces of tune_a_video as the golden cases name them, built from their configurations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tune_a_video.checkpoint import convert, revert
from tune_a_video.inference.inversion import ddim_invert
from tune_a_video.models import (
    FrameCount,
    SpatioTemporalAttnProcessor,
    TuneAVideoUNet,
    fold,
    inflate,
    unfold,
)

from ..cases import Case, UnknownPiece
from . import Outputs, run_from

run = run_from("tune_a_video", "tune_a_video_sampling", eval_gradients=False)


def built(function: Callable[..., Any], config: dict[str, Any], **renamed: str) -> Any:
    """Calls a constructor with those entries of a configuration that it knows; `theirs="ours"` renames."""
    known = inspect.signature(function).parameters
    config = {renamed.get(name, name): value for name, value in config.items()}
    return function(**{name: value for name, value in config.items() if name in known})


def unet(config: dict[str, Any]) -> TuneAVideoUNet:
    """The network of a configuration of the released code."""
    return built(TuneAVideoUNet, config)


def load(module: nn.Module, case: Case) -> nn.Module:
    """The module with the case's weights, in its mode."""
    module.load_state_dict(convert(case.state_dict(), module))
    return module.train(case.training)


def _video_block(module: nn.Module, case: Case, frames: int) -> nn.Module:
    """A block of diffusers, inflated, with the case's weights."""
    count = FrameCount(frames)
    return load(inflate(module, count), case)


# ------------------------------------------------------------------ single layers


def _inflated_conv(case: Case) -> Outputs:
    x = case.inputs()["x"]
    return {"out": unfold(load(built(nn.Conv2d, case.config), case)(fold(x)), x.shape[2])}


def _downsample(case: Case) -> Outputs:
    x = case.inputs()["x"]
    module = built(Downsample2D, case.config)
    # diffusers keeps the kernel under a second name for old checkpoints.
    state = convert(case.state_dict())
    module.load_state_dict({name: state[f"conv.{name.rpartition('.')[2]}"] for name in module.state_dict()})
    return {"out": unfold(module(fold(x)), x.shape[2])}


def _upsample(case: Case) -> Outputs:
    x = case.inputs()["x"]
    module = load(built(Upsample2D, case.config), case)
    outputs = {"out": unfold(module(fold(x)), x.shape[2])}
    if "out_sized" in case.outputs:
        size = tuple(case.config["output_size"][1:])
        outputs["out_sized"] = unfold(module(fold(x), output_size=size), x.shape[2])
    return outputs


def _resnet_block(case: Case) -> Outputs:
    inputs = case.inputs()
    frames = inputs["x"].shape[2]
    module = _video_block(built(ResnetBlock2D, case.config), case, frames)
    return {"out": unfold(module(fold(inputs["x"]), _rows(inputs["temb"], frames)), frames)}


def _st_attention(case: Case) -> Outputs:
    config = case.config
    module = built(Attention, {"bias": False, **config})
    module.set_processor(SpatioTemporalAttnProcessor(FrameCount(config["video_length"])))
    return {"out": load(module, case)(case.inputs()["x"])}


def _transformer_block(case: Case) -> Outputs:
    inputs = case.inputs()
    module = _video_block(built(BasicTransformerBlock, case.config), case, case.config["video_length"])
    return {"out": module(inputs["x"], encoder_hidden_states=inputs["text"])}


def _transformer3d(case: Case) -> Outputs:
    inputs = case.inputs()
    frames = inputs["x"].shape[2]
    module = _video_block(built(Transformer2DModel, case.config), case, frames)
    out = module(fold(inputs["x"]), encoder_hidden_states=_rows(inputs["text"], frames)).sample
    return {"out": unfold(out, frames)}


def _rows(value: Tensor, frames: int) -> Tensor:
    return value.repeat_interleave(frames, dim=0)


# ------------------------------------------------------------------ blocks of the network


def _down(case: Case) -> Outputs:
    x, given = _block_inputs(case)
    kind = blocks.CrossAttnDownBlock2D if "text" in case.inputs() else blocks.DownBlock2D
    out, skips = _block(kind, case, x)(fold(x), **given)
    frames = x.shape[2]
    return {"out": unfold(out, frames)} | {f"skip{i}": unfold(skip, frames) for i, skip in enumerate(skips)}


def _mid(case: Case) -> Outputs:
    x, given = _block_inputs(case)
    return {"out": unfold(_block(blocks.UNetMidBlock2DCrossAttn, case, x)(fold(x), **given), x.shape[2])}


def _up(case: Case) -> Outputs:
    x, given = _block_inputs(case)
    inputs, frames = case.inputs(), x.shape[2]
    kind = blocks.CrossAttnUpBlock2D if "text" in inputs else blocks.UpBlock2D
    count = sum(re.fullmatch(r"skip\d+", name) is not None for name in inputs)
    given["res_hidden_states_tuple"] = tuple(fold(inputs[f"skip{i}"]) for i in range(count))
    module = _block(kind, case, x)
    outputs = {"out": unfold(module(fold(x), **given), frames)}
    if "out_sized" in case.outputs:
        size = tuple(case.outputs["out_sized"][0][-2:])
        outputs["out_sized"] = unfold(module(fold(x), upsample_size=size, **given), frames)
    return outputs


def _block(kind: type[nn.Module], case: Case, x: Tensor) -> nn.Module:
    module = built(kind, case.config, attn_num_head_channels="num_attention_heads")
    return _video_block(module, case, x.shape[2])


def _block_inputs(case: Case) -> tuple[Tensor, dict[str, Any]]:
    inputs = case.inputs()
    frames = inputs["x"].shape[2]
    given = {"temb": _rows(inputs["temb"], frames)}
    if "text" in inputs:
        given["encoder_hidden_states"] = _rows(inputs["text"], frames)
    return inputs["x"], given


# ------------------------------------------------------------------ the network


def _unet3d(case: Case) -> Outputs:
    inputs = case.inputs()
    module = load(unet(case.config), case)
    return {"out": module(inputs["sample"], inputs["timesteps"], inputs["text"]).sample}


def _from_pretrained_2d(case: Case) -> Outputs:
    inputs = case.inputs()
    image = load(built(UNet2DConditionModel, case.config), case)
    video = TuneAVideoUNet.from_unet2d(image)
    sample, rest = inputs["sample"], (inputs["timesteps"], inputs["text"])
    return {
        "out": video(sample, *rest).sample,
        "out_2d": image(sample[:, :, 0], *rest).sample,
        "out_one_frame": video(sample[:, :, :1], *rest).sample,
    }


# ------------------------------------------------------------------ noise levels


def scheduler(config: dict[str, Any]) -> DDIMScheduler:
    """Today's scheduler for a configuration of the old one."""
    return built(DDIMScheduler, config)


def _ddim_schedule(case: Case) -> Outputs:
    inputs, config = case.inputs(), case.config
    ddim = scheduler(config)
    outputs: Outputs = {"alphas_cumprod": ddim.alphas_cumprod}
    for name in case.outputs:
        if match := re.fullmatch(r"timesteps_(\d+)", name):
            ddim.set_timesteps(int(match[1]))
            outputs[name] = ddim.timesteps
    steps = config["num_inference_steps"][0]
    ddim.set_timesteps(steps)
    velocity = DDIMScheduler.from_config(ddim.config, prediction_type="v_prediction")
    velocity.set_timesteps(steps)
    for name in case.outputs:
        if not (match := re.fullmatch(r"(step|step_v|inverse)_(\d+)", name)):
            continue
        timestep = ddim.timesteps[int(match[2])]
        if match[1] == "inverse":
            # One step of the inversion: from the level below this timestep to it.
            place = steps - int(match[2])
            outputs[name] = _one_inversion_step(ddim, inputs, steps, place)
        else:
            sampler = ddim if match[1] == "step" else velocity
            outputs[name] = sampler.step(inputs["eps"], timestep, inputs["x"]).prev_sample
    return outputs


def _one_inversion_step(ddim: DDIMScheduler, inputs: Outputs, steps: int, place: int) -> Tensor:
    """The `place`-th step of an inversion that has arrived at `x`, when the network says `eps`.

    The steps before are run backwards to give the start that leads there.
    """
    x, levels = inputs["x"].double(), ddim.alphas_cumprod.double()
    times = [int(t) for t in reversed(ddim.timesteps)]
    gap = ddim.config.num_train_timesteps // steps
    for t in reversed(times[: place - 1]):
        alpha, before = levels[t], levels[t - gap] if t >= gap else levels[0]
        clean = (x - (1 - alpha).sqrt() * inputs["eps"]) / alpha.sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * inputs["eps"]
    path = ddim_invert(lambda latents, t: inputs["eps"], ddim, x.float(), steps, trajectory=True)
    return path[place]


def _ddim_inversion(case: Case) -> Outputs:
    inputs, config = case.inputs(), case.config
    text = inputs["text"].mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.7 * x + 0.3 * x.roll(1, dims=2) + t / 1000 - 0.2) + 0.1 * text

    ddim = scheduler(config["scheduler"])
    path = ddim_invert(predict, ddim, inputs["latents"], config["num_inv_steps"], trajectory=True)
    ddim.set_timesteps(config["num_inv_steps"])
    return {f"latent{i}": latents for i, latents in enumerate(path)} | {"timesteps": ddim.timesteps}


PIECES: dict[str, Callable[[Case], Outputs]] = {
    "inflated_conv": _inflated_conv,
    "downsample": _downsample,
    "upsample": _upsample,
    "resnet_block": _resnet_block,
    "st_attention": _st_attention,
    "transformer_block": _transformer_block,
    "transformer3d": _transformer3d,
    "down_block": _down,
    "down_block_cross": _down,
    "mid_block": _mid,
    "up_block": _up,
    "up_block_cross": _up,
    "unet3d": _unet3d,
    "from_pretrained_2d": _from_pretrained_2d,
    "ddim_schedule": _ddim_schedule,
    "ddim_inversion": _ddim_inversion,
}


# ------------------------------------------------------------------ inventories


def inventory(name: str, content: dict[str, Any]) -> None:
    """Build the published network without memory: same keys, same shapes, same numbers of parameters.

    Raises:
        AssertionError: they differ.
        UnknownPiece: an inventory of something else.
    """
    if not re.fullmatch(r"keys_unet3d_\w+", name):
        raise UnknownPiece(f"no inventory of tune_a_video is called {name!r}")
    with torch.device("meta"):
        network = unet(content["config"])
        published = {key: torch.empty(shape) for key, shape in content["keys"]}
    wrapped = {f"module.{key}": value for key, value in published.items()}
    assert convert(published, network).keys() == convert(wrapped, network).keys()
    assert revert(published).keys() == published.keys()
    total = sum(parameter.numel() for parameter in network.parameters())
    new = sum(value.numel() for key, value in published.items() if "attn_temp" in key or "norm_temp" in key)
    by_module = {part: _count(network.trainable_parameters([part])) for part in content["trainable_by"]}
    counted = (total, new, by_module, _count(network.trainable_parameters()))
    assert counted == (content["total"], content["new_temporal"], content["trainable_by"], content["trainable"]), (
        counted
    )


def _count(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())
