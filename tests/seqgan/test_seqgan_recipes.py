"""Recipes of the paper at a reduced size: both phases with a discriminator, then a transformer from the first phase."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import compose, experiments, to_dict
from core.errors import ConfigError
from core.launch import _checked, run

SMALL_TOKENIZER = {"filters": 32, "multipliers": "[1,1]", "num_res_blocks": 1, "codebook_size": 16, "z_dim": 8}


def network(place: str) -> list[str]:
    return [f"++{place}.{key}={value}" for key, value in SMALL_TOKENIZER.items()]


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    folder = tmp_path / "ffhq" / "00000"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = np.kron(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(pixels).save(folder / f"{number:05d}.png")
    return folder.parent


def tokenizer_words(faces: Path, tmp_path: Path) -> list[str]:
    return [
        "experiment=seqgan/ffhq256_tokenizer",
        f"runs_dir={tmp_path}/runs",
        f"train_dataloader.dataset.root={faces}",
        "+train_dataloader.dataset.count=null",
        "+train_dataloader.dataset.val_count=4",
        "train_dataloader.dataset.transform.size=32",
        "train_dataloader.batch_size=4",
        "train_dataloader.num_workers=0",
        *network("model.network"),
        "model.discriminator.image_size=32",
        "+model.discriminator.channels={4: 8, 8: 8, 16: 4, 32: 4}",
        # A small classifier of timm in VGG's place, by keys alone.
        "model.perceptual.network.type=seqgan.classifier",
        "+model.perceptual.network.library=timm",
        "+model.perceptual.network.name=resnet10t",
        "model.perceptual.network.weights=null",
        "+model.perceptual.network.taps={relu5_3: layer4, logit: ''}",
        "model.perceptual.low=[relu5_3]",
        "train_cfg.max_steps=2",
        "stages.1.train_cfg.max_steps=2",
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("checkpoints/step_*2.pt")
    state = torch.load(file, weights_only=False)
    return {**state["model"], **state["hooks"]["EMAHook"]["average"]}


def test_both_phases_and_a_transformer_beside_the_second(faces, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(compose(tokenizer_words(faces, tmp_path)))
    (made,) = (tmp_path / "runs" / "seqgan" / "ffhq256_tokenizer").glob("*/")
    first, second = weights(made / "stage_0_tokenizer1"), weights(made / "stage_1_tokenizer2")
    codes = [name for name in first if name.startswith(("network.encoder", "network.quantizer"))]
    assert codes and all(torch.equal(first[name], second[name]) for name in codes)
    decoder = [name for name in first if name.startswith("network.decoder")]
    assert any(not torch.equal(first[name], second[name]) for name in decoder)
    assert any(".extra" in name for name in second) and not any(".extra" in name for name in first)
    transformer = [
        "experiment=seqgan/ffhq256_nar",
        f"runs_dir={tmp_path}/runs",
        f"train_dataloader.dataset.root={faces}",
        "+train_dataloader.dataset.count=null",
        "+train_dataloader.dataset.val_count=4",
        "train_dataloader.dataset.transform.size=32",
        "train_dataloader.batch_size=4",
        "train_dataloader.num_workers=0",
        "model.cache.num_workers=0",
        *network("model.tokenizer"),
        "model.network.codebook_size=16",
        *(f"+model.network.{key}={value}" for key, value in {"dim": 16, "depth": 1, "num_heads": 2}.items()),
        "train_cfg.max_steps=2",
    ]
    with pytest.raises(ConfigError, match=r"no weights file weights/seqgan_ffhq256_tokenizer1\.pt"):
        run(compose(transformer))
    (checkpoint,) = (made / "stage_0_tokenizer1" / "checkpoints").glob("step_*2.pt")
    run(compose([*transformer, f"load_from.path={checkpoint}"]))
    (made,) = (path.parent for path in (tmp_path / "runs" / "seqgan" / "ffhq256_nar").glob("*/result.json"))
    learnt = weights(made)
    assert all(torch.equal(first[name], learnt[name.replace("network.", "tokenizer.", 1)]) for name in codes)


@pytest.mark.parametrize("name", sorted(name for name in experiments() if name.startswith("seqgan/")))
def test_stages_name_things_that_exist(name: str) -> None:
    cfg = _checked(to_dict(compose([f"experiment={name}"])))
    for component in cfg["components"].values():
        assert component["alternatives"]
    if name.endswith("_tokenizer"):
        assert [stage["name"] for stage in cfg["stages"]] == ["tokenizer1", "tokenizer2"]
        assert cfg["stages"][1]["model"]["frozen"] == ["network.encoder", "network.quant_conv", "network.quantizer"]
