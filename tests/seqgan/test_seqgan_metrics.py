"""Figures of reconstructions, samples and codes."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as library
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from core.errors import ConfigError, VitrineError
from core.metrics.frechet import Statistics, frechet_distance
from core.metrics.predictions import MetricError
from seqgan.inference.pictures import grid
from seqgan.losses.perceptual import SemanticPerceptualLoss, TappedNetwork
from seqgan.metrics import evaluate as tool
from seqgan.metrics.evaluators import (
    CodebookUse,
    CodePredictability,
    ImageScores,
    LinearProbe,
    SampleQuality,
    TokenizerQuality,
    as_bytes,
)
from seqgan.metrics.fidelity import Inception, inception_score, precision_recall
from seqgan.models import ARTransformer, conv_tokenizer
from seqgan.trainer import TokenizerTrainer, TransformerTrainer


@pytest.fixture
def weights(inception_file):
    return inception_file


def pictures(count: int, seed: int = 0, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(count, 3, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(smooth, size=size) * 255).to(torch.uint8)


def gaussian(features: torch.Tensor) -> Statistics:
    wide = features.double()
    return Statistics(wide.mean(dim=0), torch.cov(wide.T))


def features(count: int, seed: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix + seed


def test_frechet_distance_is_that_of_scipy_and_of_torch_fidelity() -> None:
    a, b = gaussian(features(50, 1)), gaussian(features(60, 2))
    ours = frechet_distance(a, b).item()
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    scipys = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    assert ours == pytest.approx(scipys.item(), rel=1e-8)
    theirs = [fid_features_to_statistics(features(n, s).double()) for n, s in ((50, 1), (60, 2))]
    assert ours == pytest.approx(fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"], rel=1e-6)
    with pytest.raises(ConfigError, match="from one layer"):
        frechet_distance(a, gaussian(features(50, 1, width=5)))


def test_frechet_distance_of_few_images_to_themselves_is_zero() -> None:
    few = gaussian(features(20, 3, width=200))  # a covariance of rank 19
    assert abs(frechet_distance(few, few).item()) < 1e-9 * few.covariance.trace().item()


@pytest.mark.long
def test_fid_of_images_does_not_depend_on_batches_and_is_zero_of_the_same(weights) -> None:
    network = Inception(weights, 64, logits=False)
    made, real = pictures(12, 1), pictures(10, 2)
    whole, parts = ImageScores(network), ImageScores(network)
    whole.update(made, real)
    for start in (0, 5, 10):
        parts.update(made[start : start + 5], real[start : start + 5] if start < 10 else None)
    value = whole.compute()["fid"].item()
    assert value == pytest.approx(parts.compute()["fid"].item(), rel=1e-4)
    assert value == pytest.approx(
        frechet_distance(gaussian(network(made)[0]), gaussian(network(real)[0])).item(), rel=1e-6
    )
    same = ImageScores(network)
    same.update(made, made)
    assert abs(same.compute()["fid"].item()) < 1e-3 < value
    with pytest.raises(ConfigError, match="needs two"):
        single = ImageScores(network)
        single.update(made[:1], made[:1])
        single.compute()


def test_features_are_those_of_the_library(weights) -> None:
    theirs = library.FeatureExtractorInceptionV3("own", ["64"], str(weights))
    images = pictures(2)
    assert torch.equal(Inception(weights, 64, logits=False)(images)[0], theirs(images)[0])
    assert Inception(weights, 64, logits=False)(images)[1] is None


def test_images_become_bytes_by_rounding_and_stay_in_range() -> None:
    levels = torch.arange(256, dtype=torch.float32)
    for shift in (-0.4, 0.4):
        assert torch.equal(as_bytes((levels + shift) / 127.5 - 1), levels.to(torch.uint8))
    assert as_bytes(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]
    assert as_bytes(torch.tensor([7], dtype=torch.uint8)).tolist() == [7]


def test_the_network_stays_as_it_was_trained(weights) -> None:
    network = Inception(weights, 64, logits=False)
    expected = network(pictures(2))[0]
    assert not any(module.training for module in network.train().modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(pictures(2))[0], expected)


class Flat(torch.nn.Module):
    """In place of Inception: corners of pictures as features, and as logits."""

    width = 12

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        corners = images[:, :, ::15, ::15].flatten(1).float()
        return corners, corners


def test_scores_are_those_of_samples_with_the_neighbours_asked_for() -> None:
    made, real = pictures(12, 1), pictures(12, 2)
    scores = ImageScores(Flat(), splits=1, neighbours=2)
    scores.update(made, real)
    found, network = scores.compute(), Flat()
    assert found["inception_score"].item() == pytest.approx(inception_score(network(made)[1], 1)[0])
    few = precision_recall(network(made)[0], network(real)[0], 2)
    assert (found["precision"], found["recall"]) == few != precision_recall(network(made)[0], network(real)[0], 5)


def test_a_missing_or_wrong_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"weights=.*none\.pth: no such file.*null to leave"):
        TokenizerQuality(16, weights=tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="does not hold torch-fidelity's Inception"):
        Inception(tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="layer=100"):
        Inception(tmp_path / "other.pth", 100)
    with pytest.raises(ConfigError, match=r"lpips\.linear"):
        TokenizerQuality(16, lpips={"weights": "vgg16.pth"})


def test_inception_score_of_sure_and_of_even_predictions() -> None:
    sure = torch.eye(10).repeat(10, 1) * 100
    assert inception_score(sure, 1)[0] == pytest.approx(10)
    assert inception_score(torch.zeros(40, 10))[0] == pytest.approx(1)
    with pytest.raises(ConfigError, match="lower splits"):
        inception_score(sure[:4])


def test_precision_and_recall_name_the_right_sides() -> None:
    real = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    narrow = real[:20] * 0.05  # all samples plausible, few of the real images covered
    precision, recall = precision_recall(narrow, real)
    assert precision > 0.9 and recall < 0.2
    with pytest.raises(ConfigError, match="need more than 3"):
        precision_recall(real[:3], real)


def test_codes_are_counted_over_batches() -> None:
    use = CodebookUse(8)
    use.update(torch.tensor([[[0, 1], [1, 1]], [[2, 2], [2, 2]]]))
    use.update(torch.tensor([[[0, 1], [2, 3]]]))
    found = use.compute()
    assert found["usage"] == 0.5 and found["dead_codes"] == 4
    assert found["codes_per_image"].item() == pytest.approx((2 + 1 + 4) / 3)
    shares = torch.tensor([2.0, 4, 5, 1]) / 12
    assert found["perplexity"].item() == pytest.approx(torch.special.entr(shares).sum().exp().item())
    with pytest.raises(ValueError, match="codebook_size=8"):
        use.update(torch.tensor([[8]]))


def tokenizer_trainer() -> TokenizerTrainer:
    torch.manual_seed(0)
    network = conv_tokenizer(32, (1, 1), 1, codebook_size=16, z_dim=8)
    torch.nn.init.normal_(network.quantizer.embedding.weight)
    return TokenizerTrainer(network).eval()


def batch(count: int = 6) -> dict:
    images = pictures(count).float() / 127.5 - 1
    return {"image": images, "label": torch.arange(count) % 2, "sample_id": [str(i) for i in range(count)]}


def split(whole: dict, *sizes: int) -> list[dict]:
    starts = np.cumsum([0, *sizes])
    return [{k: v[a:b] for k, v in whole.items()} for a, b in pairwise(starts)]


def test_tokenizer_quality_reads_predictions(weights) -> None:
    trainer, whole = tokenizer_trainer(), batch()
    out = trainer.val_step(whole)
    figures = []
    for parts in ([whole], split(whole, 2, 1, 3)):
        judge = TokenizerQuality(16, weights=weights, layer=64)
        for part in parts:
            judge.process(part, trainer.val_step(part))
        figures.append(judge.evaluate(6))
    assert figures[0].keys() == {
        "psnr", "ssim", "l1", "rfid", "usage", "perplexity", "dead_codes", "codes_per_image",
    }  # fmt: skip
    for name, value in figures[0].items():
        assert value == pytest.approx(figures[1][name], rel=1e-3), name
    error = (out["reconstruction"] - out["image"]).square().mean(dim=(1, 2, 3))
    assert figures[0]["psnr"] == pytest.approx((10 * torch.log10(4 / error)).mean().item(), rel=1e-5)
    assert figures[0]["l1"] == pytest.approx((out["reconstruction"] - out["image"]).abs().mean().item(), rel=1e-5)
    judge = TokenizerQuality(16)
    judge.process(whole, out)
    judge.process(whole, out)
    with pytest.raises(MetricError, match="counted twice"):
        judge.evaluate(6)


def test_perfect_reconstructions_have_no_distance(weights) -> None:
    whole = batch()
    judge = TokenizerQuality(16, weights=weights, layer=64)
    indices = torch.zeros(6, 2, 2, dtype=torch.long)
    judge.process(whole, {**whole, "reconstruction": whole["image"], "indices": indices})
    found = judge.evaluate(6)
    assert abs(found["rfid"]) < 1e-3 and found["l1"] == 0 and found["ssim"] == pytest.approx(1)
    assert found["psnr"] == math.inf and found["codes_per_image"] == 1


def test_a_linear_probe_tells_separable_codes_from_others() -> None:
    label = torch.arange(40) % 2
    names = [str(i) for i in range(40)]
    noise = torch.randint(0, 4, (40, 4, 4), generator=torch.Generator().manual_seed(0))
    good, bad = LinearProbe(8), LinearProbe(8)
    good.update((noise + 4 * label[:, None, None])[:15], label[:15], names[:15])
    good.update((noise + 4 * label[:, None, None])[15:], label[15:], names[15:])
    bad.update(noise, label, names)
    assert good.compute() == 1 and bad.compute() < 0.8
    means = LinearProbe()
    means.update(label.float()[:, None, None, None] + 0.1 * noise[:, None].float().repeat(1, 3, 1, 1), label, names)
    assert means.compute() == 1
    faint = LinearProbe()  # vectors are standardised: the unit of features does not matter
    faint.update(1e-4 * (label.float()[:, None, None, None] + 0.1 * noise[:, None].float()), label, names)
    assert faint.compute() == 1
    apart = LinearProbe(64)  # any labels of so few images can be learnt from so many codes, but not foretold
    apart.update(torch.randint(64, (40, 4, 4), generator=torch.Generator().manual_seed(0)), label, names)
    assert apart.compute() < 0.8
    turned = LinearProbe(8)
    turned.update(noise.flip(0), label.flip(0), names[::-1])
    assert turned.compute() == bad.compute()
    with pytest.raises(ConfigError, match="two classes"):
        lonely = LinearProbe(8)
        lonely.update(noise, label * 0, names)
        lonely.compute()


def test_probes_are_part_of_tokenizer_quality() -> None:
    trainer, whole = tokenizer_trainer(), batch(16)
    judge = TokenizerQuality(16, probe=True)
    judge.process(whole, trainer.val_step(whole))
    found = judge.evaluate(16)
    assert 0 <= found["probe_codes"] <= 1 and 0 <= found["probe_features"] <= 1


def test_terms_of_the_perceptual_loss_are_means_over_images() -> None:
    """In batches of uneven size, and before any weighting: alpha does not change them."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    network(torch.zeros(1, 3, 16, 16))
    tapped = TappedNetwork(network, {"relu": "1", "output": ""})
    losses = [SemanticPerceptualLoss(tapped, alpha, ("relu",), ("relu", "output")) for alpha in (0.0, 1.0)]
    trainer, whole = tokenizer_trainer(), batch(6)
    made = trainer.val_step(whole)
    (low, terms), (semantic, _) = (loss(made["reconstruction"], whole["image"]) for loss in losses)
    for loss in losses:
        judge = TokenizerQuality(16, perceptual=loss)
        for rows in (slice(0, 4), slice(4, 6)):
            part = {name: value[rows] for name, value in whole.items()}
            judge.process(part, {name: value[rows] for name, value in made.items()})
        found = judge.evaluate(6)
        assert found["term_low"] == pytest.approx(low.item()) and found["term_semantic"] == pytest.approx(
            semantic.item()
        )
        assert {name for name in found if name.startswith("term_")} == {f"term_{name}" for name in terms}
        assert found["term_output"] == pytest.approx(terms["output"].item()) and found["term_output"] > 0


