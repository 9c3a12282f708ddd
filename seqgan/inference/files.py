"""What `tools/infer.py` writes: samples, completed pictures, predictions of codes, and reconstructions.

python tools/infer.py checkpoint=RUN output=out                       # samples of all classes
python tools/infer.py checkpoint=RUN output=out input=labels.txt      # of these classes
python tools/infer.py checkpoint=RUN output=out input=request.json    # {"labels": [1], "count": 8}
python tools/infer.py checkpoint=RUN output=out input=photos          # completes pictures
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.config.files import read_text
from core.config.registry import check_values
from core.data import load_image
from core.errors import ConfigError, nearest
from core.trainer import Inference
from seqgan.inference.generation import Generator, spread_labels
from seqgan.inference.pictures import code_colours, code_maps, from_pixels, grid, strips, to_pixels
from seqgan.metrics.diagnostics import teacher_forced
from seqgan.models import ARTransformer, Tokenizer

REQUESTS = (".json", ".txt")
_SHOWN = 100  # pictures in a grid


@dataclass(frozen=True)
class SampleRequest:
    """What is to be made.

    Attributes:
        labels: classes, taken in turns; None: all classes, as evenly as possible.
        count: images; None: one for each label, or 16.
        seed: of all noise.
        batch: images at a time.
        first: number of the first image: several calls can share the images of one seed.
        singles: a PNG of every image besides the grid and the NPZ file.
        keep: what of a picture is kept: `upper` (its upper half); shares of its sides `[top, left, bottom, right]`, the
            rectangle outside of which is kept; or the file of a mask, white where the picture is to be made anew.
        paste: put kept pixels back in place of their reconstruction.
        tokenizer: run folder of another tokenizer with the same codes, e.g. of the second phase, whose decoder is used.

    Raises:
        ConfigError: a field that is of another kind, out of range, or empty.
    """

    labels: Sequence[int] | None = None
    count: int | None = None
    seed: int = 0
    batch: int = 16
    first: int = 0
    singles: bool = True
    keep: str | Sequence[float] | None = None
    paste: bool = True
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        numbers = {"count": (self.count, 1), "seed": (self.seed, 0), "batch": (self.batch, 1), "first": (self.first, 0)}
        for name, (value, least) in numbers.items():
            if not (name == "count" and value is None) and not (_whole(value) and value >= least):
                raise ConfigError(f"request.{name}={value!r}: a whole number, {least} or more")
        for name, value in (("singles", self.singles), ("paste", self.paste)):
            if not isinstance(value, bool):
                raise ConfigError(f"request.{name}={value!r}: true or false")
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            raise ConfigError(f"request.tokenizer={self.tokenizer!r}: the folder of a run")
        labels = self.labels
        if labels is not None:
            if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(map(_whole, labels)):
                raise ConfigError(f"request.labels={labels!r}: a list of classes, [0, 3]")
            if not len(labels):
                raise ConfigError("request.labels=[] asks for no image: name a class, or null for all of them")

    def classes(self, num_classes: int) -> list[int]:
        """The label of every image."""
        count = self.count if self.count is not None else 16 if self.labels is None else len(self.labels)
        if self.labels is None:
            return spread_labels(count, num_classes)
        return [int(self.labels[i % len(self.labels)]) for i in range(count)]


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def read_request(file: Path, base: SampleRequest) -> SampleRequest:
    """`base`, changed by a file: JSON with fields of `SampleRequest`, or text with the label of every image.

    Raises:
        ConfigError: neither, an unknown field, or a value that suits none.
    """
    text = read_text(file)
    try:
        changes = {"labels": [int(word) for word in text.split()]} if file.suffix == ".txt" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: neither labels (.txt) nor JSON of a request: {error}") from None
    known = [field.name for field in dataclasses.fields(SampleRequest)]
    for name in changes if isinstance(changes, dict) else [str(changes)[:40]]:
        if name not in known:
            raise ConfigError(f"{file}: '{name}'{nearest(name, known)} is no part of a request ({', '.join(known)})")
    check_values(SampleRequest, changes, where=str(file))
    if changes.get("labels") is not None:
        changes.setdefault("count", None)  # a list of labels says how many
    try:
        return dataclasses.replace(base, **changes)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def tokenizer_of(run: str | Path) -> Tokenizer:
    """The tokenizer of a finished run, with its weights (averaged ones where the run has them).

    Args:
        run: folder of a run that trained a tokenizer, or of its checkpoint's file.

    Raises:
        ConfigError: no such run, or it has no tokenizer.
    """
    from core.checkpoint.run_folder import find_checkpoint
    from core.checkpoint.weights import load_weights
    from core.config.registry import build
    from core.engine.run.config import stored_config

    checkpoint = find_checkpoint(run)
    config = checkpoint.parents[1] / "config.yaml"
    model = (stored_config(config.parent) or {}).get("model")
    if not isinstance(model, dict):
        raise ConfigError(f"tokenizer={run}: there is no {config}, or it is damaged: give the folder of a run")
    name = "tokenizer" if model.get("tokenizer") else "network"
    tokenizer = build(model.get(name))
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"tokenizer={run}: model.{name} is a {type(tokenizer).__name__}, not a tokenizer")
    load_weights(tokenizer, checkpoint, prefix=f"{name}.")
    return tokenizer.eval()


# ---------------------------------------------------------------------- samples
def samples(generator: Generator, request: SampleRequest) -> Inference:
    """Pictures `grid` and, each image alone, `0000`, `0001`, ...; all of them as an NPZ file of ADM's evaluation.

    The file is `samples_NxHxWx3.npz`, or begins with the name of the input, and has `arr_0`, uint8 `(N, H, W, 3)`, and
    `arr_1`, the labels.
    """
    labels = request.classes(generator.transformer.num_classes)
    images = generator.sample(labels, request.seed, request.batch, request.first)
    pictures: dict[str, Any] = {"grid": grid(images[:_SHOWN])}
    if request.singles:
        pictures |= {f"{request.first + i:04d}": image for i, image in enumerate(images)}
    record = {
        "labels": labels,
        "seed": request.seed,
        "first": request.first,
        "sampler": {"type": type(generator.sampler).__name__, **dataclasses.asdict(generator.sampler)},
        "size": list(images.shape[1:3]),
    }
    name = "x".join(map(str, images.shape))
    return Inference(record, pictures, {name: {"arr_0": images, "arr_1": np.array(labels, dtype=np.int64)}})


# ---------------------------------------------------------------------- pictures of a user
def square(file: Path, side: int) -> Tensor:
    """A picture's middle square, resized, `(3, side, side)` in [-1, 1]."""
    image = load_image(file)
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    small = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return from_pixels(np.asarray(small)[None])[0]


