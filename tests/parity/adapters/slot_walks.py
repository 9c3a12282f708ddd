"""Pieces of slot_walks as the golden cases name them, built from their configurations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from core.optim.groups import OptimConstructor
from core.optim.schedules import Schedule, cosine_ramp, exponential, linear_ramp
from slot_walks.checkpoint import convert, revert
from slot_walks.losses.walk_loss import WalkLoss, reconstruction_loss
from slot_walks.losses.walks import masks, region_vectors, transitions
from slot_walks.models import DinoViT, MLPDecoder, SlotAttention, SlotEncoder, SlotWalker
from slot_walks.models.positions import position_affinity, position_table
from slot_walks.trainer.slots import SlotTrainer

from ..cases import Case, UnknownPiece
from . import Outputs, run_from

run = run_from("slot_walks", "slot_walks_data")


def _load(module: nn.Module, case: Case) -> nn.Module:
    module.load_state_dict(convert(case.state_dict(), module))
    return module.train(case.training)


def _factor(case: Case) -> float:
    """What gradients are multiplied by, which cases give in words only: `times 1000`."""
    match = re.search(r"times ([\d.]*\d)", case.meta["how"])
    return float(match[1]) if match else 1.0


def _gradients(module: nn.Module, case: Case, layout: str = "official", factor: float = 1.0) -> Outputs:
    """Gradients of all trained parameters under the reference's names, as cases write them."""
    own = {name: torch.zeros_like(p) if p.grad is None else p.grad * factor for name, p in module.named_parameters()}
    outputs: Outputs = {}
    for name, gradient in revert(own, layout=layout).items():
        flat = name.replace(".", "_")
        outputs |= dict.fromkeys((f"grad:{name}", f"grad_{flat}", f"grad_{flat.removesuffix('_weight')}"), gradient)
    return outputs


# ------------------------------------------------------------------ slots