def transformer_trainer(**options) -> TransformerTrainer:
    torch.manual_seed(0)
    network = ARTransformer(16, 2, 64, dim=8, depth=1, num_heads=1)
    return TransformerTrainer(network, tokenizer_trainer().network, **options).eval()


def test_bits_of_an_untrained_transformer() -> None:
    trainer, whole = transformer_trainer(), batch()
    trainer.network.head.weight.data.zero_()
    judge = CodePredictability(pixels=256)
    for part in split(whole, 4, 2):
        judge.process(part, trainer.val_step(part))
    found = judge.evaluate(6)
    assert found["bits_per_code"] == pytest.approx(4) and found["bits_per_pixel"] == pytest.approx(4 * 64 / 256)
    zeros = trainer.codes(whole) == 0
    assert found["top1"] == pytest.approx(zeros.float().mean().item())


def test_only_masked_codes_count() -> None:
    judge = CodePredictability(pixels=16)
    mask = torch.tensor([[True, False, False, False]])
    nll, right = torch.tensor([[math.log(8), 9.0, 9.0, 9.0]]), torch.tensor([[True, True, True, False]])
    judge.process({}, {"nll": nll, "right": right, "mask": mask, "sample_id": ["a"]})
    found = judge.evaluate(1)
    assert found["bits_per_code"] == pytest.approx(3) and found["top1"] == 1
    assert found["bits_per_pixel"] == pytest.approx(3 * 4 / 16), "of all four codes"
    judge = CodePredictability()
    judge.process({}, {"nll": nll, "right": right, "mask": mask, "sample_id": ["a"]})
    assert "bits_per_pixel" not in judge.evaluate(1)


