"""The stand-in as files: an ordinary Stable Diffusion folder, with the tiny CLIP and the judge beside it.

model_index.json vae/ unet/ text_encoder/ tokenizer/ scheduler/    what diffusers reads
tiny_clip/ judge/                                                  what the evaluation reads
tiny_sd.json                                                       how it was made, and what the checks gave
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from core.checkpoint import load, save_atomic, write_text_atomic
from core.config.files import read_json
from core.data import MissingDataError
from core.errors import ConfigError
from tune_a_video.standin.networks import Judge, TinyCLIP, make_tokenizer, token_ids
from tune_a_video.standin.training import make_scheduler, train_clip, train_judge, train_unet
from tune_a_video.standin.vae import identity_vae
from tune_a_video.standin.world import SIZE, all_words, captions, draw_pictures, words_of_looks

NOTE = "tiny_sd.json"
_PREPARE = "python tools/prepare_data.py paper=tune_a_video task=tiny_sd output=data/tiny_sd"


def build(output: Path, settings: dict[str, Any], check_steps: int) -> dict[str, Any]:
    """Makes what is missing in a folder; see `tune_a_video.data.prepare.tiny_sd`.

    Args:
        output: the folder.
        settings: unet_steps, clip_steps, judge_steps, channels, batch, tower (width of the picture towers), seed; and
            further_steps, where the image model is trained again.
        check_steps: sampling steps of the check of the image model; 0 makes none.

    Returns:
        What the checks gave, as `tiny_sd.json` holds it.

    Raises:
        ConfigError: the folder was made with other settings, or holds something else.
    """
    note = _claim(output, settings)
    seed = settings["seed"]

    def clip(folder: Path) -> None:
        tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
        save_tiny_clip(train_clip(tokenizer, settings["clip_steps"], seed, settings["tower"]), folder)

    def text_encoder(folder: Path) -> None:
        CLIPTextModel.from_pretrained(output / "tiny_clip" / "text").save_pretrained(folder)

    def judge(folder: Path) -> None:
        save_atomic(train_judge(settings["judge_steps"], seed, settings["tower"]).state_dict(), folder / "model.pt")
        write_text_atomic(json.dumps({"width": settings["tower"]}), folder / "config.json")

    def unet(folder: Path, start: UNet2DConditionModel | None = None) -> None:
        tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(output / "text_encoder")
        with torch.no_grad():
            states = encoder(token_ids(tokenizer, [*captions(), ""])).last_hidden_state
        scaling = identity_vae().config.scaling_factor
        steps = settings["unet_steps"] if start is None else settings["further_steps"]
        options = {"steps": steps, "channels": tuple(settings["channels"]), "batch": settings["batch"], "start": start}
        keep = output / ("unet_training.pt" if start is None else "unet_further.pt")
        train_unet(states[:-1], states[-1], scaling, **options, seed=seed, keep=keep).save_pretrained(folder)

    _stage(output / "tokenizer", lambda folder: make_tokenizer(captions()).save_pretrained(folder))
    _stage(output / "tiny_clip", clip)
    _stage(output / "judge", judge)
    _stage(output / "text_encoder", text_encoder)
    _stage(output / "vae", lambda folder: identity_vae().save_pretrained(folder))
    _stage(output / "scheduler", lambda folder: make_scheduler().save_pretrained(folder))
    if "further_steps" in settings:
        first = output / "unet_first"
        _stage(first, unet)
        _stage(output / "unet", lambda folder: unet(folder, UNet2DConditionModel.from_pretrained(first)))
    else:
        _stage(output / "unet", unet)
    write_text_atomic(json.dumps(_INDEX, indent=2), output / "model_index.json")
    for name in ("unet_training.pt", "unet_further.pt"):
        (output / name).unlink(missing_ok=True)
    if check_steps and note["checks"].get("steps") != check_steps:
        note["checks"] = {"steps": check_steps, **check(output, check_steps), **gate(output, check_steps)}
        _write(output, note)
    return note["checks"]


_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _claim(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The folder's note; an error where the folder is something else."""
    path = output / NOTE
    if path.is_file():
        note = read_json(path, keys=("settings", "checks"))
        if note["settings"] != settings:
            raise ConfigError(
                f"{path} says that it was made with {note['settings']}, not {settings}: give an empty output="
            )
        return note
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output} holds other files: give an empty output=")
    note = {"settings": settings, "checks": {}}
    _write(output, note)
    return note


def _write(output: Path, note: dict[str, Any]) -> None:
    write_text_atomic(json.dumps(note, indent=2), output / NOTE)


def _stage(folder: Path, make: Callable[[Path], Any]) -> None:
    """Makes a folder unless it is there; it takes its name when it is whole."""
    if folder.is_dir():
        return
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    make(part)
    os.replace(part, folder)


# ---------------------------------------------------------------------- tiny CLIP and judge
def save_tiny_clip(clip: TinyCLIP, folder: Path) -> None:
    """Writes the tiny CLIP: text tower and tokenizer as transformers does, the picture tower as a file of tensors."""
    clip.text.save_pretrained(folder / "text")
    clip.tokenizer.save_pretrained(folder / "tokenizer")
    save_atomic(
        {"logit_scale": clip.logit_scale.detach(), **clip.pictures.state_dict(prefix="pictures.")},
        folder / "pictures.pt",
    )
    write_text_atomic(json.dumps({"width": clip.width}), folder / "config.json")


