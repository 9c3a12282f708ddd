"""Parameter groups and the constructor: who gets which learning rate and decay, from which optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from core.errors import ConfigError
from core.optim.groups import (
    OptimConstructor,
    layer_scales,
    matches,
    model_layer_scales,
    norm_parameters,
    parameter_groups,
    split_decay,
    vit_layer_ids,
)
from core.optim.wrapper import OptimWrapper, OptimWrapperDict


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3, 2))


class ViT(nn.Module):
    """The parameters of a small ViT."""

    def __init__(self, dim: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, dim))
        self.patch_embed = nn.Conv2d(3, dim, 2)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.patch_embed(x).flatten(2).mean(-1)))


class NumberedViT(ViT):
    def param_layer_ids(self) -> dict[str, int]:
        return vit_layer_ids(n for n, _ in self.named_parameters())

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


class Net(nn.Module):
    """As a trainer holds its network."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or NumberedViT()
        self.probe = nn.Linear(4, 2)


ADAMW = {"type": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]}


def settings(wrapper: OptimWrapper) -> dict[str, tuple[float, float]]:
    """(lr, weight decay) by parameter name."""
    groups = wrapper.optimizer.param_groups
    return {n: (g["lr"], g["weight_decay"]) for g in groups for n in g["param_names"]}


def built(model: nn.Module, paramwise: dict | None = None, **config: Any) -> OptimWrapper:
    if paramwise is not None:
        config["paramwise"] = paramwise
    return OptimConstructor({"type": "core.OptimWrapper", "optimizer": ADAMW, **config})(model)


# ---------------------------------------------------------------------- pure functions
def test_patterns_match_whole_name_components() -> None:
    assert matches("network.blocks.0.attn.weight", "blocks.0.attn")
    assert matches("pos_embed", "pos_embed")
    assert not matches("network.pos_embedding", "pos_embed")
    assert not matches("blocks.10.attn.weight", "blocks.1")
    assert matches("blocks.10.attn.weight", "blocks.1*")
    assert matches("blocks.10.attn.weight", "*.attn.*")
    assert not matches("blocks.10.attn.weight", "attn.*")


def test_decay_rules_one_by_one() -> None:
    def spared(**options: Any) -> set[str]:
        model = ViT(depth=1)
        return set(split_decay(model.named_parameters(), **options)[1])

    biases = {"patch_embed.bias", "blocks.0.norm1.bias", "blocks.0.attn.bias", "norm.bias", "head.bias"}
    norms = {"blocks.0.norm1.weight", "blocks.0.norm1.bias", "norm.weight", "norm.bias"}
    table = "blocks.0.relative_position_bias_table"
    assert spared() == biases | norms
    assert spared(ndim_max=None) == biases
    assert spared(ndim_max=None, bias=False) == set()
    assert spared(ndim_max=None, bias=False, also=norm_parameters(ViT(depth=1))) == norms
    assert spared(ndim_max=None, bias=False, names=["relative_position_bias_table"]) == {table}
    assert spared(exempt=["blocks.0"]) == {"patch_embed.bias", "norm.weight", "norm.bias", "head.bias"}
    decayed, plain = split_decay(ViT(depth=1).named_parameters())
    assert sorted(decayed + plain) == sorted(n for n, _ in ViT(depth=1).named_parameters())