def test_samples_of_an_evaluation_repeat_whatever_the_batches() -> None:
    trainer, whole = transformer_trainer(sample_evaluation=True), batch(4)
    out = trainer.val_step(whole)
    assert out["sample"].shape == (4, 3, 16, 16) and out["sample"].dtype == torch.uint8
    parts = torch.cat([trainer.val_step(part)["sample"] for part in split(whole, 1, 3)])
    assert (parts.int() - out["sample"].int()).abs().max() <= 1
    assert not torch.equal(out["sample"][0], out["sample"][2]), "two samples of one class have noise of their own"
    assert "sample" not in transformer_trainer().val_step(whole)


@pytest.mark.long
def test_sample_quality_against_images_and_against_statistics(weights, tmp_path) -> None:
    trainer, whole = transformer_trainer(sample_evaluation=True), batch(6)
    out = trainer.val_step(whole)
    judge = SampleQuality(weights, splits=0, layer=64)
    judge.process(whole, out)
    found = judge.evaluate(6)
    assert found.keys() == {"gfid", "precision", "recall", "bits_per_code", "top1"}
    network = Inception(weights, 64, logits=False)
    stats = [gaussian(network(as_bytes(x))[0]) for x in (out["sample"], whole["image"])]
    assert found["gfid"] == pytest.approx(frechet_distance(*stats).item(), rel=1e-5)
    np.savez(tmp_path / "reference.npz", mu=stats[1].mean.numpy(), sigma=stats[1].covariance.numpy())
    judge = SampleQuality(weights, tmp_path / "reference.npz", splits=0, layer=64)
    judge.process(whole, out)
    assert judge.evaluate(6)["gfid"] == pytest.approx(found["gfid"], rel=1e-6)
    assert SampleQuality(pixels=9).inputs.keys() == {"codes"}
    np.savez(tmp_path / "bare.npz", arr_0=np.zeros(1))
    with pytest.raises(ConfigError, match="no mu and sigma"):
        SampleQuality(weights, tmp_path / "bare.npz", layer=64)