def load_tiny_clip(folder: str | os.PathLike) -> TinyCLIP:
    """The tiny CLIP of a stand-in's folder (or of its `tiny_clip`).

    Raises:
        MissingDataError: no such folder; says how to make it.
    """
    folder = _part(folder, "tiny_clip")
    text = CLIPTextModelWithProjection.from_pretrained(folder / "text")
    clip = TinyCLIP(text, CLIPTokenizer.from_pretrained(folder / "tokenizer"), _width(folder))
    own = load(folder / "pictures.pt")
    clip.load_state_dict({**{f"text.{k}": v for k, v in text.state_dict().items()}, **own})
    return clip.eval().requires_grad_(False)


def load_judge(folder: str | os.PathLike) -> Judge:
    """The judge of a stand-in's folder (or of its `judge`).

    Raises:
        MissingDataError: no such folder; says how to make it.
    """
    folder = _part(folder, "judge")
    judge = Judge(_width(folder))
    judge.load_state_dict(load(folder / "model.pt"))
    return judge.eval().requires_grad_(False)


def _width(folder: Path) -> float:
    return read_json(folder / "config.json", keys=("width",))["width"]


def _part(folder: str | os.PathLike, name: str) -> Path:
    folder = Path(folder).expanduser()
    for place in (folder / name, folder):
        if place.name == name and (place / "config.json").is_file():
            return place
    raise MissingDataError(f"{str(folder)!r} holds no {name}: it is part of what this makes\n  {_PREPARE}")


# ---------------------------------------------------------------------- checks
@torch.no_grad()
def check(folder: Path, steps: int = 25, scale: float = 3.0, seed: int = 0) -> dict[str, float]:
    """What the finished folder can do, measured through the pipeline that users would load.

    Args:
        folder: the stand-in.
        steps: of DDIM.
        scale: of classifier-free guidance.
        seed: of latents and of fresh pictures.

    Returns:
        `colour`, `shape`, `background`: share of 36 sampled pictures (two per caption) whose word the judge reads
        right; `clip_top1`: share of 1,024 drawn pictures that the tiny CLIP gives their caption; `judge_colour`, ...:
        share of their looks that the judge reads right; `roundtrip`: largest error of the autoencoder on them.
    """
    judge, clip = load_judge(folder), load_tiny_clip(folder)
    generator = torch.Generator().manual_seed(seed)
    pipeline, shares = _shown(folder, judge, 2, steps, scale, generator)
    pictures, looks = draw_pictures(1024, generator)
    right = judge.looks(pictures) == looks
    similar = _cosines(clip.picture_vectors(pictures), clip.text_vectors(captions()))
    given = torch.tensor(all_words())[similar.argmax(1)]
    vae = pipeline.vae
    bounded = pictures.clamp(-1, 1)
    again = vae.decode(vae.encode(bounded).latent_dist.mode()).sample
    heads = ("colour", "shape", "background")
    return {
        **dict(zip(heads, shares, strict=True)),
        "clip_top1": (given == words_of_looks(looks)).all(1).float().mean().item(),
        **{f"judge_{head}": share for head, share in zip(heads, right.float().mean(0).tolist(), strict=True)},
        "roundtrip": (again - bounded).abs().max().item(),
    }


#: Least share of sampled pictures that show each word, for a base under which claims are asked.
GATE = 0.98


@torch.no_grad()
def gate(folder: Path, steps: int = 25, scale: float = 2.0, seed: int = 1) -> dict[str, float]:
    """Whether the image model shows the words that it is asked for, at the guidance of the experiments.

    Args:
        folder: the stand-in.
        steps: of DDIM.
        scale: of classifier-free guidance.
        seed: of latents.

    Returns:
        `gate_colour`, `gate_shape`, `gate_background`: share of 180 sampled pictures (ten per caption) whose word
        the judge reads right; `gate`: 1 where each is at least `GATE`, else 0.
    """
    _, shares = _shown(folder, load_judge(folder), 10, steps, scale, torch.Generator().manual_seed(seed))
    named = dict(zip(("gate_colour", "gate_shape", "gate_background"), shares, strict=True))
    return {**named, "gate": float(min(shares) >= GATE)}


def _shown(
    folder: Path, judge: Judge, each: int, steps: int, scale: float, generator: torch.Generator
) -> tuple[Any, list[float]]:
    """The pipeline of a folder, and the share of its pictures, `each` of every caption, with the right word a head."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    wanted = [words for words in all_words() for _ in range(each)]
    options = {"num_inference_steps": steps, "guidance_scale": scale, "generator": generator, "output_type": "pt"}
    sampled = pipeline([words.caption for words in wanted], height=SIZE, width=SIZE, **options).images
    read = words_of_looks(judge.looks(2 * sampled - 1)) == torch.tensor(wanted)
    return pipeline, read.float().mean(0).tolist()


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
