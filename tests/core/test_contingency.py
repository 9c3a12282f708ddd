"""Contingency tables, the scores that follow from them, and their reduction over images, batches and processes."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from core.errors import ConfigError
from core.metrics import ARI, BestOverlap, ClusterMIoU, ForegroundIoU, GroupingScores, SegCover, TorchMetrics
from core.metrics.contingency import (
    adjusted_rand,
    class_iou,
    contingency,
    covering,
    foreground_overlap,
    match_clusters,
    matched_overlap,
    overlaps,
    pieces,
    present,
    recovered,
    without,
)
from core.metrics.grouping import as_segments
from tests import forked

ROOT = Path(__file__).resolve().parents[2]


def pictures(images=6, side=24, objects=5, slots=7, seed=0):
    """Truth and a prediction that half agrees with it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(objects, (images, side // 4, side // 4), generator=generator)
    truth = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    noise = torch.randint(slots, truth.shape, generator=generator)
    return truth, torch.where(torch.rand(truth.shape, generator=generator) > 0.4, (truth + 2) % slots, noise)


# ---------------------------------------------------------------------- tables
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_tables_count_label_pairs_of_every_image(kind):
    truth, prediction = pictures()
    tables = contingency(truth.to(kind), prediction.to(kind), 6, 9)
    assert tables.shape == (6, 6, 9) and tables.dtype == torch.int64
    for table, t, p in zip(tables, truth, prediction, strict=True):
        for i in range(6):
            for j in range(9):
                assert table[i, j] == ((t == i) & (p == j)).sum()


def test_sizes_follow_from_the_labels_and_masked_labels_do_not_matter():
    truth, prediction = pictures()
    valid = torch.rand(truth.shape) > 0.3
    assert contingency(truth, prediction).shape == (6, 5, 7)
    plain = contingency(truth.where(valid, 0), prediction, 5, 7, valid)
    assert torch.equal(contingency(truth.where(valid, 255), prediction.where(valid, -1), 5, 7, valid), plain)
    assert torch.equal(plain.sum(dim=(1, 2)), valid.sum(dim=(1, 2)))
    for table, t, p, v in zip(plain, truth, prediction, valid, strict=True):
        assert torch.equal(table, contingency(t[v][None], p[v][None], 5, 7)[0])


def test_bool_masks_and_empty_batches():
    mask = torch.tensor([[True, False, False]])
    assert contingency(mask, mask).tolist() == [[[2, 0], [0, 1]]]
    assert contingency(
        torch.zeros(0, 4, 4, dtype=torch.int64), torch.zeros(0, 4, 4, dtype=torch.int64), 3, 2
    ).shape == (
        0,
        3,
        2,
    )


@pytest.mark.parametrize(
    ("target", "prediction", "message"),
    [
        (torch.zeros(1, 4, 4).long(), torch.zeros(1, 8, 8).long(), "differ in shape"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4).long(), "integers"),
        (torch.full((1, 4), 3), torch.zeros(1, 4).long(), "target has labels from 3 to 3, expected 0 to 2"),
        (torch.zeros(1, 4).long(), torch.full((1, 4), -1), "prediction has labels from -1"),
    ],
)
def test_what_cannot_be_counted_is_said(target, prediction, message):
    with pytest.raises(ValueError, match=message):
        contingency(target, prediction, 3, 3)


# ---------------------------------------------------------------------- scores
@pytest.mark.parametrize("objects", [1, 2, 5, 9])
@pytest.mark.parametrize("slots", [1, 2, 7, 24])
def test_adjusted_rand_is_that_of_scikit_learn(objects, slots):
    truth, prediction = pictures(objects=objects, slots=slots, seed=objects * slots)
    want = [adjusted_rand_score(t.flatten(), p.flatten()) for t, p in zip(truth, prediction, strict=True)]
    assert adjusted_rand(contingency(truth, prediction)).numpy() == pytest.approx(want, abs=1e-6)


def test_adjusted_rand_at_the_size_of_real_pictures_and_of_single_pixels():
    truth, prediction = pictures(images=2, side=320)
    want = [adjusted_rand_score(t.flatten(), p.flatten()) for t, p in zip(truth, prediction, strict=True)]
    assert adjusted_rand(contingency(truth, prediction)).numpy() == pytest.approx(want, abs=1e-9)
    for pixels in (1, 2, 5):
        each = torch.arange(pixels)[None]
        together = torch.zeros(1, pixels, dtype=torch.int64)
        for a, b in ((each, each), (each, together), (together, each), (together, together)):
            assert float(adjusted_rand(contingency(a, b))) == pytest.approx(adjusted_rand_score(a[0], b[0]), abs=1e-12)


def test_adjusted_rand_of_the_foreground():
    truth, prediction = pictures(objects=4)
    want = [adjusted_rand_score(t[t > 0], p[t > 0]) for t, p in zip(truth, prediction, strict=True)]
    assert adjusted_rand(without(contingency(truth, prediction))).numpy() == pytest.approx(want, abs=1e-12)
    one = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    both = torch.tensor([[0, 1, 2, 2], [0, 1, 2, 3]])
    # A single object: all of it in one slot, or nothing.
    assert adjusted_rand(without(contingency(one, both))).tolist() == [1.0, 0.0]


def brute_force(truth, prediction, slots):
    """IoU of every true label in a picture with every slot."""
    return {
        int(label): [
            float(((truth == label) & (prediction == j)).sum() / ((truth == label) | (prediction == j)).sum())
            for j in range(slots)
        ]
        for label in truth.unique()
    }


def test_coverings_matching_and_recovery_against_loops_over_labels():
    truth, prediction = pictures(objects=4)
    table = contingency(truth, prediction, 6, 7)
    for image, (t, p) in enumerate(zip(truth, prediction, strict=True)):
        iou = brute_force(t, p, 7)
        best = {label: max(values) for label, values in iou.items()}
        area = {label: int((t == label).sum()) for label in iou}
        things = [label for label in iou if label > 0]
        assert float(covering(table)[image]) == pytest.approx(np.mean(list(best.values())))
        assert float(covering(table, 0)[image]) == pytest.approx(np.mean([best[i] for i in things]))
        weighted = sum(best[i] * area[i] for i in iou) / sum(area.values())
        assert float(covering(table, weighted=True)[image]) == pytest.approx(weighted)
        weighted = sum(best[i] * area[i] for i in things) / sum(area[i] for i in things)
        assert float(covering(table, 0, weighted=True)[image]) == pytest.approx(weighted)
        matrix = np.array([iou[i] for i in things])
        matched = matrix[linear_sum_assignment(matrix, maximize=True)].sum() / len(things)
        assert float(matched_overlap(table)[image]) == pytest.approx(matched)
        assert float(recovered(table, 0.4)[image]) == pytest.approx(np.mean([best[i] > 0.4 for i in things]))
        assert present(table)[image].nonzero().flatten().tolist() == sorted(iou)


def test_more_objects_than_slots_leave_objects_without_partner():
    truth = torch.tensor([[1, 1, 2, 2, 3, 3]])
    table = contingency(truth, torch.tensor([[0, 0, 0, 0, 1, 1]]))
    # Best overlaps are 1/2, 1/2, 1; one to one, one of the first two gets nothing.
    assert float(covering(table, 0)) == pytest.approx(2 / 3)
    assert float(matched_overlap(table)) == pytest.approx(0.5)
    assert float(recovered(table, 0.5)) == pytest.approx(1 / 3)


def test_foreground_overlap_of_every_slot():
    truth = torch.tensor([[0, 0, 1, 2]])
    iou, dice = foreground_overlap(contingency(truth, torch.tensor([[0, 1, 1, 1]]), 3, 3))
    assert iou[0].tolist() == pytest.approx([0, 2 / 3, 0], abs=1e-7)
    assert dice[0].tolist() == pytest.approx([0, 4 / 5, 0], abs=1e-7)


def test_pieces_have_a_share_of_the_image_or_of_one_label():
    table = torch.tensor([[[80, 9, 10, 1], [0, 0, 99, 1]], [[100, 0, 0, 0], [0, 0, 50, 50]]])
    assert pieces(table, 0.01).tolist() == [4, 3]  # 80, 9, 109 and 2 of 200; 100, 50, 50
    assert pieces(table, 0.02).tolist() == [3, 3]
    assert pieces(table, 0.1, label=0).tolist() == [2, 1]  # 80 and 10 of the background's 100; 9 is too few
    assert pieces(torch.zeros(1, 2, 3), 0.1, label=0).tolist() == [0]
    truth, found = torch.zeros(1, 4, 4, dtype=torch.long), torch.arange(16).reshape(1, 4, 4) // 8
    scores = GroupingScores(["segments_in_use", "background_pieces"])
    scores.update(found, truth)  # an image without an object counts
    assert {name: float(value) for name, value in scores.compute().items()} == dict.fromkeys(scores.figures, 2.0)


def test_images_without_objects_score_zero_in_what_needs_objects():
    table = contingency(torch.zeros(1, 4).long(), torch.tensor([[0, 0, 1, 1]]))
    assert covering(table, 0).tolist() == matched_overlap(table).tolist() == recovered(table).tolist() == [0]
    assert covering(table).tolist() == [0.5]
    assert adjusted_rand(without(table)).tolist() == [1]


# ---------------------------------------------------------------------- clusters
def test_clusters_find_their_classes_one_to_one_or_each_by_itself():
    # Cluster 1 holds more of class 0 than of class 1 in pixels, but overlaps class 1 more.
    table = torch.tensor([[90, 0], [12, 10]])
    assert overlaps(table[None])[0, 1].tolist() == pytest.approx([12 / 112, 10 / 22])
    assert match_clusters(table).tolist() == match_clusters(table, "majority").tolist() == [0, 1]
    assert class_iou(table, match_clusters(table)).tolist() == pytest.approx([90 / 102, 10 / 22])
    # Both clusters fit class 0 best; one to one, the second has to be content with class 1.
    table = torch.tensor([[50, 0], [40, 1]])
    assert match_clusters(table, "majority").tolist() == [0, 0]
    assert match_clusters(table, "hungarian").tolist() == [0, 1]
    assert class_iou(table, torch.tensor([0, 0])).tolist() == pytest.approx([90 / 91, 0])


def test_one_to_one_matching_maximises_overlap_not_pixels():
    # The diagonal has 12 of 23 pixels but overlaps of 12/23 and 0; the other pairing has 8/20 and 3/15.
    table = torch.tensor([[12, 8], [3, 0]])
    assert match_clusters(table, "hungarian").tolist() == [1, 0]


def test_more_clusters_than_classes_are_merged():
    table = torch.tensor([[5, 0], [4, 1], [0, 8]])
    assert match_clusters(table).tolist() == [0, 0, 1]
    assert class_iou(table, match_clusters(table)).tolist() == pytest.approx([9 / 10, 8 / 9])
    with pytest.raises(ValueError, match="one to one"):
        match_clusters(table, "hungarian")
    with pytest.raises(ValueError, match="how="):
        match_clusters(table, "best")


def test_cluster_miou_adds_up_over_batches_and_leaves_ignored_pixels_out():
    truth, prediction = pictures(objects=4, slots=4)
    truth[:, :3] = 255
    whole, parts = ClusterMIoU(4, 4), ClusterMIoU(4, 4)
    whole.update(prediction, truth)
    for i in range(len(truth)):
        parts.update(prediction[i : i + 1], truth[i : i + 1, None])
    assert float(whole.compute()) == float(parts.compute())
    table = torch.tensor([[((prediction == p) & (truth == c)).sum() for c in range(4)] for p in range(4)])
    assert float(whole.compute()) == pytest.approx(float(class_iou(table, match_clusters(table)).mean()))


# ---------------------------------------------------------------------- metrics
def three_images():
    """An image with two objects, one with a single object, one without any."""
    truth = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).view(3, 1, 6)
    prediction = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).view(3, 1, 6)
    return truth, prediction


