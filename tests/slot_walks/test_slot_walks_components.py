"""What the paper's tables vary is declared in the experiments, and every single change builds and takes a step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from torch.utils.data import default_collate

from core.config import compose
from core.engine.launch import build_trainer
from core.tables.ablation import Component, declared
from slot_walks import Blobworld
from tests.gradients import unreached

WALKS = {
    *("whole_part_whole", "part_whole_part", "target", "threshold", "temperature", "target_temperature"),
    *("target_position", "reduction", "number_of_slots", "iterations", "heads", "slot_start", "truncation"),
    *("mask_source", "training_signal"),
}
FEATURES = {"backbone", "layer", "facet", "final_norm", "image_size"}
REAL = ("birds", "cars", "coco", "cocostuff27", "dogs", "flowers", "movi_c", "movi_e", "voc", "voc_semseg")
DECODERS = {f"dinosaur_{data}{kind}" for data in ("voc", "coco", "movi_c", "movi_e") for kind in ("", "_transformer")}
# Of one experiment of each kind every change is built: standing for the others, whose components are the same.
BUILT = ("blobworld", "voc")


@cache
def components(name: str) -> dict[str, Component]:
    return {component.name: component for component in declared(compose([f"experiment=slot_walks/{name}"]))}


@pytest.mark.parametrize("name", ["blobworld", "blobworld_fe", *REAL])
def test_what_the_papers_tables_vary_is_declared(name: str) -> None:
    found = components(name)
    walks = WALKS - ({"part_whole_part"} if name.startswith("movi") else set())
    assert walks | (FEATURES if name in REAL else set()) <= set(found)
    values = {key: (component.default, component.alternatives) for key, component in found.items()}
    assert values["heads"] == (1, (2, 4)) and values["truncation"] == ("none", ("fixed_point", "bi_level"))
    assert values["threshold"] == (0.7, (0.0, 0.3, 0.5, 0.9))
    assert values["temperature"] == (0.1, (0.03, 0.05, 0.2, 0.5))
    assert values["target_temperature"] == (None, (0.03, 0.05, 0.2, 0.5))
    place = ("average", ("none", "product")) if name.startswith("movi") else ("none", ("average", "product"))
    assert values["target_position"] == place
    if name in REAL:
        assert values["layer"] == (None, (9, 10, 11)) and values["facet"] == ("token", ("query", "key", "value"))


def changes(name: str) -> list[pytest.param]:
    return [pytest.param(name, key, id=f"{name}-{key}") for key in components(name)]


@pytest.mark.long
@pytest.mark.parametrize(("name", "component"), [case for name in BUILT for case in changes(name)])
def test_each_change_builds_and_the_stand_in_takes_a_step(name: str, component: str) -> None:
    for change in components(name)[component].changes():
        cfg = compose([f"experiment=slot_walks/{name}", *change.overrides])
        if name != "blobworld":
            build_trainer(cfg, device="meta")
            continue
        model = build_trainer(cfg, device="cpu").train()
        data = Blobworld("train", count=2, size=32)
        total, _ = model.parse_losses(model.losses(default_collate([data[0], data[1]])))
        total.backward()
        assert unreached(model.network.encoder.attention) == [] and total.isfinite()


def test_another_backbone_brings_its_sizes_and_a_facet_no_last_norm() -> None:
    def network(*words: str) -> Mapping:
        return compose(["experiment=slot_walks/birds", *words]).model.network

    base = network("vars.backbone=dino_vitb16", "vars.weights.dino_vitb16=b16.pth")
    assert (base.backbone.patch_size, base.backbone.embed_dim, base.backbone.num_heads) == (16, 768, 12)
    assert (base.encoder.in_dim, base.encoder.dim, base.feature_grid) == (768, 768, 8)
    assert base.backbone.weights == "b16.pth" and base.backbone.final_norm is True
    assert network("model.network.backbone.facet=key").backbone.final_norm is False
    assert network("model.network.backbone.weights=s8.pth").backbone.weights == "s8.pth"


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_dinosaurs_recipes_are_those_of_its_authors(name: str) -> None:
    cfg = compose([f"experiment=slot_walks/{name}"])
    movi, transformer = "movi" in name, name.endswith("transformer")
    model = build_trainer(cfg, device="meta")
    encoder, decoder = model.network.encoder, model.network.decoder
    slots = {"voc": 6, "coco": 7, "movi_c": 11, "movi_e": 24}[
        name.removeprefix("dinosaur_").removesuffix("_transformer")
    ]
    channels = 384 if movi else 768
    assert (encoder.num_slots, encoder.dim, encoder.in_dim) == (slots, 128 if movi else 256, channels)
    assert encoder.attention.mlp[0].out_features == 4 * encoder.dim and encoder.project[1].out_features == channels
    assert model.network.backbone.patch_size == (8 if movi and not transformer else 16)
    if transformer:
        heads = 8 if "coco" in name else 4
        assert [block.heads for block in decoder.blocks] == [heads] * 4 and decoder.norm.normalized_shape == (channels,)
        assert model.mask_source == ("attention" if movi else "decoder")
    else:
        widths = [layer.out_features for layer in decoder.layers if isinstance(layer, torch.nn.Linear)]
        assert widths == [1024 if movi else 2048] * 3 + [channels + 1]
    assert cfg.train_cfg.max_steps == (300_000 if "voc" in name else 500_000)
    assert cfg.train_dataloader.batch_size == 64 and cfg.optim_wrapper.clip_grad == {"max_norm": 1.0, "norm_type": 2.0}
    schedule = cfg.param_scheduler
    assert (cfg.optim_wrapper.optimizer.lr, schedule.warmup, schedule.period, schedule.gamma) == (4e-4, 1e4, 1e5, 0.5)
    sizes = cfg.train_dataloader.dataset.transform, cfg.val_dataloader.dataset.transform
    assert (sizes[0].size, sizes[1].size, sizes[1].mask_size) == (224, 224, 128 if movi else 320)
