"""The figures of the card and of results/SEQGAN.md are those of the stored results, to the digits that are printed."""

from __future__ import annotations

import math
import re
import statistics

import pytest

from tests import cards
from tests.cards import ROOT, agree, agree_interval, agree_mean, agree_ratio, comparison, numbers, values

TEXT = "\n\n".join((ROOT / file).read_text() for file in ("seqgan/README.md", "results/SEQGAN.md"))


def stored(name: str) -> dict:
    return cards.stored(f"claims/{name}")


def table(first: str) -> list[list[str]]:
    """The cells of the rows below the header that begins with these cells."""
    return cards.table(TEXT, first)[1]


def sentence(pattern: str) -> re.Match[str]:
    return cards.sentence(TEXT, pattern)


FIRST = {
    "samples of the class asked for": "consistency_2",
    "the same, template judge": "template_2",
    "bits per code": "bits",
    "top-1 of codes": "top1",
    "perplexity of 64 codes": "perplexity",
    "toy-gFID, second decoder": "gfid_2",
    "L1 of the first phase": "l1_1",
    "PSNR of the first phase": "psnr_1",
    "toy-rFID, second decoder": "rfid_2",
}
SECOND = {
    "L1 after the second phase": "l1_2",
    "toy-gFID": "gfid_2",
    "judge network": "consistency_2",
    "template judge": "template_2",
}


CONTROL = "alpha 1, also in the second phase"


@pytest.mark.parametrize(("metrics", "other"), [(FIRST, "alpha 0"), (SECOND, CONTROL)], ids=["alpha 0", "control"])
def test_tables_of_the_claim(metrics: dict[str, str], other: str) -> None:
    claim = stored("seqgan")
    found = table(f"figure | {other.replace(',', '')} | alpha 1")
    assert len(found) == len(metrics)
    for (label, theirs, ours, difference, *asked, verdict, interval), (name, metric) in zip(
        found, metrics.items(), strict=True
    ):
        assert label.startswith(name)
        agree_mean(theirs, values(claim, other, metric))
        agree_mean(ours, values(claim, "alpha 1", metric))
        pair = (other, "alpha 1") if "worse with alpha 1" in label else ("alpha 1", other)
        held = comparison(claim, *pair, metric)
        scale = math.exp if held["kind"] == "factor" else float
        agree(numbers(difference)[0], scale(held["mean"] - 2 * held["standard_error"]))
        for one in asked:
            agree(numbers(one)[0], held["margin"])
        assert verdict.startswith(held["verdict"])
        low = held["interval95"][0]
        assert ("crosses zero" in verdict) == (held["verdict"] == "holds" and low < 0)
        agree_interval(interval, held)


def test_rows_that_hold_and_are_not_decided_are_counted() -> None:
    """Student's interval reaches what is asked: three rows against the control, and no other that holds."""
    claim = stored("seqgan")
    holds = [one for one in claim["comparisons"] if one["verdict"] == "holds"]
    open_rows = [one for one in holds if one["interval95"][0] < one["threshold"]]
    assert [one["than"] for one in open_rows] == [CONTROL] * 3
    sentence("three of the four rows against the control are **not decided**")
    six = stored("seqgan_six")
    assert six["holds"] == "holds" and len(six["comparisons"]) == 9
    assert claim["holds"] == "does not hold"


def test_what_is_said_of_the_second_phase_and_the_entropy_term() -> None:
    claim, plain = stored("seqgan"), "alpha 1, no entropy term"
    lower = sentence("lowers L1 from # to #, with the codes unchanged")
    agree_mean(lower[1], values(claim, "alpha 1", "l1_1"))
    agree_mean(lower[2], values(claim, "alpha 1", "l1_2"))
    assert all(run["metrics"]["codes_identical"] == 1 for row in claim["rows"] for run in row["runs"])
    entropy = sentence(
        "raises perplexity from # to # (asked: # more; holds); samples are as good without it (# and # by the"
    )
    agree_mean(entropy[1], values(claim, plain, "perplexity"))
    agree_mean(entropy[2], values(claim, "alpha 1", "perplexity"))
    held = comparison(claim, "alpha 1", plain, "perplexity")
    assert held["verdict"] == "holds" and float(entropy[3]) == held["margin"]
    for text, metric in zip(entropy.groups()[3:], ("consistency_2", "template_2"), strict=True):
        agree_mean(text, values(claim, plain, metric))
    agree_mean(sentence("by the two judges, toy-gFID #).")[1], values(claim, plain, "gfid_2"))
    shows = sentence("toy-gFID shows no advantage (# against #)")
    agree_mean(shows[1], values(claim, "alpha 1", "gfid_1"))
    agree_mean(shows[2], values(claim, "alpha 0", "gfid_1"))


