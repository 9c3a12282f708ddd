"""Semantic segmentation: k-means by cosine, clusters that become classes, and processes that share the work."""

from __future__ import annotations

import os
import statistics
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from core.errors import ConfigError
from core.layers.clusters import spherical_kmeans
from core.metrics import ClusterMIoU
from slot_walks.metrics.semantic import SemanticSegmentation, cluster_table
from tests import forked

ROOT = Path(__file__).resolve().parents[2]


def bundles(clusters=6, each=30, dim=16, spread=0.25, seed=0):
    """Directions with vectors of any length around them."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(clusters, dim, generator=generator), dim=1)
    labels = torch.arange(clusters).repeat(each)
    vectors = centres[labels] + spread * torch.randn(len(labels), dim, generator=generator) / dim**0.5
    return vectors * (0.1 + 5 * torch.rand(len(labels), 1, generator=generator)), labels


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_kmeans_finds_bundles_by_direction_alone(init):
    vectors, labels = bundles()
    found, centres = spherical_kmeans(vectors, 6, init=init, restarts=10)
    pairs = {(int(a), int(b)) for a, b in zip(found, labels, strict=True)}
    assert len(pairs) == 6  # one cluster for each bundle
    assert torch.allclose(centres.norm(dim=1), torch.ones(6))
    unit = F.normalize(vectors, dim=1)
    assert torch.equal((unit @ centres.T).argmax(1), found)
    for cluster in range(6):
        mean = F.normalize(unit[found == cluster].sum(0), dim=0)
        assert torch.allclose(mean, centres[cluster], atol=1e-5)


def test_kmeans_is_repeatable_and_its_best_restart_counts():
    vectors, _ = bundles(clusters=8, spread=1.5)
    first, again = (spherical_kmeans(vectors, 8, seed=3)[1] for _ in range(2))
    assert torch.equal(first, again)
    unit = F.normalize(vectors, dim=1)

    def score(**options):
        _, centres = spherical_kmeans(vectors, 8, **options)
        return float((unit @ centres.T).amax(1).mean())

    singles = [score(seed=seed, restarts=1) for seed in range(6)]
    assert len({round(s, 6) for s in singles}) > 1
    assert score(seed=0, restarts=20) >= max(singles) - 1e-3 > min(singles)


def test_spread_starts_find_small_bundles_at_once():
    # One bundle has nearly all vectors: starts drawn evenly would nearly all lie in it.
    vectors, labels = bundles(clusters=4, each=100, spread=0.01)
    kept = (labels == 0) | (torch.arange(len(labels)) < 12)
    for seed in range(10):
        found, _ = spherical_kmeans(vectors[kept], 4, seed=seed, restarts=1)
        assert len({(int(a), int(b)) for a, b in zip(found, labels[kept], strict=True)}) == 4


def test_kmeans_keeps_every_cluster_in_use():
    # Two directions only, but one vector apart: without new seeds for empty clusters one would stay unused.
    vectors = torch.cat([torch.tensor([[1.0, 0, 0]]).repeat(20, 1), torch.tensor([[0, 1.0, 0], [0.1, 0, 1.0]])])
    for seed in range(5):
        found, _ = spherical_kmeans(vectors, 3, seed=seed, init="random", restarts=3)
        assert found.unique().numel() == 3
    assert spherical_kmeans(torch.ones(5, 3), 2)[0].shape == (5,)
    for wrong in (dict(clusters=30), dict(clusters=2, init="far")):
        with pytest.raises(ValueError, match=r"clusters|init="):
            spherical_kmeans(vectors, **wrong)


def scenes(images=10, slots=4, classes=5, dim=12, noise=0.05, seed=0):
    """Pictures whose slots are classes, in an order of their own, with vectors that tell which."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    kinds = torch.stack([torch.randperm(classes, generator=generator)[:slots] for _ in range(images)])
    segments = torch.randint(slots, (images, 12, 12), generator=generator)
    target = kinds.gather(1, segments.flatten(1)).view(segments.shape)
    regions = centres[kinds] + noise * torch.randn(images, slots, dim, generator=generator)
    return {
        "segments": segments.to(torch.uint8),
        "regions": regions,
        "mask": target,
        "sample_id": [f"{i:03d}" for i in range(images)],
    }


def evaluated(everything, order=None, cut=3, **options):
    evaluator = SemanticSegmentation(**{"num_clusters": 5, "num_classes": 5, "restarts": 3, "seeds": 2, **options})
    order = list(range(len(everything["mask"]))) if order is None else order
    for part in (order[:cut], order[cut:]):
        taken = {k: [v[i] for i in part] if isinstance(v, list) else v[part] for k, v in everything.items()}
        evaluator.process({"mask": taken.pop("mask")}, taken)
    return evaluator.evaluate(len(order))


