"""Cases of tune_a_video that train, sample or measure."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from tune_a_video.data.video_io import video_grid
from tune_a_video.interop.pipeline import TuneAVideoPipeline
from tune_a_video.losses import add_noise, denoising_loss, prediction_target
from tune_a_video.metrics.scores import consecutive_consistency, frame_accuracy, frame_consistency, text_alignment

from ..cases import Case
from . import Outputs
from .tune_a_video import built, load, scheduler, unet

# ------------------------------------------------------------------ training


def _train_step(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    network = load(unet(config), case)
    names = case.meta["trainable"]
    chosen = network.set_trainable(config["trainable_modules"])
    assert set(chosen) == set(names), sorted(set(chosen) ^ set(names))
    alphas = built(DDPMScheduler, config["scheduler"]).alphas_cumprod
    latents, noise, timesteps = inputs["latents"], inputs["noise"], inputs["timesteps"]
    noisy = add_noise(latents, noise, timesteps, alphas)
    target = prediction_target(latents, noise, timesteps, alphas, config["prediction_type"])

    def loss() -> Tensor:
        return denoising_loss(network(noisy, timesteps, inputs["text"]).sample, target)

    parameters = [network.get_parameter(name) for name in names]
    options = {name: value for name, value in config["optimizer"].items() if name != "name"}
    optimizer = getattr(torch.optim, config["optimizer"]["name"])(parameters, **options)
    outputs = {"noisy": noisy, "target": target, "loss": loss()}
    outputs["loss"].backward()
    outputs["grad_norms"] = torch.stack([parameter.grad.norm() for parameter in parameters])
    outputs["grad_total_norm"] = nn.utils.clip_grad_norm_(parameters, config["max_grad_norm"])
    optimizer.step()
    outputs |= {f"after:{name}": parameter for name, parameter in zip(names, parameters, strict=True)}
    return outputs | {"loss_after": loss()}


# ------------------------------------------------------------------ sampling


class _Decoder(nn.Module):
    """The stand-in of the cases: `1.3 tanh(0.1 z)` of three channels, eight times as large."""

    config = SimpleNamespace(scaling_factor=0.18215, block_out_channels=(1, 1, 1, 1))
    dtype, device = torch.float32, torch.device("cpu")

    def decode(self, latents: Tensor) -> SimpleNamespace:
        picture = 1.3 * torch.tanh(0.1 * latents[:, :3])
        return SimpleNamespace(sample=picture.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3))


def _pipeline(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    network = load(unet(config["unet"]), case)
    pipe = TuneAVideoPipeline(_Decoder(), None, None, network, scheduler(config["scheduler"]))
    pipe.set_progress_bar_config(disable=True)
    path: list[Tensor] = []

    def keep(_: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        path.append(tensors["latents"])
        return {}

    names = ("num_inference_steps", "guidance_scale", "eta", "height", "width", "video_length")
    options = {name: config[name] for name in names}
    if options["guidance_scale"] > 1:
        options["negative_prompt_embeds"] = inputs["text_uncond"]
    video = pipe(latents=inputs["latents"], prompt_embeds=inputs["text"], callback_on_step_end=keep, **options).videos
    steps = config["num_inference_steps"]
    return {
        "latents_first": path[0],
        "latents_mid": path[steps // 2],
        "latents_last": path[-1],
        "video": video,
        "timesteps": pipe.scheduler.timesteps,
    }


def _video_grid(case: Case) -> Outputs:
    config = case.config
    frames = video_grid(case.inputs()["videos"], config["n_rows"], rescale=config["rescale"], truncate=True)
    return {"frames": torch.from_numpy(frames)}


def _clip_metrics(case: Case) -> Outputs:
    inputs, scale = case.inputs(), case.config["logit_scale"]
    # A shift that the case describes in words, so that cosines are not all near zero.
    match = re.search(r"frame_embeds \+ ([\d.]+)", str(case.meta.get("rule", "")))
    frames = inputs["frame_embeds"] + (float(match[1]) if match else 0.0)
    target, source = inputs["text_embeds"], inputs["source_text_embeds"]
    alignment = text_alignment(frames, target, scale)
    return {
        "clip_text": alignment,
        "clip_frame": frame_consistency(frames),
        "pick_score": alignment,
        "temporal_consecutive": consecutive_consistency(frames),
        "frame_accuracy": frame_accuracy(frames, target, source),
    }


PIECES: dict[str, Callable[[Case], Outputs]] = {
    "train_step": _train_step,
    "pipeline": _pipeline,
    "video_grid": _video_grid,
    "clip_metrics": _clip_metrics,
}