@pytest.mark.long
def test_the_command_reads_folders_batches_and_statistics(weights, tmp_path, capsys) -> None:
    made, real = pictures(6, 1), pictures(7, 2)
    (tmp_path / "real" / "deep").mkdir(parents=True)
    for i, image in enumerate(real):
        place = tmp_path / "real" / ("deep" if i > 4 else "") / f"{i}.png"
        Image.fromarray(image.movedim(0, -1).numpy()).save(place)
    (tmp_path / "real" / "._0.png").write_bytes(b"left by macOS")
    np.savez(tmp_path / "made.npz", arr_0=made.movedim(1, -1).numpy(), arr_1=np.arange(6))
    common = [f"samples={tmp_path}/made.npz", f"weights={weights}", "layer=64", "splits=2", "device=cpu", "batch=4"]
    tool.main([*common, f"reference={tmp_path}/real", f"statistics={tmp_path}/stats.npz", f"output={tmp_path}/a.json"])
    first = capsys.readouterr().out
    network = Inception(weights, 64, logits=False)
    expected = frechet_distance(*(gaussian(network(x)[0]) for x in (made, real))).item()
    figures = tool.json.loads((tmp_path / "a.json").read_text())
    assert figures["fid"] == pytest.approx(expected, rel=1e-4)
    assert figures["samples"] == 6 and figures["reference"] == 7 and {"precision", "inception_score"} <= figures.keys()
    assert tool.json.loads(first[first.index("{") :]) == figures
    options, _ = tool.parse([*common, f"reference={tmp_path}/stats.npz", "splits=0"], tool.Options, doc="")
    again = tool.evaluate(options)
    assert again["fid"] == pytest.approx(figures["fid"], rel=1e-6)
    for name, images in (("made", made), ("real", real)):  # the same arrays without a name
        np.save(tmp_path / f"{name}.npy", images.movedim(1, -1).numpy())
    words = [f"samples={tmp_path}/made.npy", f"reference={tmp_path}/real.npy", *common[1:]]
    assert tool.evaluate(tool.parse(words, tool.Options, doc="")[0]) == figures
    assert "precision" not in again and again["reference_statistics"] == "of the file"
    # An ADM reference batch has both: its statistics are taken, and its pictures for precision and recall.
    with np.load(tmp_path / "stats.npz") as stats:
        np.savez(tmp_path / "adm.npz", arr_0=real.movedim(1, -1).numpy(), mu=stats["mu"] + 1, sigma=stats["sigma"])
    options.reference = str(tmp_path / "adm.npz")
    shifted = tool.evaluate(options)
    assert shifted["fid"] != pytest.approx(figures["fid"], rel=0.1)
    assert shifted["precision"] == figures["precision"]