def test_images_without_objects_are_passed_over_or_counted_by_protocol():
    truth, prediction = three_images()
    first = adjusted_rand_score([1, 1, 2, 2], [1, 1, 1, 2])
    scores = {}
    for protocol in ("standard", "official"):
        metric = GroupingScores(("fg_ari", "msc_fg", "mbo", "msc"), protocol, aggregate="image")
        metric.update(prediction, truth)
        scores[protocol] = {name: float(v) for name, v in metric.compute().items()}
    best = (2 / 3 + 1 / 2, 2 / 3)  # objects 1 and 2 of the first image; the object of the second
    assert scores["standard"]["fg_ari"] == pytest.approx((first + 1) / 2)
    assert scores["official"]["fg_ari"] == pytest.approx((first + 1 + 1) / 3)
    assert scores["standard"]["msc_fg"] == pytest.approx((best[0] / 2 + best[1]) / 2)
    assert scores["official"]["msc_fg"] == pytest.approx((best[0] / 2 + best[1]) / 3)
    assert scores["standard"]["mbo"] == scores["official"]["mbo"] == scores["standard"]["msc_fg"]
    whole = ((1 + best[0]) / 3, (3 / 4 + best[1]) / 2, 4 / 6)
    assert scores["standard"]["msc"] == scores["official"]["msc"] == pytest.approx(sum(whole) / 3)