def test_layer_decay_of_maes_fine_tuning() -> None:
    # depth 3, decay 0.65 (official MAE): stem 0.65^4, blocks 0.65^3 .. 0.65, norm and head 1
    model = ViT(depth=3)
    _, plain = split_decay(model.named_parameters(), names=["pos_embed", "cls_token"])
    ids = vit_layer_ids(n for n, _ in model.named_parameters())
    groups = parameter_groups(
        model.named_parameters(), weight_decay=0.05, no_decay=plain, lr_scales=layer_scales(ids, 0.65)
    )
    scale = {n: g["lr_scale"] for g in groups for n in g["param_names"]}
    decay = {n: g["weight_decay"] for g in groups for n in g["param_names"]}
    assert scale["cls_token"] == scale["pos_embed"] == scale["patch_embed.weight"] == pytest.approx(0.17850625)
    assert [scale[f"blocks.{i}.attn.weight"] for i in range(3)] == pytest.approx([0.274625, 0.4225, 0.65])
    assert scale["norm.weight"] == scale["head.weight"] == 1.0
    assert decay["pos_embed"] == decay["cls_token"] == decay["norm.weight"] == decay["head.bias"] == 0.0
    assert decay["head.weight"] == decay["patch_embed.weight"] == 0.05
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_layer_ids_can_be_overridden_as_for_predictors() -> None:
    names = [
        "patch_embed.weight",
        *(f"blocks.{i}.weight" for i in range(12)),
        "score_predictor.1.weight",
        "norm.weight",
    ]
    ids = vit_layer_ids(names) | {"score_predictor.1.weight": 6}
    parameters = [(n, nn.Parameter(torch.zeros(2, 2))) for n in names]
    scale = {
        n: g["lr_scale"]
        for g in parameter_groups(parameters, lr_scales=layer_scales(ids, 0.75))
        for n in g["param_names"]
    }
    assert scale["score_predictor.1.weight"] == pytest.approx(0.13348388671875)
    assert scale["patch_embed.weight"] == pytest.approx(0.023757264018058777)
    assert scale["norm.weight"] == 1.0


def test_equal_parameters_share_a_group_and_tags_keep_apart() -> None:
    parameters = [(n, nn.Parameter(torch.zeros(2))) for n in ("a.x", "b.x", "c.x")]
    assert len(parameter_groups(parameters, lr=1.0)) == 1
    groups = parameter_groups(parameters, lr=1.0, tags={"special": ["b"]})
    assert [(g["tag"], g["param_names"]) for g in groups] == [("default", ["a.x", "c.x"]), ("special", ["b.x"])]
    with pytest.raises(ConfigError, match=r"two of paramwise\.groups"):
        parameter_groups(parameters, tags={"one": ["b"], "two": ["*.x"]})


# ---------------------------------------------------------------------- the constructor
def test_one_group_without_rules_decays_everything() -> None:
    wrapper = built(Net())
    assert isinstance(wrapper, OptimWrapper) and len(wrapper.optimizer.param_groups) == 1
    assert wrapper.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert set(settings(wrapper).values()) == {(1e-3, 0.05)}


def test_no_decay_by_rules_names_and_the_networks_own_list() -> None:
    decay = {n: wd for n, (_, wd) in settings(built(Net(), {"no_decay": True})).items()}
    assert decay["network.pos_embed"] == decay["network.cls_token"] == decay["network.norm.weight"] == 0.0
    assert decay["network.blocks.0.relative_position_bias_table"] == decay["probe.weight"] == 0.05
    rules = {"names": ["relative_position_bias_table"], "model": False}
    decay = {n: wd for n, (_, wd) in settings(built(Net(), {"no_decay": rules})).items()}
    assert decay["network.pos_embed"] == 0.05
    assert decay["network.blocks.0.relative_position_bias_table"] == decay["probe.bias"] == 0.0
    only_norms = {"ndim_max": None, "bias": False, "model": False}
    spared = {n for n, (_, wd) in settings(built(Net(), {"no_decay": only_norms})).items() if wd == 0}
    assert spared == {n for n, _ in Net().named_parameters() if "norm" in n}


def test_multipliers_multiply() -> None:
    multipliers = {"network": {"lr": 0.1}, "network.head": {"lr": 100, "weight_decay": 2}, "probe": {"weight_decay": 0}}
    got = settings(built(Net(), {"multipliers": multipliers}))
    assert got["network.norm.weight"] == pytest.approx((1e-4, 0.05))
    assert got["network.head.weight"] == pytest.approx((1e-2, 0.1))
    assert got["probe.weight"] == (1e-3, 0.0)


def test_layer_decay_from_the_networks_own_numbers() -> None:
    got = settings(built(Net(), {"layer_decay": 0.5, "no_decay": True}))
    assert got["network.patch_embed.weight"] == (1e-3 / 16, 0.05)
    assert got["network.blocks.2.attn.bias"] == (1e-3 / 2, 0.0)
    assert got["network.head.weight"] == got["probe.weight"] == (1e-3, 0.05)