def test_six_seeds() -> None:
    claim, later = stored("seqgan_six"), range(3, 6)
    alone = sentence(
        "judged alone (3 to 5) toy-rFID holds (# against #), and the factor of toy-gFID misses "
        "(x #, with two standard errors x #)"
    )
    agree_mean(alone[1], values(claim, "alpha 0", "rfid_2", later))
    agree_mean(alone[2], values(claim, "alpha 1", "rfid_2", later))
    pairs = zip(values(claim, "alpha 0", "gfid_2", later), values(claim, "alpha 1", "gfid_2", later), strict=True)
    ratios = [math.log(zero / one) for zero, one in pairs]
    error = statistics.stdev(ratios) / math.sqrt(3)
    agree(alone[3], math.exp(statistics.fmean(ratios)))
    agree(alone[4], math.exp(statistics.fmean(ratios) - 2 * error))
    said = sentence(
        "judges by # and #, bits by #, toy-gFID by x #, toy-rFID by #, each less two standard errors; "
        "t intervals # to #, # to #, # to #, x # to x #, # to #."
    )
    order = [("alpha 1", "alpha 0", name) for name in ("consistency_2", "template_2", "bits", "gfid_2")]
    for place, key in enumerate([*order, ("alpha 0", "alpha 1", "rfid_2")]):
        held = comparison(claim, *key)
        scale = math.exp if held["kind"] == "factor" else float
        agree(said[place + 1], scale(held["mean"] - 2 * held["standard_error"]))
        agree_interval(f"{said[6 + 2 * place]} to {said[7 + 2 * place]}", held)


def test_middle_alphas() -> None:
    claim, alphas = stored("seqgan_alphas"), ["0", "0.25", "0.5", "0.75", "0.9", "1"]
    said = sentence(
        "judge network #, #, #, #, # and # for alpha 0, 0.25, 0.5, 0.75, 0.9 and 1; toy-gFID #, #, #, #, #, #; "
        "L1 # to # up to 0.75, then # and #;"
    )
    for place, alpha in enumerate(alphas):
        agree_mean(said[1 + place], values(claim, f"alpha {alpha}", "consistency_2"))
        agree_mean(said[7 + place], values(claim, f"alpha {alpha}", "gfid_2"))
    l1 = [statistics.fmean(values(claim, f"alpha {alpha}", "l1_1")) for alpha in alphas]
    for text, value in zip(said.groups()[12:], (min(l1[:4]), max(l1[:4]), l1[4], l1[5]), strict=True):
        agree(text, value)
    bits = [statistics.fmean(values(claim, f"alpha {alpha}", "bits")) for alpha in alphas]
    assert min(bits[:4]) > bits[4] > bits[5], "bits do not fall before 0.9"
    grows = sentence("Perplexity grows all along (# to #)")
    use = [statistics.fmean(values(claim, f"alpha {alpha}", "perplexity")) for alpha in alphas]
    assert use == sorted(use)
    agree(grows[1], use[0])
    agree(grows[2], use[-1])
    assert claim["holds"] == "does not hold"
    upper = [one["verdict"] for one in claim["comparisons"] if {one["better"], one["than"]} == {"alpha 0.5", "alpha 1"}]
    assert upper == ["holds"] * 3, "from 0.5 to 1 all of it does"


VARIANTS = {
    "masked transformer": ("masked transformer", ("consistency_2", "template_2")),
    "2,500 steps": ("2,500 steps", ("consistency_2", "template_2")),
    "adversarial loss": ("adversarial", ("consistency_2", "template_2", "gfid_2")),
    "digits": ("digits", ("consistency_2", "template_2")),
}


def test_table_of_what_it_depends_on() -> None:
    claim = stored("seqgan_variants")
    rows = table("setting | judge network")
    assert rows[0][0] == "as the claim" and len(rows) == 5
    for label, *cells, verdict in rows:
        kind = next((kind for name, (kind, _) in VARIANTS.items() if label.startswith(name)), None)
        names = [f"alpha {a}, {kind}" if kind else f"alpha {a}" for a in (0, 1)]
        names = [f"digits, alpha {a}" for a in (0, 1)] if kind == "digits" else names
        for cell, metric in zip(cells, ("consistency_2", "template_2", "gfid_2", "l1_1"), strict=True):
            if cell != "the same":
                for text, name in zip(cell.split(" / "), names, strict=True):
                    agree_mean(text.strip("*"), values(claim, name, metric))
        for metric in next((held for name, (_, held) in VARIANTS.items() if label.startswith(name)), ()):
            found = comparison(claim, names[1], names[0], metric)
            assert found["verdict"] == "holds" and found["interval95"][0] > 0 and verdict.endswith("holds")
    digits = comparison(claim, "digits, alpha 1", "digits, alpha 0", "template_2")
    found = sentence("(digits, template judge: # to #)")
    agree_interval(f"{found[1]} to {found[2]}", digits)