def _slot_attention(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    module = SlotAttention(
        config["slot_size"],
        in_dim=dict(case.params)["project_k.weight"][1],
        num_iterations=config["num_iterations"],
        num_heads=config.get("heads", config.get("num_heads", 1)),
        mlp_hidden=config["mlp_hidden_size"],
        eps=config.get("epsilon", 1e-8),
    )
    start = inputs["slots_init"].requires_grad_()
    tokens = inputs["inputs"].requires_grad_()
    slots, attention, _ = _load(module, case)(tokens, start)
    outputs = {"slots": slots, "attn": attention}
    if "cotangent" in inputs:
        (slots * inputs["cotangent"]).sum().backward()
        outputs |= _gradients(module, case) | {"grad_slots_init": start.grad, "grad_inputs": tokens.grad}
    return outputs


def _slot_encoder(case: Case) -> Outputs:
    return _encoded(case, "slot")


def _slot_encoder_boqsa(case: Case) -> Outputs:
    return _encoded(case, "feature")


def _encoded(case: Case, projection: str) -> Outputs:
    """A slot encoder; BO-QSA's (projection `feature`) gives the attention before it is normalised over tokens."""
    config, inputs = case.config, case.inputs()
    names = [name for name, _ in case.params]
    module = SlotEncoder(
        config["input_channels"],
        config["slot_size"],
        config["num_slots"],
        hidden=config["mlp_hidden_size"],
        init="learned" if "slots_init.weight" in names else "gaussian",
        num_iterations=config["num_iterations"],
        num_heads=config.get("num_heads", config.get("num_slot_heads", 1)),
        truncate=config.get("truncate", "none").replace("-", "_"),
        projection=projection,
    )
    output = _load(module, case)(inputs["features"], inputs.get("noise"))
    outputs = {"slots": output.slots, "attn": output.assignment if projection == "feature" else output.attention}
    if "cotangent" in inputs:
        (output.slots * inputs["cotangent"]).sum().backward()
        outputs |= _gradients(module, case, "boqsa" if projection == "feature" else "official")
    return outputs


def _mlp_decoder(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    grid = (1, config["num_patches"])
    depth = sum(name.endswith(".weight") for name, _ in case.params) - 1
    module = MLPDecoder(config["object_dim"], config["output_dim"], grid, config["hidden_features"], depth)
    reconstruction, shares = _load(module, case)(inputs["slots"], grid)
    outputs = {"reconstruction": reconstruction, "masks": shares}
    if "target" in inputs:
        outputs["loss"] = reconstruction_loss(reconstruction, inputs["target"])
        outputs["loss"].backward()
        outputs |= _gradients(module, case)
    return outputs


# ------------------------------------------------------------------ backbone and positions


def _side(size: int | Iterable[int]) -> int:
    return size if isinstance(size, int) else next(iter(size))


def _vit_options(config: Mapping[str, object]) -> dict[str, object]:
    known = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    options = {key: config[key] for key in known if key in config}
    return options | {"img_size": _side(config["img_size"]), "norm_eps": config.get("norm_eps", 1e-6)}


def _vit(case: Case) -> Outputs:
    image = case.inputs()["image"]
    module = _load(DinoViT(**_vit_options(case.config)), case)
    with torch.no_grad():
        tokens = module.tokens(image)
        return {"pos": module.positions(module.grid(image)), "tokens": tokens, "tokens_normed": module.norm(tokens)}


def _position_table(case: Case) -> Outputs:
    config = case.config
    grid = (config["height"], config["width"])
    return {
        "table": position_table(config["d_model"], *grid),
        "affinity": position_affinity(config["d_model"], grid, config["temperature"]),
    }


# ------------------------------------------------------------------ walks and the whole model


def _walk_loss(config: Mapping[str, object]) -> WalkLoss:
    return WalkLoss(
        config["alpha"],
        config["beta"],
        config["temperature"],
        config["threshold"],
        target_position="average" if config.get("additional_position") else "none",
    )


def _walk_outputs(
    config: Mapping[str, object], features: Tensor, slots: Tensor, grid: tuple[int, int], size: tuple[int, int]
) -> Outputs:
    loss = _walk_loss(config)
    terms = loss(features, slots, grid)
    to_slot, to_part = transitions(features, slots, loss.temperature)
    return {
        "loss": terms["loss"],
        "wpw_loss": loss.alpha * terms["wpw"],
        "pwp_loss": loss.beta * terms.get("pwp", torch.zeros(())),
        "masks": masks(to_slot, grid, size),
        "region_vectors": region_vectors(to_part, features),
    }


def _walks(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    size = config["image"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    centers = inputs["centers"]
    features = centers[inputs["assign"]] + config["jitter"] * inputs["jitter"]
    near = float(re.search(r"([\d.]+)\*slots", case.meta["how"])[1])
    own = centers[torch.arange(inputs["slots"].shape[1]) % len(centers)]
    slots = (near * inputs["slots"] + own).requires_grad_()
    outputs = _walk_outputs(config, features, slots, tuple(config["grid"]), size)
    outputs["loss"].backward()
    return outputs | {"grad_slots": slots.grad * _factor(case)}


def _model(config: Mapping[str, object], vit: Mapping[str, object], slots: int, dim: int) -> SlotWalker:
    return SlotWalker(
        DinoViT(**_vit_options(vit), final_norm=config.get("final_norm", False)),
        SlotEncoder(
            vit["embed_dim"],
            dim,
            slots,
            hidden=config["mlp_hidden_size"],
            num_iterations=config["num_iterations"],
            num_heads=config.get("num_slot_heads", 1),
        ),
    )


def _sacrw(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    model = _load(_model(config, config["vit"], config["num_slots"], config["slot_size"]), case)
    image = inputs["image"]
    output = model(image, noise=inputs["noise"])
    outputs = _walk_outputs(config, output.features, output.whole, output.grid, image.shape[-2:])
    outputs["loss"].backward()
    return outputs | _gradients(model, case, factor=_factor(case))


def _train_steps(case: Case) -> Outputs:
    """Steps of the trainer with the engine's optimizer wrapper and schedule."""
    config, inputs = case.config, case.inputs()
    vit = {"img_size": config["img"], **config}
    dim = config.get("slot_size", config["embed_dim"])
    network = _model(config, vit | {"num_heads": config["num_heads"]}, config["num_slots"], dim)
    trainer = SlotTrainer(_load(network, case), _walk_loss(config)).train(case.training)
    optimizer = {
        "optimizer": {"type": "torch.optim.Adam", "lr": config["lr"]},
        "clip_grad": {"max_norm": config["grad_clip"], "norm_type": float(config["norm"])},
    }
    wrapper = OptimConstructor(optimizer)(trainer)
    schedule = Schedule(
        wrapper, "exponential", by_epoch=False, period=config["decay_steps"], warmup=config["warmup_steps"]
    )
    schedule.load_state_dict({"last_step": config["start_step"]})
    steps = len(inputs["image"])
    schedule.resolve(config["start_step"] + steps, None)
    log: dict[str, list[Tensor]] = {"losses": [], "grad_norm_inf": [], "lr": []}
    for image, noise in zip(inputs["image"], inputs["noise"], strict=True):
        log["lr"].append(torch.tensor(wrapper.param_groups[0]["lr"]))
        log["losses"].append(trainer.train_step({"image": image, "noise": noise}, wrapper)["loss"])
        log["grad_norm_inf"].append(wrapper.grad_norm)
        schedule.step()
    after = {f"after:{name}": value for name, value in revert(network.state_dict()).items()}
    return after | {name: torch.stack(values) for name, values in log.items()}


def _schedules(case: Case) -> Outputs:
    warmup, decay = case.config["warmup_steps"], case.config["decay_steps"]
    number = r"([\d.]*\d)"
    cosine = re.search(rf"cosine: from {number} to {number} between steps {number} and {number}", case.meta["how"])
    first, last, begin, end = map(float, cosine.groups())
    linear = re.search(rf"linear: from {number} to {number} over {number} steps", case.meta["how"])
    low, high, length = map(float, linear.groups())
    late = 1 if "step+1" in case.meta["how"] else 0
    functions: dict[str, Callable[[float], float]] = {
        "factor_warm": lambda step: exponential(step, lr=1.0, period=decay, warmup=warmup),
        "factor_no_warm": lambda step: exponential(step, lr=1.0, period=decay),
        "cosine": lambda step: cosine_ramp(step, begin=begin, end=end, first=first, last=last),
        "linear": lambda step: linear_ramp(step + late, end=length, first=low, last=high),
    }
    steps = case.inputs()["steps"].tolist()
    return {name: torch.tensor([f(step) for step in steps], dtype=torch.float64) for name, f in functions.items()}


PIECES: dict[str, Callable[[Case], Outputs]] = {
    "slot_attention": _slot_attention,
    "slot_encoder": _slot_encoder,
    "slot_encoder_bilevel": _slot_encoder_boqsa,
    "slot_encoder_fixed_point": _slot_encoder_boqsa,
    "mlp_decoder": _mlp_decoder,
    "vit": _vit,
    "position_table": _position_table,
    "walks": _walks,
    "sacrw": _sacrw,
    "train_steps": _train_steps,
    "schedules": _schedules,
}


def inventory(name: str, content: dict[str, object]) -> None:
    """Convert the keys of a released model: none may be missing or left over, in either spelling.

    Raises:
        AssertionError: they do not give our model with the published number of parameters.
        UnknownPiece: an inventory of something else.
    """
    if not re.fullmatch(r"keys_sacrw_\w+", name):
        raise UnknownPiece(f"no inventory of slot_walks is called {name!r}")
    # Every source has a number of its own, so that what arrives where is seen.
    published = {key: torch.full(shape, i).float() for i, (key, shape) in enumerate(content["keys"])}
    wrapped = {f"module.{key}": value for key, value in published.items()}
    ours = convert(published)
    assert ours.keys() == convert(wrapped).keys()
    back = revert(ours)
    assert back.keys() == published.keys(), sorted(back.keys() ^ published.keys())
    assert all(torch.equal(back[key], published[key]) for key in back)
    total = sum(value.numel() for value in ours.values())
    trained = sum(value.numel() for key, value in ours.items() if key.startswith("encoder."))
    assert (total, trained) == (content["total"], content["trainable"]), (total, trained)