def test_slots_that_are_classes_score_one():
    figures = evaluated(scenes())
    assert figures == {
        "miou": 1.0,
        "miou_std": 0.0,
        "miou_majority": 1.0,
        "miou_majority_std": 0.0,
        "miou_hungarian": 1.0,
        "miou_hungarian_std": 0.0,
    }


def test_counting_by_slots_is_painting_by_pixels():
    everything = scenes(noise=2.0)
    everything["mask"][:, :2] = 255
    figures = evaluated(everything, seeds=1, num_clusters=7)
    labels, _ = spherical_kmeans(everything["regions"].flatten(0, 1), 7, seed=0, restarts=3)
    labels = labels.view(10, 4)
    painted = labels.gather(1, everything["segments"].long().flatten(1)).view(everything["mask"].shape)
    metric = ClusterMIoU(7, 5)
    metric.update(painted, everything["mask"])
    assert figures == {"miou": pytest.approx(float(metric.compute())), "miou_majority": figures["miou"]}
    assert 0.1 < figures["miou"] < 0.95
    counts = torch.stack([torch.stack([m == c for c in range(5)]).flatten(1).sum(1) for m in everything["mask"]])
    assert int(cluster_table(labels[:, :1], counts[:, None], 7).sum()) == int(counts.sum())


def test_the_order_of_pictures_does_not_matter():
    everything = scenes(noise=2.0)
    order = [7, 2, 9, 0, 4, 1, 8, 3, 6, 5]
    assert evaluated(everything) == evaluated(everything, order, cut=7)
    assert evaluated(everything) != evaluated(scenes(noise=2.0, seed=1))


def test_matching_and_seeds_are_chosen():
    everything = scenes(noise=2.5)
    figures = evaluated(everything, seeds=5)
    assert figures["miou"] == figures["miou_hungarian"] and figures["miou_std"] > 0
    by_majority = evaluated(everything, seeds=5, match="majority")
    assert by_majority["miou"] == by_majority["miou_majority"] == figures["miou_majority"]
    assert figures["miou_majority"] != figures["miou_hungarian"]
    singles = [evaluated(everything, seeds=1, seed=seed)["miou"] for seed in range(5)]
    assert figures["miou"] == pytest.approx(sum(singles) / 5)
    assert figures["miou_std"] == pytest.approx(statistics.stdev(singles))
    assert evaluated(everything, prefix="voc", seeds=1).keys() == {
        "voc/miou",
        "voc/miou_majority",
        "voc/miou_hungarian",
    }


def test_the_first_of_several_draws_belongs_to_the_regions():
    everything = scenes(noise=1.0)
    plain = evaluated(everything)
    segments = everything["segments"]
    assert evaluated({**everything, "segments": torch.stack([segments, segments.flip(1)], dim=1)}) == plain


def test_what_cannot_be_evaluated_is_said():
    everything = scenes()
    with pytest.raises(ValueError, match=r"region vectors \(B, K, C\)"):
        evaluated({**everything, "regions": everything["regions"][..., 0]})
    with pytest.raises(ValueError, match="target has labels from 0 to 4, expected 0 to 2"):
        evaluated({**everything, "mask": everything["mask"].clamp(max=4)}, num_classes=3, num_clusters=5)
    with pytest.raises(ValueError, match="NaN"):
        evaluated({**everything, "regions": everything["regions"] * float("nan")})
    with pytest.raises(ValueError, match="do not make 50 clusters"):
        evaluated(everything, num_clusters=50)
    for wrong in (dict(match="best"), dict(init="far"), dict(seeds=0), dict(match="hungarian", num_clusters=7)):
        with pytest.raises(ConfigError, match="SemanticSegmentation"):
            evaluated(everything, **wrong)


@pytest.mark.processes
def test_two_processes_give_the_figures_of_one(tmp_path):
    script = tmp_path / "share.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/slot_walks"]
            import torch.distributed as dist
            from test_slot_walks_semantic import evaluated, scenes
            from slot_walks.metrics.semantic import SemanticSegmentation
            dist.init_process_group("gloo")
            everything, rank = scenes(noise=2.0), dist.get_rank()
            evaluator = SemanticSegmentation(5, 5, restarts=3, seeds=2)
            # Uneven shares, out of order.
            for i in ([8, 1, 5], [0, 9, 7, 3, 2, 6, 4])[rank]:
                evaluator.process({}, {k: v[i : i + 1] for k, v in everything.items()})
            shared = evaluator.evaluate(10)
            dist.destroy_process_group()
            assert shared == evaluated(everything), (rank, shared)
            print("agreed")
            """
        )
    )
    done = forked.run([str(script), str(ROOT)], script.parent, dict(os.environ), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agreed") == 2