def test_layer_decay_from_timms_group_matcher_and_from_a_function() -> None:
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3)
    scales = model_layer_scales(Net(vit), 0.5)
    assert scales["network.pos_embed"] == 1 / 8 and scales["network.blocks.1.mlp.fc1.weight"] == 1 / 2
    assert scales["network.head.weight"] == 1.0 and "probe.weight" not in scales

    def ids(model: nn.Module) -> dict[str, int]:
        return {n: int(n.startswith("probe")) for n, _ in model.named_parameters()}

    scales = model_layer_scales(Net(ViT()), 0.5, ids=ids)
    assert (scales["network.head.weight"], scales["probe.weight"]) == (0.5, 1.0)
    with pytest.raises(ConfigError, match=r"layer_decay\.ids"):
        built(Net(ViT()), {"layer_decay": 0.5})

    class Forgetful(ViT):
        def param_layer_ids(self) -> dict[str, int]:
            return {"pos_embed": 0}

    with pytest.raises(ConfigError, match=r"gives no layer to blocks\.0"):
        built(Net(Forgetful()), {"layer_decay": 0.5})


def test_frozen_parameters_are_left_out() -> None:
    model = Net()
    model.network.blocks.requires_grad_(False)
    names = set(settings(built(model)))
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"none of its .* requires a gradient"):
        built(model)


@pytest.mark.compile
def test_compiled_networks_keep_their_plain_names() -> None:
    model = Net()
    model.network = torch.compile(model.network)
    assert "network._orig_mod.head.weight" in dict(model.named_parameters())
    got = settings(built(model, {"multipliers": {"network.head": {"lr": 10}}, "no_decay": True, "layer_decay": 0.5}))
    assert got["network.head.weight"] == pytest.approx((1e-2, 0.05))
    assert got["network.pos_embed"] == (1e-3 / 16, 0.0)


def test_precision_is_the_runs_unless_the_config_says_otherwise() -> None:
    config = {"optimizer": ADAMW}
    assert OptimConstructor(config, precision="bf16")(Net()).precision == "bf16"
    assert OptimConstructor({**config, "precision": "fp32"}, precision="bf16")(Net()).precision == "fp32"


def test_mmengines_builder_reaches_it_and_no_config_is_changed() -> None:
    config = {
        "type": "core.OptimWrapper",
        "constructor": "OptimConstructor",
        "optimizer": dict(ADAMW),
        "clip_grad": {"type": "norm", "max_norm": 1.0},
        "accumulative_counts": 2,
        "paramwise": {"no_decay": {"names": ["probe"]}},
    }
    wanted = copy.deepcopy(config)
    wrapper = build_optim_wrapper(Net(), {**config, "constructor": OptimConstructor})
    assert isinstance(wrapper, OptimWrapper) and wrapper.accumulative_counts == 2
    OptimConstructor(config)(Net())
    OptimConstructor(config)(Net())
    assert config == wanted


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(4, 3)
        self.image_discriminator = nn.Linear(3, 1)
        self.video_discriminator = nn.Linear(3, 1)


def gan_config(**more: Any) -> dict:
    adam = {"type": "torch.optim.Adam", "betas": [0.0, 0.99]}
    return {
        "constructor": "core.OptimConstructor",
        "generator": {"optimizer": {**adam, "lr": 0.002}},
        "discriminator": {
            "optimizer": {**adam, "lr": 0.001},
            "params": ["image_discriminator", "video_discriminator"],
            "clip_grad": {"max_norm": 2.0},
        },
        **more,
    }


def test_several_optimizers_own_their_networks() -> None:
    wrappers = OptimConstructor(gan_config(clean_gradients={"nan": 0.0}, clip_grad={"max_norm": 1.0}))(Gan())
    assert isinstance(wrappers, OptimWrapperDict)
    names = {k: [n for g in w.optimizer.param_groups for n in g["param_names"]] for k, w in wrappers.items()}
    assert names["generator"] == ["generator.weight", "generator.bias"]
    assert len(names["discriminator"]) == 4
    assert [w.optimizer.param_groups[0]["lr"] for w in wrappers.values()] == [0.002, 0.001]
    assert [w._clip["max_norm"] for w in wrappers.values()] == [1.0, 2.0], (
        "shared settings hold where an own is missing"
    )
    assert all(w._clean for w in wrappers.values())


