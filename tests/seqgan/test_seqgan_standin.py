"""The stand-in: images, networks, judges, and a whole run in three stages at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from core.config import compose
from core.engine.commands.evaluation import evaluate
from core.engine.launch import run
from core.engine.run.config import configured
from core.errors import ConfigError
from seqgan.inference.tradeoff import PANELS, curve
from seqgan.inference.tradeoff import main as draw_main
from seqgan.models import UsageEntropy, VectorQuantizer
from seqgan.standin import judges
from seqgan.standin.judges import TemplateJudge, augmented, frechet, shape_perceptual
from seqgan.standin.networks import LossNetwork, SmallDecoder, small_tokenizer, small_transformer
from seqgan.standin.shape_digits import ShapeDigits, placed, scanned
from seqgan.standin.shape_glyphs import CLASSES, ShapeGlyphs, shape_masks
from seqgan.standin.sheet import main as draw_sheet
from seqgan.standin.trainer import TwoDecoderTransformer
from tools.infer import main as infer


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tokenizer(attention: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return small_tokenizer(VectorQuantizer(64, 16, entropy=UsageEntropy()), attention)


def test_counts_are_those_of_the_setting() -> None:
    assert count(tokenizer()) == 215_267
    assert count(tokenizer(True)) - count(tokenizer()) == 9_504
    assert count(LossNetwork()) == 121_373
    transformer = small_transformer()
    # The head has a row for every class token as well, which no loss reads.
    assert count(transformer) - 10 * 64 == 161_216


def test_images_follow_from_split_and_seed_and_asked_classes_are_even() -> None:
    train, test = ShapeGlyphs("train", 3, count=40), ShapeGlyphs("test", 3, count=40)
    assert torch.equal(train[7]["image"], ShapeGlyphs("train", 3, count=40)[7]["image"])
    assert not torch.equal(train[7]["image"], test[7]["image"])
    assert not torch.equal(train[7]["image"], ShapeGlyphs("train", 4, count=40)[7]["image"])
    image = train.drawn.image
    assert image.shape == (40, 3, 24, 24) and -1 <= image.min() < image.max() <= 1
    assert torch.bincount(torch.tensor([test[i]["asked"] for i in range(40)])).tolist() == [4] * 10
    with pytest.raises(ValueError, match="train, test"):
        ShapeGlyphs("val")


def test_shapes_are_brighter_than_what_is_behind_and_not_coloured() -> None:
    data = ShapeGlyphs("train", 0, count=1500)
    drawn = data.drawn
    cx, cy, half = (12 + 2.5 * drawn.place[:, 0], 12 + 2.5 * drawn.place[:, 1], 6.5 + drawn.place[:, 2])
    mask = shape_masks(cx, cy, half)[torch.arange(1500), drawn.label][:, None].float()
    inside = (drawn.image * mask).sum((2, 3)) / mask.sum((2, 3))
    outside = (drawn.image * (1 - mask)).sum((2, 3)) / (1 - mask).sum((2, 3))
    lift = (inside - outside).mean(0)
    assert ((lift > 0.35) & (lift < 0.55)).all() and lift.max() - lift.min() < 0.05
    ring, disc, post = (
        shape_masks(*torch.tensor([[12.0], [12.0], [6.5]]))[0, CLASSES.index(n)] for n in ("ring", "disc", "post")
    )
    assert disc[12, 12] and not ring[12, 12] and ring[12, 17] and post[5, 12] and not post[12, 5]


def test_the_template_judge_reads_real_images() -> None:
    data = ShapeGlyphs("test", 0, count=300)
    found = TemplateJudge(*data.templates())(data.drawn.image)
    assert (found == data.drawn.label).float().mean() > 0.95


def test_frechet_distance_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    # N(0, 1) against N(m, s^2) in one dimension of three: m^2 + (1 - s)^2.
    y = x * torch.tensor([2.0, 1.0, 1.0]) + torch.tensor([0.0, 3.0, 0.0])
    assert frechet(x, y) == pytest.approx(9 + 1, rel=0.05)
    covariances = [np.cov(z.double().numpy(), rowvar=False) for z in (x, y)]
    cross = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    moved = (x.double().mean(dim=0) - y.double().mean(dim=0)).square().sum()
    assert frechet(x, y) == pytest.approx(float(moved) + np.trace(sum(covariances) - 2 * cross), rel=1e-9)


def test_augmentation_does_not_move_the_shape() -> None:
    torch.manual_seed(0)
    image = ShapeGlyphs("train", 0, count=200).drawn.image
    out = augmented(image)
    assert out.shape == image.shape and not torch.equal(out, image)
    grey, before = out.mean(1).flatten(1), image.mean(1).flatten(1)
    same = F.cosine_similarity(grey - grey.mean(1, keepdim=True), before - before.mean(1, keepdim=True))
    assert same.mean() > 0.7 and (same > 0.3).all()


@pytest.fixture
def quick_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {kind: (model, 12, stream) for kind, (model, _, stream) in judges._RECIPES.items()}
    monkeypatch.setattr(judges, "_RECIPES", recipes)


def test_taps_are_relative_errors_and_networks_are_kept(tmp_path, quick_networks) -> None:
    data = ShapeGlyphs("train", 1, count=600)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loss = shape_perceptual(data, 1.0, root=str(tmp_path))
    assert torch.equal(torch.rand(1), expected), "training a network leaves the caller's random numbers alone"
    image = data.drawn.image[:500]
    mean = {name: value.mean(0, keepdim=True) for name, value in loss.network(image).items()}
    for name, value in loss.network(image).items():
        # What predicts nothing but the mean has a relative error of one.
        error = (value - mean[name]).square().mean() / loss.scales[name]
        assert float(error) == pytest.approx(1, rel=1e-4), name
    (file,) = (tmp_path / "1").glob("loss-*.pt")
    stamp = file.stat().st_mtime_ns
    again = shape_perceptual(data, 0.0, root=str(tmp_path))
    assert file.stat().st_mtime_ns == stamp
    assert torch.equal(again.network.network.head.weight, loss.network.network.head.weight)
    value, _ = again(image[:4], image[4:8])
    assert value == pytest.approx(
        sum(float(t) for n, t in again.distances(image[:4], image[4:8]).items() if n in again.low), rel=1e-5
    )


def test_a_stronger_decoder_has_blocks_at_both_resolutions() -> None:
    plain, strong = SmallDecoder(), SmallDecoder(blocks=2)
    assert count(strong) - count(plain) == 2 * sum(2 * (9 * c * c + c + 2 * c) for c in (48, 24))
    assert strong(torch.randn(2, 16, 6, 6)).shape == (2, 3, 24, 24)
    # Of one seed, tokenizers with different decoders begin with the same encoder and codebook.
    made = []
    for blocks in (0, 2):
        torch.manual_seed(3)
        made.append(small_tokenizer(VectorQuantizer(64, 16), blocks=blocks))
    first, other = (model.encoder.state_dict() for model in made)
    assert all(torch.equal(value, other[name]) for name, value in first.items())
    assert torch.equal(made[0].quantizer.embedding.weight, made[1].quantizer.embedding.weight)


def test_attention_of_the_second_phase_starts_as_nothing() -> None:
    torch.manual_seed(0)
    first, second = SmallDecoder(), SmallDecoder(attention=True)
    second.load_state_dict({**second.state_dict(), **first.state_dict()})
    z = torch.randn(2, 16, 6, 6)
    assert torch.equal(first(z), second(z))


def test_decoding_with_another_first_phase_is_refused() -> None:
    first, other = tokenizer(), tokenizer(True)
    other.encoder[0].weight.data += 1e-3
    trainer = TwoDecoderTransformer(small_transformer(dim=16, depth=1), first, other).eval()
    batch = {
        "image": torch.zeros(2, 3, 24, 24),
        "label": torch.zeros(2).long(),
        "asked": torch.arange(2),
        "sample_id": ["test-0-0", "test-0-1"],
    }
    with pytest.raises(ConfigError, match="another encoder or codebook"):
        trainer.predict(batch)
    other.encoder.load_state_dict(first.encoder.state_dict())
    other.quantizer.load_state_dict(first.quantizer.state_dict())
    out = trainer.predict(batch)
    assert torch.equal(out["codes"], out["codes2"]) and out["sample2"].shape == (2, 3, 24, 24)


def shown_by_the_tool(run_folder: Path, folder: Path, kind: str) -> None:
    """Every stage: samples of a request, and photographs of any size and mode."""
    (folder / "photos").mkdir()
    modes = {"wide.jpg": ("RGB", (9, 40)), "tiny.jpg": ("L", (7, 5)), "clear.png": ("RGBA", (24, 24))}
    modes |= {"palette.png": ("P", (50, 61)), "print.jpg": ("CMYK", (30, 33)), "line.png": ("1", (64, 64))}
    for name, (mode, size) in modes.items():
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / "photos" / name)
    (folder / "request.json").write_text('{"labels": [1, 2], "count": 3}')

    def ask(place: str, given: str, *more: str) -> list[dict]:
        words = [f"checkpoint={run_folder}/{place}", f"output={folder}/out", f"input={folder}/{given}", "device=cpu"]
        infer([*words, *more])
        return json.loads((folder / "out" / "results.json").read_text())

    for stage in ("stage_0_tokenizer", "stage_1_decoder"):
        records = ask(stage, "photos")
        assert [record["size"] for record in records] == [[24, 24]] * len(modes)
        with pytest.raises(ConfigError, match="samples are made by the run of a transformer"):
            ask(stage, "request.json")
    (record,) = ask("", "request.json", "model.steps=2")
    assert record["labels"] == [1, 2, 1] and record["sampler"].get("steps", 2) == 2
    records = ask("stage_2_transformer", "photos", "model.request.labels=[3]")
    kept = [record["label"] if kind == "ar" else record["labels"][0] for record in records]
    assert kept == [3] * len(modes) and all(Path(next(iter(r["pictures"].values()))).is_file() for r in records)


@pytest.mark.long
@pytest.mark.parametrize(
    ("experiment", "kind"), [("shape_glyphs", "ar"), ("shape_glyphs", "nar"), ("shape_glyphs_gan", "ar")]
)
def test_three_stages_from_one_first_phase(experiment: str, kind: str, tmp_path, quick_networks, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {
        "experiment": f"seqgan/{experiment}",
        "runs_dir": tmp_path,
        "stages.2.model.network.kind": kind,
        "stages.2.model.network.dim": 16,
        "stages.2.model.network.depth": 1,
        "+train_dataloader.dataset.count": 128,
        "train_dataloader.batch_size": 16,
        "+stages.2.test_dataloader.dataset.count": 60,
        "train_cfg.max_steps": 4,
        "stages.1.train_cfg.max_steps": 3,
        "stages.2.train_cfg.max_steps": 3,
        "param_scheduler.0.warmup": 1,
    }
    words = [f"{key}={value}" for key, value in changes.items()]
    result = run(compose(words))
    figures = result["metrics"]
    assert figures["codes_identical"] == 1 and figures["l1_1"] != figures["l1_2"]
    assert {"bits", "consistency_1", "template_2", "gfid_2", "pixel_fid_1", "rfid_2", "perplexity"} <= figures.keys()
    folder = tmp_path / "seqgan" / experiment
    made = folder / "latest" / "result.json"
    assert json.loads(made.read_text())["metrics"]["bits"] == figures["bits"]
    for cfg, file in (configured(str(made.parent), []), configured(str(made.parent), words)):
        assert cfg["model"]["type"] == "seqgan.TwoDecoderTransformer" and file.parts[-3] == "stage_2_transformer"
    assert evaluate(*configured(str(made.parent), [])) == figures
    cfg, file = configured(f"{made.parent}/stage_1_decoder", words)
    assert cfg["model"]["network"]["attention"] and file.name == "step_00000003.pt"
    weights = [
        torch.load(next(made.parent.glob(f"stage_{i}_*/checkpoints/*")), weights_only=False)["model"] for i in range(3)
    ]
    for name, value in weights[0].items():
        if name.startswith(("network.encoder", "network.quantizer")):
            assert torch.equal(value, weights[1][name]) and torch.equal(
                value, weights[2][name.replace("network.", "tokenizer.", 1)]
            )
    changed = [
        n for n in weights[0] if n.startswith("network.decoder") and not torch.equal(weights[0][n], weights[1][n])
    ]
    assert changed, "the second phase trains the decoder"
    judged = [name for name in weights[0] if name.startswith("discriminator.")]
    assert bool(judged) == experiment.endswith("gan")
    assert all(not torch.equal(weights[0][n], weights[1][n]) for n in judged if n.endswith("weight"))

    if experiment == "shape_glyphs":
        shown_by_the_tool(made.parent, tmp_path, kind)
    run_folder = str(made.parent)
    draw_sheet([f"runs=[{run_folder},{run_folder}]", "titles=[a,b]", f"output={tmp_path}/sheet.png"])
    assert (tmp_path / "sheet.png").stat().st_size > 20_000
    with pytest.raises(ConfigError, match="2 titles"):
        draw_sheet([f"runs=[{run_folder}]", "titles=[a,b]"])


def test_digits_have_other_writers_in_the_test_and_a_template_judge() -> None:
    train, test = ShapeDigits("train", 0, count=300), ShapeDigits("test", 0, count=300)
    assert train.drawn.image.shape == test.drawn.image.shape == (300, 3, 24, 24)
    found = TemplateJudge(*test.templates(), test.local_contrast)(test.drawn.image)
    # Real digits in loud surroundings: a weaker judge than that of shapes, far above chance.
    assert (found == test.drawn.label).float().mean() > 0.6
    # Without what is drawn behind them, digits are where `place` says.
    figure = placed(scanned()[0][:5], torch.full((5,), 8.0), torch.full((5,), 15.0), torch.full((5,), 6.0))
    grid = torch.arange(24.0)
    mean_x = (figure.sum(1) * grid).sum(1) / figure.sum((1, 2))
    mean_y = (figure.sum(2) * grid).sum(1) / figure.sum((1, 2))
    assert ((mean_x - 8).abs() < 1.5).all() and ((mean_y - 15).abs() < 1.5).all()


def test_the_curve_is_drawn_from_stored_results(tmp_path, capsys) -> None:
    def stored(alpha: float, values: list[float]) -> dict:
        runs = [{"metrics": dict.fromkeys(PANELS, value)} for value in values]
        return {"label": f"alpha {alpha:g}", "runs": runs}

    file = tmp_path / "alphas.json"
    file.write_text(json.dumps({"rows": [stored(1, [3.0, 4.0]), stored(0.5, []), stored(0, [1.0])]}))
    points = curve(file)
    assert list(points) == [0.0, 1.0] and points[1.0][1]["bits"] == 4
    draw_main([f"results={file}", f"output={tmp_path}/x.png"])
    assert (tmp_path / "x.png").stat().st_size > 5000 and "alpha 1: 2" in capsys.readouterr().out
    file.write_text(json.dumps({"rows": [stored(1, [3.0])]}))
    with pytest.raises(ConfigError, match="1 values of alpha"):
        curve(file)
    with pytest.raises(ConfigError, match="run=true writes it"):
        curve(tmp_path / "none.json")
