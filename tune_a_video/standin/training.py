"""Training of the stand-in's networks on pictures that are drawn as they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from core.checkpoint import load, save_atomic
from core.engine.state.randomness import fixed_randomness
from core.optim.ema import ratio_decay
from core.optim.schedules import warmup_cosine
from core.output.progress import Progress
from tune_a_video.standin.networks import WIDTH, Judge, TinyCLIP, text_config
from tune_a_video.standin.world import SIZE, caption_numbers, captions, draw_pictures

_KEEP_EVERY = 100  # steps of the diffusion model between two saved states


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels, predicted as v."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_unet(channels: tuple[int, int] = (32, 64)) -> UNet2DConditionModel:
    """The image model: two levels, text attention at the lower one; 1,001,251 parameters by default."""
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        attention_head_dim=2,  # diffusers means the number of heads
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    )


def train_clip(tokenizer: CLIPTokenizer, steps: int = 700, seed: int = 0, width: float = 1.0) -> TinyCLIP:
    """A text encoder and a picture tower that agree: each picture is classified among the 18 captions.

    Args:
        tokenizer: of the captions.
        steps: of AdamW at 2e-3 with batches of 64.
        seed: of weights and pictures.
        width: of the picture tower.
    """
    with fixed_randomness(seed):
        model = TinyCLIP(CLIPTextModelWithProjection(text_config(tokenizer)), tokenizer, width)
    sentences = captions()

    def loss(pictures: Tensor, looks: Tensor) -> Tensor:
        vectors = F.normalize(model.picture_vectors(pictures), dim=1)
        scores = vectors @ F.normalize(model.text_vectors(sentences), dim=1).T
        return F.cross_entropy(model.logit_scale.exp() * scores, caption_numbers(looks))

    _fit(model, loss, steps, 2e-3, seed, "text encoder")
    return model.eval()


def train_judge(steps: int = 600, seed: int = 0, width: float = 1.0) -> Judge:
    """The judge of looks, on pictures that are partly blurred and noised, as generated ones are.

    Args:
        steps: of AdamW at 3e-3 with batches of 64.
        seed: of weights and pictures.
        width: of its tower.
    """
    with fixed_randomness(seed + 1):
        judge = Judge(width)
    generator = torch.Generator().manual_seed(9000 + seed)

    def loss(pictures: Tensor, looks: Tensor) -> Tensor:
        scores = judge(degrade(pictures, generator))
        return sum(F.cross_entropy(s, looks[:, head]) for head, s in enumerate(scores))

    _fit(judge, loss, steps, 3e-3, seed + 1, "judge")
    return judge.eval()


def degrade(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W), three of ten mixed with up to half their 3 x 3 mean, all with noise of up to 0.15."""
    count = len(pictures)
    mean = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    chosen = torch.rand(count, 1, 1, 1, generator=generator) < 0.3
    share = 0.5 * torch.rand(count, 1, 1, 1, generator=generator) * chosen
    deviation = 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
    return torch.lerp(pictures, mean, share) + deviation * torch.randn(pictures.shape, generator=generator)


def _fit(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], steps: int, rate: float, seed: int, name: str
) -> None:
    """AdamW on batches of 64 drawn pictures, with a warm-up of 50 steps, a cosine, and gradients clipped to 1."""
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for step in Progress().over(range(steps), name):
        _set_rate(optimizer, warmup_cosine(step + 1, total=steps, lr=rate, warmup=50))
        value = loss(*draw_pictures(64, generator))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def train_unet(
    states: Tensor,
    nothing: Tensor,
    scaling_factor: float,
    steps: int = 2500,
    channels: tuple[int, int] = (32, 64),
    batch: int = 32,
    seed: int = 0,
    keep: Path | None = None,
    start: UNet2DConditionModel | None = None,
) -> UNet2DConditionModel:
    """The image model: v-prediction of fresh pictures, one in ten without its caption.

    AdamW 2e-3, betas 0.9 and 0.99, weight decay 0.01, warm-up of 100 steps, cosine to 2 %, gradients clipped to 1; the
    result is the average of the weights. From a model that was trained before the rate is 1e-3.

    Args:
        states: text states of the captions (18, L, d).
        nothing: text states of the empty caption (L, d).
        scaling_factor: of the pictures, as the autoencoder's config has it.
        steps: of training.
        channels: of the two levels.
        batch: pictures of a step.
        seed: of weights, pictures and noise.
        keep: file of the state, written every 100 steps; training goes on from it, to the same weights.
        start: a model that is trained further; None: a new one.
    """
    with fixed_randomness(seed + 2):
        unet = make_unet(channels)
    if start is not None:
        unet.load_state_dict(start.state_dict())
    rate = 2e-3 if start is None else 1e-3
    average = copy.deepcopy(unet).requires_grad_(False)
    levels = make_scheduler().alphas_cumprod
    # Further training sees pictures of its own: 3000 is as far from 2000 as seeds go.
    generator = torch.Generator().manual_seed((2000 if start is None else 3000) + seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    begin = 0
    if keep is not None and keep.is_file():
        state = load(keep)
        begin = state["step"]
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    progress = Progress()
    progress.begin("image model", steps, begin)
    for step in range(begin, steps):
        _set_rate(optimizer, warmup_cosine(step + 1, total=steps, lr=rate, warmup=100, min_lr=rate / 50))
        pictures, looks = draw_pictures(batch, generator)
        text = states[caption_numbers(looks)].clone()
        text[torch.rand(batch, generator=generator) < 0.1] = nothing
        clean = scaling_factor * pictures
        times = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        signal, sigma = (part[times, None, None, None].sqrt() for part in (levels, 1 - levels))
        predicted = unet(signal * clean + sigma * noise, times, text).sample
        loss = F.mse_loss(predicted, signal * noise - sigma * clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        weight = 1 - ratio_decay(step, 0.997)
        torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), weight)
        progress.advance("image model")
        progress.note("image model", f"loss {loss.item():.3f}")
        if keep is not None and (step + 1) % _KEEP_EVERY == 0:
            modules = {"unet": unet, "average": average, "optimizer": optimizer}
            state = {name: module.state_dict() for name, module in modules.items()}
            save_atomic({"step": step + 1, "generator": generator.get_state(), **state}, keep)
    progress.end("image model")
    return average.eval()