def hidden_pixels(keep: str | Sequence[float], side: int) -> Tensor:
    """Where a picture is made anew, bool `(side, side)`; see `SampleRequest.keep`.

    Raises:
        ConfigError: no such word or file, or no rectangle within the picture.
    """
    hidden = torch.zeros(side, side, dtype=torch.bool)
    if not isinstance(keep, str):
        numbers = len(keep) == 4 and all(isinstance(share, int | float) for share in keep)
        if not numbers or not (0 <= keep[0] < keep[2] <= 1 and 0 <= keep[1] < keep[3] <= 1):
            raise ConfigError(f"keep={list(keep)}: four shares between 0 and 1: top, left, bottom, right")
        top, left, bottom, right = (round(share * side) for share in keep)
        hidden[top:bottom, left:right] = True
    elif keep == "upper":
        hidden[side // 2 :] = True
    elif Path(keep).is_file():
        hidden = (square(Path(keep), side) > 0).any(dim=0)
    else:
        raise ConfigError(f"keep={keep}: neither 'upper', four shares, nor the file of a mask")
    if not hidden.any():
        raise ConfigError(f"keep={keep}: nothing is left to be made")
    return hidden


def complete_picture(generator: Generator, file: Path, request: SampleRequest) -> Inference:
    """A user's picture, what is kept of it (grey elsewhere), and completions; the label of each is in the record."""
    side = image_side(generator)
    image = square(file, side)
    hidden = hidden_pixels(request.keep or "upper", side)
    labels = request.classes(generator.transformer.num_classes)
    made = generator.complete(image, hidden, labels, request.seed, request.batch, paste=request.paste)
    own = to_pixels(image[None])
    kept = np.where(hidden[None, ..., None].numpy(), np.uint8(127), own)
    record = {
        "labels": labels,
        "seed": request.seed,
        "hidden_pixels": round(hidden.float().mean().item(), 4),
        "size": [side, side],
    }
    pictures = {"completed": grid(np.concatenate([own, kept, made]))}
    if request.singles:
        pictures |= {f"completed_{i:04d}": picture for i, picture in enumerate(made)}
    return Inference(record, pictures)


@torch.no_grad()
def predict_picture(generator: Generator, file: Path, request: SampleRequest) -> Inference:
    """How predictable a picture's codes are (section 3.2): picture, reconstruction and decoded predictions."""
    model = generator.transformer
    if not isinstance(model, ARTransformer):
        raise ConfigError("predictions of codes from those before them need an autoregressive transformer")
    side = image_side(generator)
    image = square(file, side)[None].to(generator.device)
    label = None
    if model.num_classes > 1:
        if request.labels is None:
            raise ConfigError("the transformer needs the picture's class: give it as model.request.labels=[...]")
        label = torch.tensor(request.classes(model.num_classes)[:1], device=generator.device)
    codes = generator.tokenizer.encode(image)
    found = teacher_forced(model, codes.flatten(1), label)
    decoded = [generator.tokenizer.decode(part) for part in (codes, found.predicted.view_as(codes))]
    record = {
        "label": None if label is None else int(label[0]),
        "bits_per_code": round(found.bits.item(), 4),
        "bits_per_pixel": round(found.bits.item() * codes[0].numel() / side**2, 5),
        "top1": round(found.accuracy.item(), 4),
        "codes": codes[0].tolist(),
    }
    return Inference(record, {"predicted": strips(*(to_pixels(part) for part in (image, *decoded)))})


@torch.no_grad()
def image_side(generator: Generator) -> int:
    """Side of the images that the transformer's codes make."""
    side = math.isqrt(generator.transformer.length)
    codes = torch.zeros(1, side, side, dtype=torch.long, device=generator.device)
    return generator.tokenizer.decode(codes).shape[-1]


@torch.no_grad()
def reconstruct_picture(tokenizer: Tokenizer, file: Path, side: int | None, device: torch.device) -> Inference:
    """A user's picture, its reconstruction and the map of its codes, side by side.

    Args:
        tokenizer: in eval mode.
        file: picture.
        side: its middle square is brought to this side; None: as it is, cut to a multiple of 16.
        device: of the tokenizer.
    """
    if side is None:
        whole = load_image(file)
        width, height = (extent - extent % 16 for extent in whole.size)
        if not width or not height:
            raise ValueError(f"{file} has {whole.width} x {whole.height} pixels: at least 16 x 16 are needed")
        image = from_pixels(np.asarray(whole.crop((0, 0, width, height)))[None])
    else:
        image = square(file, side)[None]
    image = image.to(device)
    made, indices, _ = tokenizer(image)
    difference = (made.clamp(-1, 1) - image).float()
    record = {
        "size": list(image.shape[-2:]),
        "psnr": round(10 * math.log10(4 / max(difference.square().mean().item(), 1e-10)), 3),
        "l1": round(difference.abs().mean().item(), 5),
        "unique_codes": len(indices.unique()),
        "codes": indices[0].tolist(),
    }
    return Inference(record, {"reconstruction": reconstructions(tokenizer, image, made, indices)})


def reconstructions(tokenizer: Tokenizer, image: Tensor, made: Tensor, indices: Tensor) -> np.ndarray:
    """A row for every image `(B, 3, H, W)`: itself, its reconstruction, its codes; uint8 `(height, width, 3)`."""
    colours = code_colours(tokenizer.quantizer.embedding.weight)
    return strips(to_pixels(image), to_pixels(made), code_maps(indices, colours, tuple(image.shape[-2:])))