def test_the_official_mean_is_of_batches():
    truth, prediction = pictures(images=5)
    values = adjusted_rand(contingency(truth, prediction))
    image, batch = ARI(), ARI(protocol="official")
    for metric in (image, batch):
        metric.update(prediction[:4], truth[:4])
        metric.update(prediction[4:], truth[4:])
    assert float(image.compute()) == pytest.approx(float(values.mean()))
    assert float(batch.compute()) == pytest.approx(float((values[:4].mean() + values[4]) / 2))
    assert float(ARI(protocol="official", aggregate="image").forward(prediction, truth)) == pytest.approx(
        float(values.mean())
    )


def test_single_scores_are_those_of_the_tables():
    truth, prediction = pictures(objects=3)
    table = contingency(truth, prediction)
    iou, dice = foreground_overlap(table)
    for metric, want in (
        (ARI(), adjusted_rand(table)),
        (ARI(foreground=True), adjusted_rand(without(table))),
        (BestOverlap(), covering(table, 0)),
        (SegCover(), covering(table)),
        (SegCover(weighted=True), covering(table, weighted=True)),
        (SegCover(foreground=True), covering(table, 0)),
        (SegCover(weighted=True, foreground=True), covering(table, 0, weighted=True)),
    ):
        metric.update(prediction, truth)
        assert float(metric.compute()) == pytest.approx(float(want.mean()), abs=1e-12)
    shares = recovered(table)
    corloc = GroupingScores(("corloc", "recovery"))
    corloc.update(prediction, truth)
    found = {name: float(v) for name, v in corloc.compute().items()}
    assert found == pytest.approx({"corloc": float((shares > 0).double().mean()), "recovery": float(shares.mean())})
    assert found["corloc"] > found["recovery"] > 0
    metric = ForegroundIoU()
    metric.update(prediction, truth)
    found = {name: float(v) for name, v in metric.compute().items()}
    assert found == pytest.approx({"iou": float(iou.amax(1).mean()), "dice": float(dice.amax(1).mean())})


