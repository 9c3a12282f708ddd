"""Published weights of every paper: converted, tested, looked at, trained from, and converted back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import seqgan.checkpoint
import slot_walks.checkpoint
import stvit.checkpoint
import tune_a_video.checkpoint
from core.config import compose
from core.engine.commands.convert import Options, convert_file
from core.engine.commands.evaluation import evaluate
from core.engine.commands.inference import infer
from core.engine.launch import build_trainer, run
from core.errors import ConfigError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def randomised(words: list[str]) -> nn.Module:
    """The trainer of a config with other weights than a fresh one has, in all that it keeps."""
    trainer = build_trainer(compose(words, "configs"))
    torch.manual_seed(7)
    kept = trainer.state_dict().keys()
    with torch.no_grad():
        for name, parameter in trainer.named_parameters():
            if name in kept:
                parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return trainer


def looked_at(words: list[str], checkpoint: str, source: str | None, output: str) -> list[dict]:
    """Records without the folder that their files lie in, and the pixels of their pictures."""
    options = SimpleNamespace(checkpoint=checkpoint, input=source, output=output, device="cpu", config_dir="configs")
    records = infer(words, options)
    assert records and not any("error" in record for record in records)
    for record in records:
        for name, path in record["pictures"].items():
            with Image.open(path) as picture:
                record["pictures"][name] = (Path(path).name, picture.convert("RGB").tobytes())
        for name, path in record.pop("arrays", {}).items():
            with np.load(path) as arrays:
                record[name] = {key: arrays[key].tolist() for key in arrays.files}
        record.pop("page", None)
    return json.loads(json.dumps(records, default=str).replace(output, "OUT"))


def prove(
    paper: str,
    words: list[str],
    revert: Callable[..., dict],
    *,
    dst: str = "weights.safetensors",
    source: str | None = None,
    whole: bool = True,
    wrap: Callable[[dict], object] = lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3},
    **layout: str,
) -> None:
    """Published -> ours -> test, infer, training -> published, against the same weights loaded directly."""
    trainer = randomised(words)
    published = revert(trainer.inference_network().state_dict(), **layout)
    torch.save(wrap(published), "published.pth")
    torch.save(trainer.state_dict(), "whole.pt")
    experiment = next(word.partition("=")[2] for word in words if word.startswith("experiment="))
    rest = [word for word in words if not word.startswith("experiment=")]
    options = Options(paper, "published.pth", dst, experiment=experiment, config_dir="configs")
    convert_file(options, overrides=rest)

    config = compose(words, "configs")
    direct = evaluate(config, "whole.pt")
    assert direct and evaluate(config, dst) == direct
    seen = looked_at(words, "whole.pt", source, "one")
    assert looked_at(words, dst, source, "one") == seen
    torch.save(build_trainer(compose(words, "configs")).state_dict(), "fresh.pt")
    assert looked_at(words, "fresh.pt", source, "one") != seen, "the weights do not matter to what is shown"

    result = run(compose([*words, f"load_from={dst}", "run_dir=run"], "configs"))
    assert result["metrics"] == direct
    convert_file(Options(paper, "run", "back.pt", reverse=True), dict(layout))
    back = torch.load("back.pt", weights_only=True)
    assert len(back) == (len(published) if whole else len(trainer.state_dict()))
    assert all(torch.equal(published[name], value) for name, value in back.items())
    if layout:
        return
    with pytest.raises(ConfigError, match="name its experiment"):
        infer([], SimpleNamespace(checkpoint=dst, input=source, output="two", device="cpu"))


def untrained(*words: str) -> list[str]:
    """Words of a run that changes no weight and keeps them."""
    return [*words, "runtime=cpu", "runs_dir=runs", "++train_cfg.max_epochs=null", "++train_cfg.max_steps=0"]


def configs(name: str, text: str) -> None:
    folder = Path("configs/experiment/mine")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(f"# @package _global_\nname: mine/{name}\n{text}")


@pytest.fixture
def picture() -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.png")
    return "picture.png"


# ---------------------------------------------------------------------- papers
def test_stvit(picture: str) -> None:
    Path("configs").mkdir()
    words = untrained("experiment=stvit/digits", "model.network.embed_dim=16", "custom_hooks.media.max_items=1")
    prove("stvit", words, stvit.checkpoint.revert, source=picture)


def test_slot_walks(picture: str) -> None:
    Path("configs").mkdir()
    backbone = "{type: slot_walks.DinoViT, img_size: 64, patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}"
    words = untrained("experiment=slot_walks/blobworld", "test_dataloader.dataset.count=6", "~model.network.backbone")
    words += [f"+model.network.backbone={backbone}", "train_dataloader.dataset.count=16"]
    prove("slot_walks", words, slot_walks.checkpoint.revert, source=picture, dst="weights.pt", layout="official")

    own = build_trainer(compose([*words, "+model.network.backbone.weights=weights.pt"])).network.backbone.state_dict()
    converted = torch.load("weights.pt", weights_only=True)
    assert own and all(torch.equal(converted[f"backbone.{name}"], value) for name, value in own.items())


def test_tune_a_video() -> None:
    from tests.tune_a_video.random_sd import make_pipeline
    from tune_a_video.data.video_io import save_video

    Path("configs").mkdir()
    make_pipeline().save_pretrained("sd")
    save_video(torch.rand(3, 6, 16, 16, generator=torch.Generator().manual_seed(0)), "clip.mp4")
    words = untrained("experiment=tune_a_video/man_skiing", "model.base=sd", "train_dataloader.dataset.path=clip.mp4")
    words += ["train_dataloader.dataset.prompt=a man", "train_dataloader.dataset.size=16", "model.n_frames=3"]
    words += ["model.prompts=[a cat]", "model.sample.steps=2", "+model.clip={size: 16, n_frames: 3}"]
    prove("tune_a_video", words, tune_a_video.checkpoint.revert, source="clip.mp4", whole=False, layout="official")

    state = randomised(words).state_dict()  # of trained tensors alone, as the others are the base's
    torch.save({name.removeprefix("network."): value for name, value in state.items()}, "delta.pt")
    network = build_trainer(compose(words)).network
    network.load_delta("weights.safetensors")
    assert all(torch.equal(network.state_dict()[name.removeprefix("network.")], state[name]) for name in state)
    assert len(state) == 36 and evaluate(compose(words), "delta.pt") == evaluate(compose(words), "whole.pt")


DATA = "{type: seqgan.ShapeGlyphs, split: test, seed: 0, count: 6}"
SMALL = "ch: 32, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [12], z_channels: 16, embed_dim: 8"
TOKENIZER = f"{{type: seqgan.vqgan_tokenizer, codebook_size: 16, resolution: 24, {SMALL}}}"
ENDS = f"""
train_dataloader: {{batch_size: 2, dataset: {DATA}}}
test_dataloader: {{batch_size: 3, dataset: {DATA}}}
train_cfg: {{max_steps: 0, max_epochs: null}}
optim_wrapper: {{type: core.OptimWrapper, optimizer: {{type: torch.optim.Adam, lr: 1.0e-3}}}}
"""


def test_seqgans_tokenizer(picture: str) -> None:
    model = f"model: {{type: seqgan.TokenizerTrainer, input_shape: [3, 24, 24], network: {TOKENIZER}}}"
    configs("tokenizer", f"{model}{ENDS}test_evaluator: {{type: seqgan.TokenizerQuality, codebook_size: 16}}\n")
    words = ["experiment=mine/tokenizer", "runtime=cpu", "runs_dir=runs"]
    prove("seqgan", words, seqgan.checkpoint.revert, source=picture, layout="reference")


def test_seqgans_transformer_with_a_tokenizer_of_its_own_file() -> None:
    network = (
        "{type: seqgan.ARTransformer, codebook_size: 16, num_classes: 10, length: 144, dim: 16, depth: 1, num_heads: 2}"
    )
    model = f"{{type: seqgan.TransformerTrainer, network: {network}, tokenizer: {TOKENIZER}}}"
    evaluator = "test_evaluator: {type: seqgan.CodePredictability}\n"
    configs(
        "transformer", f"model: {model}\nload_from: {{path: null, into: tokenizer, prefix: network.}}{ENDS}{evaluator}"
    )
    words = ["experiment=mine/transformer", "runtime=cpu", "runs_dir=runs", "load_from=null"]
    trainer = randomised(words)
    torch.save(trainer.state_dict(), "whole.pt")
    for name in ("network", "tokenizer"):
        published = seqgan.checkpoint.revert(trainer.get_submodule(name).state_dict())
        torch.save({"state_dict": published}, f"{name}.ckpt")
        options = Options("seqgan", f"{name}.ckpt", f"{name}.safetensors", experiment="mine/transformer", into=name)
        options.config_dir = "configs"
        convert_file(options, overrides=["load_from=null"])

    direct = evaluate(compose(words, "configs"), "whole.pt")
    alone = evaluate(compose(words, "configs"), "network.safetensors")
    assert alone != direct, "a random tokenizer gives other codes"
    words[-1] = "load_from.path=tokenizer.safetensors"
    assert evaluate(compose(words, "configs"), "network.safetensors") == direct
    drawn = [*words, "+model.request={type: seqgan.SampleRequest, count: 2}"]
    assert looked_at(drawn, "network.safetensors", None, "one") == looked_at(drawn, "whole.pt", None, "one")

    both = "+load_from=[{path: tokenizer.safetensors, into: tokenizer}, network.safetensors]"
    assert run(compose([*words[:-1], "~load_from", both, "run_dir=run"], "configs"))["metrics"] == direct
    convert_file(Options("seqgan", "run", "back.pt", reverse=True))
    theirs = torch.load("network.ckpt", weights_only=True)["state_dict"]
    back = torch.load("back.pt", weights_only=True)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], value) for name, value in theirs.items())
