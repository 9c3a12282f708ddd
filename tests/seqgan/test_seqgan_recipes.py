"""Recipes of the paper at a reduced size, through the tools, with their evaluators: tokenizers, then transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import compose, experiments, to_dict
from core.engine.keys.check import checked
from core.engine.launch import run
from core.errors import ConfigError
from tools.infer import main as infer
from tools.test import main as evaluate

SMALL_TOKENIZER = {"filters": 32, "multipliers": "[1,1]", "num_res_blocks": 1, "codebook_size": 16, "z_dim": 8}
SMALL_TRANSFORMER = {"dim": 16, "depth": 1, "num_heads": 2}
CODES = ("network.encoder", "network.quantizer")
QUALITY = {"psnr", "ssim", "l1", "usage", "perplexity", "dead_codes", "codes_per_image"}
# A small classifier of timm in VGG's place, by keys alone.
RESNET = [
    "model.perceptual.network.type=seqgan.classifier",
    "+model.perceptual.network.library=timm",
    "+model.perceptual.network.name=resnet10t",
    "model.perceptual.network.weights=null",
    "+model.perceptual.network.taps={relu5_3: layer4, logit: ''}",
    "model.perceptual.low=[relu5_3]",
]
STYLEGAN = ["model.discriminator.image_size=32", "+model.discriminator.channels={4: 8, 8: 8, 16: 4, 32: 4}"]


def keys(place: str, values: dict) -> list[str]:
    return [f"++{place}.{key}={value}" for key, value in values.items()]


def loaders(root: Path, split: str) -> list[str]:
    return [
        f"train_dataloader.dataset.root={root}",
        "train_dataloader.dataset.transform.size=32",
        "train_dataloader.batch_size=4",
        "train_dataloader.num_workers=0",
        f"{split}_dataloader.batch_size=4",
        f"{split}_dataloader.num_workers=0",
        "runtime=cpu",
    ]


def picture(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(np.kron(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)))


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """Eight pictures to train with and five to evaluate, as FFHQ has them."""
    folder = tmp_path_factory.mktemp("ffhq") / "00000"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(13):
        picture(rng).save(folder / f"{number:05d}.png")
    return folder.parent


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """Two classes of four pictures to train with and three to evaluate, as ImageNet has them."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(1)
    for split, count in (("train", 4), ("val", 3)):
        for wnid in ("n01440764", "n01443537"):
            (root / split / wnid).mkdir(parents=True)
            for number in range(count):
                picture(rng).save(root / split / wnid / f"{wnid}_{number}.JPEG", quality=95)
    return root


def ffhq(root: Path, split: str) -> list[str]:
    return [*loaders(root, split), "train_dataloader.dataset.count=null", "train_dataloader.dataset.val_count=5"]


