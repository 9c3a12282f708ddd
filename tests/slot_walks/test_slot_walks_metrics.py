"""The evaluators of foreground extraction and object discovery, and golden cases of the released scorers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from core.config.registry import METRICS, build
from core.errors import ConfigError
from core.metrics import contingency
from core.metrics.contingency import adjusted_rand, covering, foreground_overlap, without
from slot_walks.metrics.grouping import ForegroundExtraction, ObjectDiscovery
from tests.parity.adapters.slot_walks_data import PIECES
from tests.parity.cases import Mismatch, load_case

CASES = Path(__file__).parents[1] / "parity" / "cases" / "slot_walks"


@pytest.mark.parametrize("name", ["metrics_od", "metrics_fe", "metrics_ocl", "semseg_hungarian", "semseg_majority"])
def test_scores_are_those_of_the_references(name):
    case = load_case(CASES / f"{name}.json")
    outputs = PIECES[case.piece](case)
    assert case.compare(outputs) < 1e-6
    for key in case.golden:  # the comparison would notice a difference in every output
        with pytest.raises(Mismatch, match=key):
            case.compare({**outputs, key: outputs[key] + 1})


def test_pictures_are_those_of_the_released_transforms():
    case = load_case(CASES / "transforms.json")
    outputs = PIECES[case.piece](case)
    assert case.compare(outputs) < 1e-5
    for key in ("od_val_image", "coco_train", "fe_image", "bird_image"):  # one step of the 8 bits is noticed
        with pytest.raises(Mismatch, match=key):
            case.compare({**outputs, key: outputs[key] + 1 / 255})


def batch(images=6, side=16, void=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(4, (images, side // 4, side // 4), generator=generator)
    mask = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    segments = torch.where(torch.rand(mask.shape, generator=generator) > 0.4, (mask + 1) % 5, 0).to(torch.uint8)
    # Two instances of one class, and one of another.
    classes = torch.tensor([0, 7, 7, 3])[mask]
    filled = {"segments": segments, "mask": mask, "classes": classes, "sample_id": [str(i) for i in range(images)]}
    return filled | ({"void": torch.rand(mask.shape, generator=generator) > 0.8} if void else {})


def halves(everything, cut):
    for part in (slice(None, cut), slice(cut, None)):
        yield {key: value[part] for key, value in everything.items()}


def evaluated(evaluator, everything, cut=4):
    for part in halves(everything, cut):
        evaluator.process(part, {"segments": part["segments"], "sample_id": part["sample_id"]})
    return evaluator.evaluate(len(everything["mask"]))


def test_object_discovery_reports_instances_and_classes_without_void_pixels():
    everything = batch()
    found = evaluated(ObjectDiscovery(), everything)
    kept = ~everything["void"]
    table = contingency(everything["mask"], everything["segments"].long(), valid=kept)
    ari = [
        adjusted_rand_score(m[k], s[k])
        for m, s, k in zip(everything["mask"], everything["segments"], kept, strict=True)
    ]
    assert found["ari"] == pytest.approx(sum(ari) / 6)
    assert found["fg_ari"] == pytest.approx(float(adjusted_rand(without(table)).mean()))
    assert found["mbo_i"] == pytest.approx(float(covering(table, 0).mean()))
    by_class = contingency(everything["classes"], everything["segments"].long(), valid=kept)
    assert found["mbo_c"] == pytest.approx(float(covering(by_class, 0).mean()))
    assert found["mbo_i"] != pytest.approx(found["mbo_c"], abs=1e-3)
    binding = {"segments_in_use", "background_pieces"}
    assert set(found) == {"ari", "fg_ari", "mbo_i", "mbo_c", "miou", "recovery", "corloc"} | binding


def test_means_of_predictions_stand_beside_the_scores():
    everything = batch() | {"gradient_cosine": torch.arange(6.0)}
    plain, found = (evaluated(ObjectDiscovery(means=keys), everything) for keys in ((), ("gradient_cosine",)))
    assert found == plain | {"gradient_cosine": pytest.approx(2.5)}
    prefixed = evaluated(ObjectDiscovery(means=["gradient_cosine"], prefix="val"), everything)
    assert prefixed == {f"val/{name}": value for name, value in found.items()}


def test_void_may_be_missing_and_classes_switched_off():
    plain, marked = batch(void=False), batch(void=False)
    marked["void"] = torch.zeros_like(plain["mask"], dtype=torch.bool)
    assert evaluated(ObjectDiscovery(), plain) == evaluated(ObjectDiscovery(), marked)
    del plain["classes"]
    found = evaluated(ObjectDiscovery(classes=None, prefix="voc"), plain)
    scores = ("ari", "fg_ari", "mbo_i", "miou", "recovery", "corloc", "segments_in_use", "background_pieces")
    assert set(found) == {f"voc/{name}" for name in scores}
    with pytest.raises(ValueError, match="classes"):
        evaluated(ObjectDiscovery(), plain)


def test_the_official_protocol_counts_void_as_object_and_averages_batches():
    everything = batch(void=False)
    everything["mask"][:, :4] = 255
    everything["mask"][5] = 0  # without objects: counts 1 in fg_ari, 0 in msc_fg
    found = evaluated(ObjectDiscovery("official"), everything)
    assert set(found) == {"ari", "fg_ari", "msc", "ssc", "msc_fg", "ssc_fg"}
    table = contingency(everything["mask"], everything["segments"].long())
    values = adjusted_rand(without(table))
    assert values[5] == 1
    assert found["fg_ari"] == pytest.approx(float((values[:4].mean() + values[4:].mean()) / 2))
    values = covering(table, 0)
    assert values[5] == 0
    assert found["msc_fg"] == pytest.approx(float((values[:4].mean() + values[4:].mean()) / 2))
    by_image = evaluated(ObjectDiscovery("official", aggregate="image"), everything)
    assert by_image["msc_fg"] == pytest.approx(float(values.mean()))


def test_foreground_takes_the_best_slot_for_each_figure():
    everything = batch(void=False)
    everything["mask"] = (everything["mask"] > 1).long()
    found = evaluated(ForegroundExtraction(), everything)
    iou, dice = foreground_overlap(contingency(everything["mask"], everything["segments"].long()))
    assert found["iou"] == pytest.approx(float(iou.amax(1).mean()))
    assert found["dice"] == pytest.approx(float(dice.amax(1).mean()))
    best = iou.amax(1)
    official = evaluated(ForegroundExtraction("official"), everything)
    assert official["iou"] == pytest.approx(float((best[:4].mean() + best[4:].mean()) / 2))
    assert evaluated(ForegroundExtraction("official", aggregate="image"), everything)["iou"] == found["iou"]


def test_several_draws_have_a_deviation():
    everything = batch()
    one = everything["segments"]
    everything["segments"] = torch.stack([one, one.roll(1, 1), one.roll(3, 2)], dim=1)
    found = evaluated(ObjectDiscovery(draws=3), everything)
    each = [
        evaluated(ObjectDiscovery(), {**everything, "segments": everything["segments"][:, draw]}) for draw in range(3)
    ]
    for name in ("fg_ari", "mbo_i", "mbo_c"):
        values = torch.tensor([figures[name] for figures in each], dtype=torch.float64)
        assert found[name] == pytest.approx(float(values.mean()))
        assert found[f"{name}_std"] == pytest.approx(float(values.std()))
    foreground = ForegroundExtraction(draws=3)
    assert set(evaluated(foreground, everything)) == {"iou", "dice", "ari", "iou_std", "dice_std", "ari_std"}
    with pytest.raises(ValueError, match="draws=1"):
        evaluated(ObjectDiscovery(), everything)


def test_counting_twice_or_nothing_is_an_error():
    everything = batch()
    evaluator = ObjectDiscovery()
    for _ in range(2):
        evaluator.process(everything, everything)
    with pytest.raises(ValueError, match="counted twice"):
        evaluator.evaluate(6)
    with pytest.raises(ValueError, match="not one sample"):
        evaluator.evaluate(6)
    with pytest.raises(ConfigError, match="protocol=offical"):
        ObjectDiscovery("offical")


def test_evaluators_are_built_from_configs():
    built = build({"type": "slot_walks.metrics.grouping.ObjectDiscovery", "protocol": "official", "draws": 2}, METRICS)
    assert isinstance(built, ObjectDiscovery) and built.metrics == [built]
    assert isinstance(
        build({"type": "slot_walks.metrics.grouping.ForegroundExtraction"}, METRICS), ForegroundExtraction
    )
