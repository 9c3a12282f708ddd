"""The card's figures, and those of results/STVIT.md, are those of the stored results, to the digits printed."""

from __future__ import annotations

import statistics

import pytest

from tests.cards import (
    ROOT,
    agree,
    agree_mean,
    agree_ratio,
    comparison,
    numbers,
    runs,
    sentence,
    stored,
    table,
    values,
)

CARD = (ROOT / "stvit" / "README.md").read_text()
HISTORY = (ROOT / "results" / "STVIT.md").read_text()


def percent(found: list[float]) -> list[float]:
    return [100 * one for one in found]


def test_table_of_the_claim() -> None:
    claim = stored("claims/stvit")
    _, rows = table(CARD, "row | accuracy")
    assert [row[0] for row in rows] == ["STViT", "full ViT", "pooled tokens", "random tokens"]
    for label, accuracy, gain, verdict in rows:
        assert [run["seed"] for run in runs(claim, label)] == [0, 1, 2]
        agree_mean(accuracy, percent(values(claim, label, "top1")))
        if label != "STViT":
            found = comparison(claim, "STViT", label)
            mean, error = numbers(gain.replace("+", ""))
            agree(mean, 100 * found["mean"])
            agree(error, 100 * found["standard_error"])
            assert verdict.startswith(found["verdict"])
    assert claim["holds"] == "holds"


def test_further_claims() -> None:
    claim = stored("claims/stvit_16")
    said = sentence(CARD, "STViT reaches # %, the full ViT # % in equal epochs and # % in equal MACs")
    for text, label in zip(said.groups(), ("STViT", "full ViT", "full ViT, equal MACs"), strict=True):
        agree_mean(text, percent(values(claim, label, "top1")))
    interval = sentence(CARD, "interval of the first difference, # to # points, includes zero")
    low, high = comparison(claim, "STViT", "full ViT")["interval95"]
    assert low < 0 < high and claim["holds"] == "holds"
    agree(interval[1], 100 * low)
    agree(interval[2], 100 * high)

    claim = stored("claims/stvit_dense")
    said = sentence(CARD, "STViT-R reaches # % mean IoU, the same number of pooled tokens, enlarged again, # %.")
    agree_mean(said[1], percent(values(claim, "STViT-R", "miou")))
    agree_mean(said[2], percent(values(claim, "pooled tokens", "miou")))
    found = comparison(claim, "STViT-R", "pooled tokens")
    said = sentence(CARD, "It holds by # points (standard error #, Student's interval +# to +#)")
    for text, value in zip(said.groups(), (found["mean"], found["standard_error"], *found["interval95"]), strict=True):
        agree(text, 100 * value)
    assert claim["holds"] == "holds"


def test_table_of_the_claim_for_dense_tasks() -> None:
    claim = stored("claims/stvit_dense")
    _, rows = table(HISTORY, "row | mean IoU")
    for label, iou, pixels, macs, _ in rows:
        label = label.partition(",")[0]
        agree_mean(iou, percent(values(claim, label, "miou")))
        agree_mean(pixels, percent(values(claim, label, "pixel_accuracy")))
        agree(numbers(macs)[0], claim["figures"]["macs"]["rows"][label]["value"] / 1e6)


def of_table(name: str, experiment: str) -> list[dict]:
    found = [run for run in stored(f"tables/stvit_{name}")["runs"] if run["name"] == f"stvit/{experiment}"]
    return sorted(found, key=lambda run: run["seed"])


def test_speed_on_digits() -> None:
    _, rows = table(CARD, "model | tokens")
    kept = stored("tables/stvit_digits")["measured"]["throughput"]["rows"]
    rounds = {label: kept[label]["rounds"] for label, *_ in rows}
    for label, *_, rate, _ in rows:
        agree(rate, statistics.median(rounds[label]))
    agree_ratio(rows[1][-1], rounds["full ViT"], rounds["STViT"])


def test_video() -> None:
    said = sentence(CARD, "reach # % at 45.7 million MACs a clip, all tokens # % at")
    found = [of_table("moving_glyphs", name) for name in ("moving_glyphs", "moving_glyphs_full")]
    assert [[run["seed"] for run in runs_] for runs_ in found] == [[0], [0]]
    tops = [100 * runs_[0]["metrics"]["top1"] for runs_ in found]
    for text, value in zip(said.groups(), tops, strict=True):
        agree(text, value)
    agree(sentence(CARD, "Semantic tokens were # points below")[1], tops[1] - tops[0])


SPEED = {
    "STViT-DeiT-T": "deit_tiny",
    "STViT-DeiT-S": "deit_small",
    "STViT-DeiT-B": "deit_base",
    "STViT-Swin-T": "swin_tiny",
    "STViT-R-Swin-S": "r_swin_small",
    "STViT-R-Swin-S, four maps of 800 x 1280": "dense_small",
}


@pytest.mark.parametrize("text", [CARD, HISTORY], ids=["card", "history"])
def test_speed(text: str) -> None:
    _, rows = table(text, "model | against")
    assert len(rows) > 3
    for label, against, macs, *rates, ratio in rows:
        kept = stored("benchmarks/stvit")[SPEED[label]]
        other = next(
            name for name in kept["models"] if name != "ours" and ("per window" in name) == ("per window" in against)
        )
        both = [kept["models"]["ours"], kept["models"][other]]
        for key, cell in zip(("gmacs", "images_per_second"), (macs, *rates), strict=False):
            for one, model in zip(numbers(cell), both, strict=True):
                agree(one, model[key])
        rounds = kept["speedup"][other]["rounds"]
        for one, value in zip(numbers(ratio), (statistics.median(rounds), min(rounds), max(rounds)), strict=True):
            agree(one, value)