@pytest.mark.long
def test_sheets_of_our_own_tool_are_no_samples(weights, tmp_path, capsys) -> None:
    """A folder that `tools/infer.py` wrote holds the samples, and a sheet of them."""
    made = pictures(6, 1).movedim(1, -1).numpy()
    written = tmp_path / "out"
    written.mkdir()
    for i, image in enumerate(made):
        Image.fromarray(image).save(written / f"samples_{i:04d}.png")
    Image.fromarray(grid(made)).save(written / "samples_grid.png")
    np.savez(tmp_path / "made.npz", arr_0=made)
    np.savez(tmp_path / "real.npz", arr_0=pictures(7, 2).movedim(1, -1).numpy())

    def ask(samples: str):
        words = [f"samples={tmp_path / samples}", f"reference={tmp_path}/real.npz", f"weights={weights}"]
        return tool.evaluate(tool.parse([*words, "layer=64", "splits=0", "device=cpu"], tool.Options, doc="")[0])

    assert ask("out")["samples"] == 6 and ask("out") == ask("made.npz")
    assert "samples_grid.png is left out" in capsys.readouterr().out
    # The sheet alone, beside the arrays of all samples.
    (tmp_path / "sheet").mkdir()
    (written / "samples_grid.png").rename(tmp_path / "sheet" / "samples_grid.png")
    (tmp_path / "made.npz").rename(tmp_path / "sheet" / "samples_6x16x16x3.npz")
    with pytest.raises(ConfigError, match="npz file beside them"):
        ask("sheet")
    # Under a name that is not ours it is a picture like any other.
    (tmp_path / "sheet" / "samples_grid.png").rename(written / "grid.png")
    assert ask("out")["samples"] == 7


def test_the_command_says_what_is_wrong(weights, tmp_path) -> None:
    def ask(samples: str, reference: str):
        words = [f"samples={samples}", f"reference={reference}", f"weights={weights}", "layer=64", "device=cpu"]
        return tool.evaluate(tool.parse(words, tool.Options, doc="")[0])

    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "empty.npz", other=np.zeros(1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "objects.npy").write_bytes(pickle.dumps(print))
    np.save(tmp_path / "grey.npy", np.zeros((2, 4, 4), np.uint8))
    cases = {"float.npz": "uint8", "folder": "no pictures", "none": "neither a folder"}
    cases |= {"objects.npy": "objects.npy' cannot be read", "grey.npy": r"uint8 \(2, 4, 4\): pictures are"}
    for samples, says in cases.items():
        with pytest.raises(VitrineError, match=says):
            ask(tmp_path / samples, tmp_path / "float.npz")
    np.savez(tmp_path / "made.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ConfigError, match="neither pictures"):
        ask(tmp_path / "made.npz", tmp_path / "empty.npz")