def test_what_is_said_of_variants() -> None:
    claim = stored("seqgan_variants")
    longer = sentence("toy-gFID is # against # with the second decoder, # against # with the first")
    for place, (alpha, metric) in enumerate([(0, "gfid_2"), (1, "gfid_2"), (0, "gfid_1"), (1, "gfid_1")]):
        agree_mean(longer[1 + place], values(claim, f"alpha {alpha}, 2,500 steps", metric))
    adversarial = "alpha 1, adversarial"
    colours = sentence("L1 of the first phase # in place of #, pixel-FID # in place of #")
    keys = [(adversarial, "l1_1"), ("alpha 1", "l1_1"), (adversarial, "pixel_fid_2"), ("alpha 1", "pixel_fid_2")]
    for text, key in zip(colours.groups(), keys, strict=True):
        agree_mean(text, values(claim, *key))
    less = sentence("less consistency (# against #). Toy-rFID does not improve (# against #)")
    keys = [
        (adversarial, "consistency_2"),
        ("alpha 1", "consistency_2"),
        (adversarial, "rfid_2"),
        ("alpha 1", "rfid_2"),
    ]
    for text, key in zip(less.groups(), keys, strict=True):
        agree_mean(text, values(claim, *key))
    joint = sentence(
        "L1 # with attention on 6 x 6 positions and # with two residual blocks more at 6 x 6 and at 12 x 12 pixels, "
        "against #; toy-gFID of the first decoder # and # against #"
    )
    rows = ["alpha 0, attention trained jointly", "alpha 0, blocks trained jointly", "alpha 0"]
    for text, (row, metric) in zip(joint.groups(), [(row, m) for m in ("l1_1", "gfid_1") for row in rows], strict=True):
        agree_mean(text, values(claim, row, metric))
    hard = sentence(
        "the judge network is right on # and # of the second decoder's reconstructions, on # and # of samples"
    )
    keys = [(f"digits, alpha {a}", metric) for metric in ("class_accuracy_2", "consistency_2") for a in (0, 1)]
    for text, key in zip(hard.groups(), keys, strict=True):
        agree_mean(text, values(claim, *key))


def test_separability_and_terms_of_the_loss() -> None:
    claim = stored("seqgan_separability")
    assert [run["seed"] for row in claim["rows"] for run in row["runs"]] == [0, 1, 2] * 2
    said = sentence("on # of half the test images with alpha 1, on # with alpha 0")
    brief = sentence("from codes of # of the test images with alpha 1 and of # with alpha 0, which holds")
    features = sentence("from mean features before quantisation on # and #")
    for match, metric in ((said, "probe_codes"), (brief, "probe_codes"), (features, "probe_features")):
        agree_mean(match[1], values(claim, "alpha 1", metric))
        agree_mean(match[2], values(claim, "alpha 0", metric))
    intervals = sentence("t intervals of the differences # to # and # to #: both hold")
    for place, metric in ((1, "probe_codes"), (3, "probe_features")):
        found = comparison(claim, "alpha 1", "alpha 0", metric)
        agree_interval(f"{intervals[place]} to {intervals[place + 1]}", found)
        assert found["verdict"] == "holds" and found["interval95"][0] > 0
    terms = sentence("five shallow terms sum to # and the two semantic ones to # with alpha 0, to # and # with alpha 1")
    rows = [(f"alpha {alpha}", f"term_{part}") for alpha in (0, 1) for part in ("low", "semantic")]
    for text, key in zip(terms.groups(), rows, strict=True):
        agree_mean(text, values(claim, *key))
    low = sentence("shallow terms are lower with alpha 0 (t interval # to #: holds)")
    agree_interval(f"{low[1]} to {low[2]}", comparison(claim, "alpha 0", "alpha 1", "term_low"))
    semantic = comparison(claim, "alpha 1", "alpha 0", "term_semantic")
    uneven = sentence("lower with alpha 1 on all three seeds, but by too uneven amounts (t interval # to #)")
    agree_interval(f"{uneven[1]} to {uneven[2]}", semantic)
    assert min(semantic["differences"]) > 0 and semantic["verdict"] == "does not hold" == claim["holds"]


def test_speed() -> None:
    rows = {command.strip("`"): text for _, command, text in table("what | command")}
    names = ("sampling", "training", "parallel", "upsampling")
    kept = {name: cards.stored(f"benchmarks/seqgan_{name}") for name in names}
    for (command, _), record in zip(rows.items(), kept.values(), strict=True):
        assert record["command"] == f"python {command}"
    sampling, training, parallel, upsampling = rows.values()

    found = kept["sampling"]["sampling"]
    for text, value in zip(numbers(sampling), (*found["seconds"].values(), found["cached_over_anew"]), strict=False):
        agree(text, value)
    found = [kept["training"]["training"][name] for name in ("autoregressive", "masked")]
    values_ = [v for f in found for v in (*list(f["seconds"].values())[:2], f["kept_over_encoder"])]
    for text, value in zip(numbers(training), values_, strict=True):
        agree(text, value)
    said = cards.sentence(parallel, "one image # against # s, # x; eight images # against # s, # x. By count")
    found = [kept["parallel"]["parallel"][f"batch {batch}"] for batch in (1, 8)]
    values_ = [v for f in found for v in (f["seconds"]["parallel"], f["seconds"]["cached"], f["parallel_over_cached"])]
    for text, value in zip(said.groups(), values_, strict=True):
        agree(text, value)
    found = kept["upsampling"]["upsampling"]
    for part, name in zip(upsampling.split(","), ("forward", "with_gradients"), strict=True):
        rounds = found[name]["rounds"]
        agree_ratio(part.partition(";")[0], rounds["one_step"], rounds["plain"])
