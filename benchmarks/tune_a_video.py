"""What tuning costs: attention over frames against concatenated keys, and a step against the plain recipe.

  python benchmarks/tune_a_video.py [frames=24] [tokens=1024] [channels=320] [size=sd1] [latent=16] [device=cpu]
      [parts=[attention,norm,step]] [rounds=5] [precision=fp32]

`attention` measures first-and-previous attention of one layer, keys and values given: `ours`; `concatenated`, which
lays out the keys of every frame before one fused call; `scores`, which also writes the scores out, as the released code
does without xformers. Peak of tensors alive, and seconds, without gradients (`sampling`) and with them (`tuning`).

`norm` measures the group norm over all frames without gradients, for `frames` of `tokens` places: `ours`, from every
frame's statistics, and `reordered`, which lays the frames of each channel side by side first.

`step` measures forward and backward of a tuning step with random weights: `ours` (posterior and text known, nothing
recomputed); `encode`, which encodes the clip and its caption in every step; `released`, which also recomputes
activations as the released configurations do. All three draw the same noise, and their losses are compared.
`size` is sd1 (Stable Diffusion 1.4's networks), or tiny. `latent` is the side of the latents; 64 for 512 pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# This file has the name of the package that it measures: look for that in the repository, not beside the file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.config.command.cli import parse, run
from core.profile.benchmarking import conditions, measure, publish
from core.profile.measure import benchmark, peak_memory
from tune_a_video import TuneAVideoTrainer
from tune_a_video.interop.folders import ddim
from tune_a_video.models import FrameCount, FrameGroupNorm
from tune_a_video.models.frame_attention import attend, key_frames
from tune_a_video.trainer.tuning import ARCHITECTURES

HEADS = 8


@dataclass
class Options:
    """What to measure."""

    frames: int = 24
    tokens: int = field(default=1024, metadata={"help": "per frame: 4096 is the first level at 512 pixels"})
    channels: int = 320
    size: str = field(default="sd1", metadata={"help": "of the step: sd1 or tiny"})
    latent: int = 16
    step_frames: int = field(default=4, metadata={"help": "frames of the step"})
    device: str = "cpu"
    precision: str = field(default="fp32", metadata={"help": "fp32, bf16"})
    parts: list[str] = field(default_factory=lambda: ["attention", "norm", "step"])
    rounds: int = 5
    threads: int = 1
    output: str | None = None


# ---------------------------------------------------------------------- attention
def concatenated(q: Tensor, k: Tensor, v: Tensor, scores: bool = False) -> Tensor:
    """Keys `[first; previous]` laid out for all frames at once; `(1, f, n, C)`."""
    before = [max(i - 1, 0) for i in range(q.shape[1])]

    def pair(x: Tensor) -> Tensor:
        return torch.cat([x[:, [0] * x.shape[1]], x[:, before]], dim=2)

    q, k, v = (rearrange(x, "b f n (h d) -> (b f) h n d", h=HEADS) for x in (q, pair(k), pair(v)))
    if scores:
        out = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "(b f) h n d -> b f n (h d)", b=1)


def measure_attention(options: Options) -> dict[str, Any]:
    """Peaks and seconds of three forms, and their ratios to ours."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    shape = (1, options.frames, options.tokens, options.channels)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(options.device, dtype) for _ in range(4)]
    rows = key_frames("first_prev", options.frames)
    forms: dict[str, Callable[..., Tensor]] = {
        "ours": lambda q, k, v: attend(q, k, v, rows, HEADS),
        "concatenated": concatenated,
    }
    if options.tokens <= 512:
        forms["scores"] = lambda q, k, v: concatenated(q, k, v, scores=True)
    results: dict[str, Any] = {}
    for mode in ("sampling", "tuning"):
        passes = {name: _attention_pass(form, tensors, mode == "tuning") for name, form in forms.items()}
        outputs = {name: once() for name, once in passes.items()}
        difference = max(_distance(outputs["ours"], other) for other in outputs.values())
        peak = {name: peak_memory(once, device=options.device).tensors for name, once in passes.items()}
        timed = benchmark(passes, device=options.device, repeats=options.rounds, warmup=1, threads=options.threads)
        results[mode] = {
            "largest_relative_difference": float(f"{difference:.2g}"),
            "megabytes": {name: round(value / 2**20, 1) for name, value in peak.items()},
            "memory_ratio": {name: round(value / peak["ours"], 2) for name, value in peak.items() if name != "ours"},
            "milliseconds": {name: round(1e3 * timed.time(name).median, 1) for name in passes},
            "speedup": {n: round(timed.speedup("ours", n).median, 2) for n in passes if n != "ours"},
        }
    return results