def test_void_pixels_and_an_ignored_label_are_the_same():
    truth, prediction = pictures(objects=4)
    void = torch.rand(truth.shape) > 0.7
    names = ("ari", "fg_ari", "mbo", "miou", "recovery", "corloc", "iou")
    by_mask, by_label, counted = GroupingScores(names), GroupingScores(names, ignore=255), GroupingScores(names)
    by_mask.update(prediction, truth, void)
    by_label.update(prediction, truth.masked_fill(void, 255))
    counted.update(prediction, truth.masked_fill(void, 255))
    assert by_mask.compute() == by_label.compute()
    assert float(counted.compute()["ari"]) != pytest.approx(float(by_mask.compute()["ari"]), abs=1e-3)
    # Both at once.
    both = GroupingScores(names, ignore=255)
    first, second = void & (truth > 1), void & (truth <= 1)
    both.update(prediction, truth.masked_fill(first, 255), second)
    assert both.compute() == by_label.compute()
    # An image that is void throughout does not count at all.
    by_mask.update(prediction, truth, torch.ones_like(void))
    assert by_mask.compute() == by_label.compute()


def test_draws_give_a_mean_and_a_deviation():
    truth, prediction = pictures()
    others = torch.stack([prediction, truth, prediction.roll(1, 2)], dim=1)
    metric = GroupingScores(("ari",), draws=3)
    metric.update(others[:4], truth[:4])
    metric.update(others[4:], truth[4:])
    each = [float(adjusted_rand(contingency(truth, others[:, d])).mean()) for d in range(3)]
    found = metric.compute()
    assert float(found["ari"]) == pytest.approx(np.mean(each))
    assert float(found["ari_std"]) == pytest.approx(np.std(each, ddof=1))
    with pytest.raises(ValueError, match="draws=3"):
        metric.update(prediction, truth)


