"""Learned features for the digit scenes: a small ViT that learns from unlabelled scenes, and the note of what it gave.

vit.pt          weights of a `slot_walks.DinoViT`, as `model.network.backbone.weights` takes them
digit_vit.json  how it was trained, its error on other scenes, and the distribution of cosines of its features
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.checkpoint import save_atomic, write_text_atomic
from core.config.files import read_json
from core.engine.state.randomness import fixed_randomness
from core.errors import ConfigError
from core.optim import schedules
from core.output.progress import Progress
from slot_walks.metrics.diagnostics import token_labels
from slot_walks.models import DinoViT, MaskedAutoencoder
from slot_walks.standin.digit_scenes import DigitScenes

NOTE, WEIGHTS = "digit_vit.json", "vit.pt"
#: Of the ViT: 0.2 M parameters on 64 x 64 pixels, features of 64 channels on 16 x 16 patches.
ARCHITECTURE = {"img_size": 64, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
_RATE, _WARMUP = 2e-3, 100


def build(output: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Trains the ViT into a folder unless it is there; see `slot_walks.data.prepare.digit_vit`.

    Args:
        output: the folder.
        settings: steps, scenes, batch, mask_ratio, seed.

    Returns:
        What the check gave: see `check`.

    Raises:
        ConfigError: the folder was made with other settings, or holds something else.
    """
    note = output / NOTE
    if note.is_file():
        record = read_json(note, keys=("settings", "checks"))
        if record["settings"] != settings:
            raise ConfigError(f"{note} says that {output} was made with {record['settings']}: give an empty output=")
        if (output / WEIGHTS).is_file():
            return record["checks"]
    elif output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output} holds other files: give an empty output=")
    model = train(**settings)
    checks = check(model, settings["seed"])
    save_atomic(model.encoder.state_dict(), output / WEIGHTS)
    write_text_atomic(json.dumps({"settings": settings, "checks": checks}, indent=1) + "\n", note)
    return checks


def train(steps: int, scenes: int, batch: int, mask_ratio: float, seed: int) -> MaskedAutoencoder:
    """A masked autoencoder after training: AdamW, rate 2e-3 after 100 steps of warm-up, then half a cosine to 0.

    Args:
        steps: updates.
        scenes: training scenes of `DigitScenes` with this seed; their labels are not read.
        batch: scenes in an update.
        mask_ratio: share of the patches that are masked.
        seed: of scenes, weights, batches and masks.
    """
    images = _images(DigitScenes("train", count=scenes, seed=seed))
    with fixed_randomness(seed):
        model = MaskedAutoencoder(DinoViT(**ARCHITECTURE), mask_ratio)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.05)
        for step in Progress().over(range(steps), "masked autoencoder"):
            rate = schedules.warmup_cosine(step + 1, total=steps, lr=_RATE, warmup=min(_WARMUP, steps // 4))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            model(images[torch.randint(len(images), (batch,))]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


@torch.no_grad()
def check(model: MaskedAutoencoder, seed: int, count: int = 80) -> dict[str, float]:
    """What the ViT has learned, on scenes of the validation split.

    Args:
        model: after training.
        seed: of the scenes and masks.
        count: of scenes.

    Returns:
        `error`: mean squared error of masked pixels, and `error_of_mean`, that of each scene's mean colour, for values
        in [0, 1]; `unlike_p90`: the cosine below which 90 % of the pairs of patches of two objects, or of object and
        ground, lie; `alike_p10`: that above which 90 % of the pairs of one object lie. The threshold of the P-W-P walk
        belongs between the two; labels are read for nothing else.
    """
    scenes = DigitScenes("val", count=count, seed=seed)
    images = _images(scenes)
    error = model(images, torch.Generator().manual_seed(seed))
    mean = (images - images.mean(dim=(2, 3), keepdim=True)).square().mean()
    labels = token_labels(torch.from_numpy(scenes.instances.astype("int64")), model.encoder.grid(images))
    alike, unlike = pair_cosines(model.encoder(images), labels)
    return {
        "error": error.item(),
        "error_of_mean": mean.item(),
        "unlike_p90": unlike.quantile(0.9).item(),
        "alike_p10": alike.quantile(0.1).item(),
    }


def pair_cosines(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of pairs of different patches within each scene: those of one object, and those of two.

    Args:
        features: `(B, N, C)`.
        labels: of the patches `(B, N)`, 0 for ground, which counts as one more object among the second pairs; pairs of
            two patches of ground are in neither.

    Returns:
        `(P,)` and `(Q,)`, each pair once.
    """
    parts = F.normalize(features, dim=2)
    first, second = torch.triu_indices(parts.shape[1], parts.shape[1], offset=1, device=parts.device)
    cosines = (parts @ parts.transpose(1, 2))[:, first, second]
    one, two = labels[:, first], labels[:, second]
    return cosines[(one == two) & (one > 0)], cosines[one != two]


def _images(scenes: DigitScenes) -> Tensor:
    """All images of drawn scenes, `(n, 3, size, size)`."""
    return torch.from_numpy(scenes.images.transpose(0, 3, 1, 2).copy())
