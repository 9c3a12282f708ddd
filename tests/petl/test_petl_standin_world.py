"""Cue swap: what is drawn, what its source network is, and the task that trains it."""

import pytest
import torch

import petl
from core.config import compose, to_dict
from core.errors import ConfigError
from petl.standin.cue_swap import CELL, FACTORS, to_rgb
from petl.standin.prepare import cue_source


def test_images_depend_on_seed_domain_split_and_index_alone():
    one, again = petl.CueSwap("target", "train", seed=3, count=12), petl.CueSwap("target", "train", seed=3, count=12)
    assert torch.equal(one[7]["image"], again[7]["image"]) and one[7]["sample_id"] == "target-train-3-7"
    for other in (("target", "train", 4), ("target", "test", 3), ("source", "train", 3)):
        assert not torch.equal(one[7]["image"], petl.CueSwap(*other, count=12)[7]["image"])
    first = one[0]["image"]
    first += 1
    assert not torch.equal(first, one[0]["image"])  # a sample is the reader's own


@pytest.mark.parametrize(("domain", "cue", "free"), [("source", 1, 2), ("target", 2, 1)])
def test_one_colour_marks_the_object_that_counts_and_the_other_does_not(domain, cue, free):
    drawn = petl.CueSwap(domain, "train", seed=0, count=400).drawn
    place = drawn.factors[:, 0]
    signs = {}
    for plane in (cue, free):
        cells = drawn.image[:, plane].unfold(1, 10, 11).unfold(2, 10, 11).mean((-1, -2)).flatten(1)  # (N, 9)
        signs[plane] = cells.gather(1, place[:, None])[:, 0] > 0
        best = cells.argmax(1) == place
        signs[plane, "best"] = best.float().mean()
    assert signs[cue].float().mean() > 0.99 and signs[cue, "best"] > 0.95
    assert 0.4 < signs[free].float().mean() < 0.6 and signs[free, "best"] < 0.7


def test_factors_are_balanced_and_the_target_is_shifted():
    source, target = (petl.CueSwap(d, "train", seed=0, count=900).drawn for d in ("source", "target"))
    for index, size in enumerate(FACTORS.values()):
        shares = torch.bincount(source.factors[:, index], minlength=size) / 900
        limit = 0.35 if len(shares) > 2 or index < 5 else 1.0
        assert len(shares) == size and (shares - 1 / size).abs().max() < limit
    assert target.image[:, 0].mean() - source.image[:, 0].mean() == pytest.approx(0.25, abs=0.02)
    assert CELL * 3 == 32
    picture = to_rgb(target.image[:4])
    assert picture.shape == (4, 3, 32, 32) and picture.min() >= 0 and picture.max() <= 1


@pytest.mark.parametrize(("words", "message"), [(("other",), "other/train"), (("target", "val"), "target/val")])
def test_unknown_parts_of_the_world_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        petl.CueSwap(*words)
    with pytest.raises(ValueError, match="count is at least 1"):
        petl.CueSwap(count=0)


def test_the_stem_reads_colours_by_few_channels_through_training():
    torch.manual_seed(0)
    network = petl.cue_backbone(num_classes=sum(FACTORS.values()))
    trainer = petl.SourceTrainer(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
    drawn = petl.CueSwap("source", "train", seed=0, count=16).drawn
    before = network.patch_embed.proj.weight.detach().clone()
    for _ in range(2):
        found = trainer.losses({"image": drawn.image, "factors": drawn.factors})
        optimizer.zero_grad()
        sum(value for name, value in found.items() if name.startswith("loss")).backward()
        optimizer.step()
    weight = network.patch_embed.proj.weight.detach()
    read = weight.abs().amax((2, 3)) > 0  # (C, 3)
    assert read.sum(0).tolist() == [116, 6, 6] and read.sum(1).max() == 1
    assert (weight - before).abs().amax((1, 2, 3)).min() > 0
    with pytest.raises(ConfigError, match="add up to 128"):
        petl.SourceTrainer(petl.cue_backbone(), stem=[100, 6, 6])


def test_a_missing_source_is_answered_with_the_command_that_trains_it(tmp_path):
    with pytest.raises(ConfigError, match=r"prepare_data\.py paper=petl task=cue_source"):
        petl.cue_backbone(tmp_path / "source_0.safetensors")


def test_the_task_trains_a_source_once_and_its_weights_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import core.config.composition as composition

    whole = composition.compose
    short = ["train_cfg.max_steps=2", "train_dataloader.dataset.count=128", "test_dataloader.dataset.count=20"]
    monkeypatch.setattr(composition, "compose", lambda words, *a, **k: whole([*words, *short], *a, **k))
    said = cue_source(output=tmp_path / "sources", seeds=[3])
    assert "source_3.safetensors: the place is right in" in said
    assert "was there" in cue_source(output=tmp_path / "sources", seeds=[3])
    torch.manual_seed(0)
    fresh = petl.cue_backbone()
    loaded = petl.cue_backbone(tmp_path / "sources" / "source_3.safetensors")
    assert not torch.equal(fresh.blocks[0].mlp.fc1.weight, loaded.blocks[0].mlp.fc1.weight)
    assert (loaded.patch_embed.proj.weight.abs().amax((2, 3)) > 0).sum(0).tolist() == [116, 6, 6]
    assert not (tmp_path / "sources" / "runs" / "source_3").exists()


def test_the_rows_name_their_source_by_one_key():
    cfg = to_dict(compose(["experiment=petl/cue_two_stage", "seed=4"]))
    assert cfg["model"]["network"]["backbone"]["source"] == "data/cue_swap/source_4.safetensors"
    bare = to_dict(compose(["experiment=petl/cue_two_stage", "vars.source=null"]))
    assert bare["model"]["network"]["backbone"]["source"] is None


def test_chosen_channels_are_counted_by_the_colour_they_read(tmp_path, capsys):
    from petl.standin.chosen import carried, main

    assert carried([0, 115, 116, 121, 122, 127]) == (2, 2) and carried([]) == (0, 0)
    run = tmp_path / "runs" / "one"
    (run / "stage_1_choose").mkdir(parents=True)
    scores = petl.Scores({"": [torch.arange(128.0)] * 2}, "attn", {"score": "taylor"})
    petl.save_choice(run / "stage_1_choose" / "channels.safetensors", scores.select(8), scores)
    (run / "result.json").write_text('{"seed": 4, "overrides": ["vars.k=8", "runtime=cpu"]}')
    main([str(tmp_path / "runs")])
    assert "taylor" in (said := capsys.readouterr().out) and "seed   4  2 old 6 new  2 old 6 new  vars.k=8" in said