def test_masks_decide_by_their_largest():
    masks = torch.rand(2, 5, 4, 6)
    assert torch.equal(as_segments(masks), masks.argmax(1))
    assert torch.equal(as_segments(masks[:, :, None]), masks.argmax(1))
    assert torch.equal(as_segments(torch.stack([masks, masks], 1)), torch.stack([masks.argmax(1)] * 2, 1))
    truth = masks.argmax(1)
    metric = ARI()
    metric.update(masks, truth[:, None])
    assert float(metric.compute()) == 1


def test_unknown_words_are_refused():
    with pytest.raises(ConfigError, match=r"did you mean.*fg_ari"):
        GroupingScores(["fg_arii"])
    with pytest.raises(ConfigError, match="protocol=offical"):
        ARI(protocol="offical")
    with pytest.raises(ConfigError, match="draws=0"):
        ARI(draws=0)


def test_nothing_to_average_is_an_error_in_an_evaluation():
    evaluator = TorchMetrics({"fg": ARI(foreground=True)}, prediction="segments", target="mask")
    evaluator.process({}, {"segments": torch.zeros(1, 4, 4).long(), "mask": torch.zeros(1, 4, 4).long()})
    with pytest.raises(ValueError, match="fg came out as NaN"):
        evaluator.evaluate(1)


@pytest.mark.processes
def test_two_processes_reduce_to_the_figures_of_one(tmp_path):
    script = tmp_path / "share.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch, torch.distributed as dist
            sys.path.insert(0, sys.argv[1])
            from core.metrics import ClusterMIoU, GroupingScores, TorchMetrics
            dist.init_process_group("gloo")
            generator = torch.Generator().manual_seed(0)
            truth = torch.randint(4, (5, 8, 8), generator=generator)
            found = torch.where(torch.rand(5, 8, 8, generator=generator) > .5, truth, 0)
            def evaluate(indices):
                names = ("ari", "fg_ari", "mbo", "iou")
                metrics = {"scores": GroupingScores(names), "clusters": ClusterMIoU(4, 4)}
                evaluator = TorchMetrics(metrics, prediction="segments", target="mask")
                for i in indices:
                    evaluator.process({}, {"segments": found[i:i + 1], "mask": truth[i:i + 1], "sample_id": [str(i)]})
                return evaluator
            shared = evaluate(range(dist.get_rank(), 5, 2)).evaluate(5)
            rank = dist.get_rank()
            dist.destroy_process_group()
            alone = evaluate(range(5)).evaluate(5)
            assert shared.keys() == alone.keys() and len(shared) == 5
            for name in alone:
                assert abs(shared[name] - alone[name]) < 1e-12, (rank, name, shared[name], alone[name])
            print("agreed", rank)
            """
        )
    )
    done = forked.run([str(script), str(ROOT)], script.parent, dict(os.environ), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agreed") == 2