def state_of(stage: Path) -> dict[str, torch.Tensor]:
    (file,) = stage.glob("checkpoints/step_*2.pt")
    state = torch.load(file, weights_only=False)
    return {**state["model"], **state["hooks"]["EMAHook"]["average"]}


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def told(tool, *words: str, tmp_path: Path) -> dict:
    """What a tool writes to its JSON file."""
    output = tmp_path / "told.json"
    tool([*words, f"output={output}", f"runs_dir={tmp_path}/runs"])
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def phases(faces, inception_file, vgg16_file, lpips_file, tmp_path_factory) -> SimpleNamespace:
    """Both phases of a tokenizer, two steps each, evaluated with every figure."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [
        "experiment=seqgan/ffhq256_tokenizer",
        *ffhq(faces, "val"),
        *keys("model.network", SMALL_TOKENIZER),
        *STYLEGAN,
        *RESNET,
        "train_cfg.max_steps=2",
        "stages.1.train_cfg.max_steps=2",
    ]
    judged = [
        f"val_evaluator.weights={inception_file}",
        "+val_evaluator.layer=64",
        f"val_evaluator.lpips={{weights: {vgg16_file}, linear: {lpips_file}}}",
    ]
    run(compose([*words, *judged, f"run_dir={folder}/run"]))
    one, two = folder / "run" / "stage_0_tokenizer1", folder / "run" / "stage_1_tokenizer2"
    (checkpoint,) = (one / "checkpoints").glob("step_*2.pt")
    return SimpleNamespace(
        folder=folder / "run", words=words, judged=judged, one=one, two=two, checkpoint=checkpoint, first=state_of(one)
    )


@pytest.mark.long
def test_codes_outlive_the_second_phase(phases) -> None:
    first, second = phases.first, state_of(phases.two)
    codes = [name for name in first if name.startswith(CODES)]
    assert codes and all(torch.equal(first[name], second[name]) for name in codes)
    decoder = [name for name in first if name.startswith("network.decoder")]
    assert any(not torch.equal(first[name], second[name]) for name in decoder)
    assert any(".extra" in name for name in second) and not any(".extra" in name for name in first)


@pytest.mark.long
def test_both_phases_are_judged_on_the_val_split(phases, tmp_path) -> None:
    one, two = (result_of(stage)["metrics"] for stage in (phases.one, phases.two))
    assert one.keys() == two.keys() == QUALITY | {"rfid", "lpips"}
    assert one["usage"] == two["usage"] and one["l1"] != two["l1"], "the same codes, another decoder"
    assert one["rfid"] > 0 and one["lpips"] > 0
    trained = [*phases.words, *phases.judged, f"checkpoint={phases.folder}"]
    again = told(evaluate, *trained, "model.network.extra=attn1", tmp_path=tmp_path)
    assert again == pytest.approx(two, rel=1e-5)
    plain = told(evaluate, *phases.words, f"checkpoint={phases.checkpoint}", tmp_path=tmp_path)
    assert plain.keys() == QUALITY and plain["psnr"] == pytest.approx(one["psnr"], rel=1e-5)
    run(compose([*phases.words, "val_dataloader=null", f"run_dir={tmp_path}/unjudged"]))
    assert result_of(tmp_path / "unjudged")["metrics"] == {}


def test_a_tokenizer_shows_reconstructions(phases, faces, tmp_path) -> None:
    words = [*phases.words, f"checkpoint={phases.folder}", "model.network.extra=attn1", "model.input_shape=[3,32,32]"]
    infer([*words, f"input={faces}/00000/00012.png", f"output={tmp_path}/out"])
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert np.array(record["codes"]).shape == (16, 16) and Path(record["pictures"]["reconstruction"]).is_file()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_transformers_start_from_the_first_phase(kind, phases, faces, imagenet, inception_file, tmp_path) -> None:
    """With classes (ImageNet, AR) and without (FFHQ, NAR), beside the second phase and with its decoder."""
    classes = 2 if kind == "ar" else 1
    data = loaders(imagenet, "test") if kind == "ar" else ffhq(faces, "test")
    words = [
        f"experiment=seqgan/{'imagenet256_ar' if kind == 'ar' else 'ffhq256_nar'}",
        *data,
        f"++train_dataloader.dataset.num_classes={classes}" if kind == "ar" else "seed=0",
        "model.cache.num_workers=0",
        f"model.cache.folder={tmp_path}/codes",
        f"model.network.num_classes={classes}",
        *keys("model.tokenizer", SMALL_TOKENIZER),
        "model.network.codebook_size=16",
        *keys("model.network", SMALL_TRANSFORMER),
        "train_cfg.max_steps=2",
        "++train_cfg.max_epochs=null",
    ]
    with pytest.raises(ConfigError, match=r"no weights file weights/seqgan_\w+_tokenizer1\.pt"):
        run(compose([*words, f"run_dir={tmp_path}/none"]))
    words.append(f"load_from.path={phases.checkpoint}")
    watched = ["val_dataloader=${test_dataloader}", "val_evaluator={type: seqgan.CodePredictability}"]
    run(compose([*words, *watched, "+train_cfg.val_every_steps=1", f"run_dir={tmp_path}/run"]))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "val/bits_per_code" in line] == [1, 2]
    learnt = state_of(tmp_path / "run")
    codes = [name for name in phases.first if name.startswith(CODES)]
    assert all(torch.equal(phases.first[name], learnt[name.replace("network.", "tokenizer.", 1)]) for name in codes)
    figures = result_of(tmp_path / "run")["metrics"]
    assert figures.keys() == {"bits_per_code", "top1", "bits_per_pixel"}
    assert figures["bits_per_pixel"] == pytest.approx(figures["bits_per_code"] * 256 / 65536)
    trained = [*words, f"checkpoint={tmp_path}/run"]
    sampled = [
        "model.sample_evaluation=true",
        f"test_evaluator.weights={inception_file}",
        "+test_evaluator.layer=64",
        "test_evaluator.splits=0",
        "test_evaluator.neighbours=1",
    ]
    found = told(evaluate, *trained, *sampled, tmp_path=tmp_path)
    assert found.keys() == {*figures, "gfid", "precision", "recall"} and found["gfid"] > 0
    assert {name: found[name] for name in figures} == pytest.approx(figures, rel=1e-5)
    assert {name: found[name] for name in figures} == told(evaluate, *trained, tmp_path=tmp_path)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*2.pt")
    stay = ["train_cfg.max_steps=0", f"load_from={{path: {checkpoint}, into: null, prefix: null}}"]  # of seqgan/phases
    run(compose([*words[:-1], *stay, *sampled, f"run_dir={tmp_path}/stay"]))
    assert result_of(tmp_path / "stay")["metrics"] == pytest.approx(found, rel=1e-5)
    better = told(evaluate, *trained, *sampled, f"model.request.tokenizer={phases.folder}", tmp_path=tmp_path)
    assert better["bits_per_code"] == found["bits_per_code"] and better["gfid"] != found["gfid"]
    infer([*trained, f"output={tmp_path}/out", "model.request.count=3"])
    with np.load(tmp_path / "out" / "samples_3x32x32x3.npz") as batch:
        assert batch["arr_0"].shape == (3, 32, 32, 3) and set(batch["arr_1"].tolist()) == set(range(classes))


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "size", "options"), [("l2norm_factorized", 32, ["code_dim=4"]), ("kmeans_restart", 16, ["patience=1"])]
)
def test_other_codebooks_go_through_to_a_transformer(kind, size, options, faces, tmp_path) -> None:
    """Rows of seqgan/regularisation: one phase, then a transformer on its codes."""

    def book(place: str) -> list[str]:
        more = [f"+{place}.quantizer_options.{option}" for option in options]
        return [*keys(place, SMALL_TOKENIZER), f"{place}.quantizer={kind}", f"{place}.codebook_size={size}", *more]

    words = ["experiment=seqgan/ffhq256_tokenizer", *ffhq(faces, "val"), *book("model.network"), *STYLEGAN, *RESNET]
    alone = ["stages=[]", "model.perceptual.alpha=0.0", "model.network.entropy=null", "train_cfg.max_steps=2"]
    run(compose([*words, *alone, f"run_dir={tmp_path}/run"]))
    figures = result_of(tmp_path / "run")["metrics"]
    assert figures.keys() == QUALITY and figures["usage"] * size + figures["dead_codes"] == pytest.approx(size)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*2.pt")
    words = ["experiment=seqgan/ffhq256_nar", *ffhq(faces, "test"), *book("model.tokenizer")]
    words += [
        *keys("model.network", SMALL_TRANSFORMER),
        "model.cache.num_workers=0",
        f"model.cache.folder={tmp_path}/codes",
    ]
    run(compose([*words, "train_cfg.max_steps=1", f"load_from.path={checkpoint}", f"run_dir={tmp_path}/next"]))
    assert 0 < result_of(tmp_path / "next")["metrics"]["bits_per_code"] < 20


@pytest.mark.long
def test_lsun_starts_from_imagenet(phases, tmp_path) -> None:
    """One epoch from another tokenizer, from a published LMDB file, then the decoder alone."""
    published = Path(__file__).parent / "files" / "church_outdoor_val_lmdb"
    for split in ("train", "val"):
        shutil.copytree(published, tmp_path / "lsun" / f"church_outdoor_{split}_lmdb")
    words = [
        "experiment=seqgan/lsun_church_tokenizer",
        *loaders(tmp_path / "lsun", "val"),
        *keys("model.network", SMALL_TOKENIZER),
        *STYLEGAN,
        *RESNET,
        "train_dataloader.batch_size=2",
        "stages.1.train_cfg.max_steps=2",
        f"run_dir={tmp_path}/run",
    ]
    run(compose([*words, f"stages.0.load_from.path={phases.checkpoint}"]))
    one, two = (tmp_path / "run" / f"stage_{i}_tokenizer{i + 1}" for i in range(2))
    assert (result_of(one)["epochs"], result_of(one)["steps"]) == (1, 2)
    state = state_of(one)
    moved = [name for name in state if name.startswith(CODES) and not torch.equal(state[name], phases.first[name])]
    near = max((state[name] - phases.first[name]).abs().max().item() for name in moved)
    assert moved and near < 0.01, "two steps away from where it started"
    assert all(torch.equal(state[name], state_of(two)[name]) for name in state if name.startswith(CODES))
    assert result_of(two)["metrics"].keys() == QUALITY


@pytest.mark.parametrize("name", sorted(name for name in experiments() if name.startswith("seqgan/")))
def test_stages_name_things_that_exist(name: str) -> None:
    cfg = checked(to_dict(compose([f"experiment={name}"])))
    for component in cfg["components"].values():
        assert component["alternatives"]
    if name.endswith("_tokenizer"):
        assert [stage["name"] for stage in cfg["stages"]] == ["tokenizer1", "tokenizer2"]
        assert cfg["stages"][1]["model"]["frozen"] == ["network.encoder", "network.quant_conv", "network.quantizer"]
    assert cfg["evaluate"] == "last" and cfg["checkpoint"]["keep_best"] == 0
    judged = cfg["val_dataloader"] or cfg["test_dataloader"]
    if "256" in name or "lsun" in name:
        own, other = (loader["dataset"] for loader in (cfg["train_dataloader"], judged))
        assert other["split"] == "val" != own["split"] and other["type"] == own["type"]
        assert other["transform"]["crop"] == "centre" and other["transform"]["flip"] == 0.0
        assert other.keys() >= own.keys() - {"list_file"}
