"""Preparation of tune_a_video: a tiny Stable Diffusion, which tests and claims load as they would the real one."""

from __future__ import annotations

from pathlib import Path

from core.data.prepare import preparer
from core.errors import ConfigError

__all__ = ["tiny_sd"]


@preparer("tiny_sd")
def tiny_sd(
    output: Path,
    unet_steps: int = 2500,
    clip_steps: int = 700,
    judge_steps: int = 600,
    channels: list[int] | None = None,
    batch: int = 32,
    tower: float = 1.0,
    seed: int = 0,
    check_steps: int = 25,
    further_steps: int = 0,
) -> str:
    """A tiny text-to-image model of a drawn world, trained here, as an ordinary Stable Diffusion folder.

    output/{model_index.json,vae,unet,text_encoder,tokenizer,scheduler} are what diffusers reads;
    output/{tiny_clip,judge} evaluate videos of this world. What is there with the same settings is left alone, and the
    image model's training goes on where it was stopped.

    Args:
        output: folder that is written to.
        unet_steps: training steps of the image model.
        clip_steps: training steps of the text encoder, together with the tiny CLIP's picture tower.
        judge_steps: training steps of the judge of looks.
        channels: of the image model's two levels; 32,64 when null.
        batch: pictures in a step of the image model.
        tower: width of the picture towers, as a multiple.
        seed: of weights and pictures.
        check_steps: sampling steps of the check at the end; 0 leaves it out.
        further_steps: training steps of the image model after those, with a rate that begins anew, for one that does
            not show its words often enough (`gate` in tiny_sd.json).

    Raises:
        ConfigError: numbers that make no model, or a folder that holds something else.
    """
    from tune_a_video.standin.folder import build

    widths = [32, 64] if channels is None else channels
    if min(unet_steps, clip_steps, judge_steps, batch) < 1 or tower <= 0 or min(check_steps, further_steps) < 0:
        raise ConfigError("tiny_sd: steps and batch are at least 1, tower is positive, the other steps at least 0")
    if len(widths) != 2 or any(w < 4 or w % 4 for w in widths):
        raise ConfigError(f"tiny_sd: channels={','.join(map(str, widths))}: two widths, multiples of 4")
    settings = {
        "unet_steps": unet_steps,
        "clip_steps": clip_steps,
        "judge_steps": judge_steps,
        "channels": widths,
        "batch": batch,
        "tower": tower,
        "seed": seed,
        **({"further_steps": further_steps} if further_steps else {}),
    }
    checks = build(output, settings, check_steps)
    lines = [f"{output}: a Stable Diffusion folder"]
    lines += [f"  {name:<18} {value:.4g}" for name, value in checks.items()]
    return "\n".join(lines)