def _attention_pass(form: Callable[..., Tensor], tensors: list[Tensor], tuning: bool) -> Callable[[], list[Tensor]]:
    """One pass from copies of q, k and v, which count; gives the output, or the gradients."""
    *inputs, cotangent = tensors

    def once() -> list[Tensor]:
        if not tuning:
            with torch.no_grad():
                return [form(*(x.clone() for x in inputs))]
        leaves = [x.clone().requires_grad_() for x in inputs]
        return list(torch.autograd.grad(form(*leaves), leaves, cotangent))

    return once


def _distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


# ---------------------------------------------------------------------- the norm over frames
def measure_norm(options: Options) -> dict[str, Any]:
    """Peak and seconds of two forms of the joint group norm, and their ratios to ours."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(options.frames, options.channels, options.tokens, 1, generator=generator).to(options.device)
    norm = FrameGroupNorm(32, options.channels, 1e-5, True, FrameCount(options.frames)).to(options.device)

    def reordered(x: Tensor) -> Tensor:
        video = rearrange(x, "f c h w -> 1 c f h w")
        normed = F.group_norm(video, norm.num_groups, norm.weight, norm.bias, norm.eps)
        # The convolution behind it wants the rows in one piece.
        return rearrange(normed, "1 c f h w -> f c h w").contiguous()

    def once(form: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        def run_once() -> list[Tensor]:
            with torch.no_grad():
                return [form(rows)]

        return run_once

    passes = {"ours": once(norm), "reordered": once(reordered)}
    outputs = {name: run_once() for name, run_once in passes.items()}
    peak = {name: peak_memory(run_once, device=options.device).tensors for name, run_once in passes.items()}
    timed = benchmark(passes, device=options.device, repeats=options.rounds, warmup=1, threads=options.threads)
    return {
        "largest_relative_difference": float(f"{_distance(outputs['ours'], outputs['reordered']):.2g}"),
        "megabytes": {name: round(value / 2**20, 1) for name, value in peak.items()},
        "milliseconds": {name: round(1e3 * timed.time(name).median, 1) for name in passes},
        "speedup": round(timed.speedup("ours", "reordered").median, 2),
    }


# ---------------------------------------------------------------------- a step
def random_parts(options: Options) -> Any:
    """Parts of an image pipeline with random weights."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    if options.size == "sd1":
        unet = UNet2DConditionModel(**ARCHITECTURES["sd1"])
        widths, text = (128, 256, 512, 512), CLIPTextConfig(hidden_size=768, intermediate_size=3072)
        text.num_hidden_layers = text.num_attention_heads = 12
        groups = 32
    else:
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=64,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        widths, groups = (16, 32, 64, 64), 4
        text = CLIPTextConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=groups,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=ddim({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def measure_step(options: Options) -> dict[str, Any]:
    """Seconds of a step under three recipes, and how many times longer the plain ones take."""
    image = random_parts(options).to(options.device)
    side = options.latent * 8
    video = torch.rand(1, options.step_frames, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"video": video.to(options.device), "caption": ["a man is skiing"], "sample_id": ["clip"]}
    recipes = {
        "ours": {},
        "encode": {"cache_latents": False},
        "released": {"cache_latents": False, "gradient_checkpointing": True},
    }
    passes, losses = {}, {}
    for name, recipe in recipes.items():
        # Checkpointing is a setting of a network, so each recipe has one of its own; tensors are shared.
        trainer = TuneAVideoTrainer(image, **recipe).to(options.device).train()
        passes[name] = _step_pass(trainer, batch, options)
        losses[name] = passes[name]()
    timed = benchmark(passes, device=options.device, repeats=options.rounds, warmup=1, threads=options.threads)
    return {
        "frames": options.step_frames,
        "pixels": side,
        "losses": losses,
        "seconds": {name: round(timed.time(name).median, 3) for name in passes},
        "speedup": {n: round(timed.speedup("ours", n).median, 2) for n in passes if n != "ours"},
    }


def _step_pass(trainer: TuneAVideoTrainer, batch: dict[str, Any], options: Options) -> Callable[[], float]:
    def once() -> float:
        torch.manual_seed(1)
        trainer.zero_grad()
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
            loss = trainer.losses(batch)["loss_denoising"]
        loss.backward()
        return loss.item()

    return once


PARTS = {"attention": measure_attention, "norm": measure_norm, "step": measure_step}


def main(argv: list[str]) -> None:
    """Prints the figures, and writes them as JSON where an output is given."""
    options, _ = parse(argv, Options, doc=__doc__)
    torch.set_num_threads(options.threads)
    figures = measure(PARTS, options)
    figures |= {name: getattr(options, name) for name in ("frames", "tokens", "channels", "size", "precision")}
    figures |= conditions(__file__, argv, options)
    publish(figures, options.output)


if __name__ == "__main__":
    run(main)