def test_one_config_serves_a_trainer_with_several_parts() -> None:
    model = Gan()
    model.optimizer_parts = ("generator", "image_discriminator", "video_discriminator")
    config = {
        "type": "core.OptimWrapper",
        "optimizer": {"type": "torch.optim.SGD", "lr": 0.1},
        "clip_grad": {"max_norm": 1.0},
    }
    wrappers = OptimConstructor(config)(model)
    names = {k: [n for g in w.optimizer.param_groups for n in g["param_names"]] for k, w in wrappers.items()}
    assert names == {part: [f"{part}.weight", f"{part}.bias"] for part in model.optimizer_parts}
    assert len({id(w.optimizer) for w in wrappers.values()}) == 3
    assert all(w._clip["max_norm"] == 1.0 for w in wrappers.values())
    assert set(OptimConstructor(gan_config())(model).keys()) == {"generator", "discriminator"}, "named ones come first"
    model.video_discriminator.requires_grad_(True)
    model.optimizer_parts = model.optimizer_parts[:2]
    with pytest.raises(ConfigError, match=r"no optimizer trains video_discriminator"):
        OptimConstructor(config)(model)


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    lost = gan_config()
    lost["discriminator"]["params"] = ["image_discriminator"]
    with pytest.raises(ConfigError, match=r"no optimizer trains video_discriminator\.bias.*freeze"):
        OptimConstructor(lost)(Gan())
    model = Gan()
    model.video_discriminator.requires_grad_(False)
    OptimConstructor(lost)(model)
    twice = gan_config()
    twice["discriminator"]["params"] = ["*"]
    with pytest.raises(ConfigError, match=r"2 parameters belong to two optimizers.*generator\.weight"):
        OptimConstructor(twice)(Gan())
    tied = Gan()
    tied.video_discriminator.bias = tied.generator.bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match="belong to two optimizers"):
        OptimConstructor(gan_config())(tied)


def test_tied_parameters_of_one_optimizer_count_once() -> None:
    model = Net()
    model.probe.weight = model.network.head.weight
    names = list(settings(built(model)))
    assert "network.head.weight" in names and "probe.weight" not in names


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"paramwise": {"multiplier": {}}}, "did you mean 'multipliers'"),
        ({"paramwise": {"multipliers": {"head": {"lr_mult": 2}}}}, "no key 'lr_mult'"),
        ({"paramwise": {"multipliers": {"heda": {"lr": 2}}}}, "'heda' matches no parameter: did you mean 'head'"),
        ({"paramwise": {"no_decay": {"names": ["pos_emebd"]}}}, "did you mean 'pos_embed'"),
        ({"paramwise": {"no_decay": {"exempt": ["pos_emebd"]}}}, "did you mean 'pos_embed'"),
        ({"paramwise": {"no_decay": {"dims": 1}}}, "no key 'dims'"),
        ({"paramwise": {"groups": {"x": ["scores"]}}}, "'scores' matches no parameter"),
        ({"paramwise": {"layer_decay": {"decay": 0.5, "id": "x"}}}, "did you mean 'ids'"),
        ({"params": ["netwrok"]}, "'netwrok' covers no parameter: did you mean 'network'"),
        ({"params": ["network"]}, "no optimizer trains probe.bias"),
        ({"optimizer": {**ADAMW, "learning_rate": 1.0}}, "takes no argument 'learning_rate'"),
        ({"optimizer": {"type": "torch.optim.AdamV", "lr": 1.0}}, "did you mean"),
        ({"clip_grads": {"max_norm": 1.0}}, "did you mean 'clip_grad'"),
    ],
)
def test_what_cannot_be_meant_is_an_error(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(Net(), **config)


def test_stray_keys_beside_named_optimizers_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"clip_gard .*did you mean 'clip_grad'"):
        OptimConstructor(gan_config(clip_gard={"max_norm": 1.0}))(Gan())
    with pytest.raises(ConfigError, match="no key 'optimizer'"):
        OptimConstructor({"type": "core.OptimWrapper"})(Gan())
