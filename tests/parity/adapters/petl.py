"""Pieces of petl as the golden cases name them, built from their configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.optim.schedules import value as scheduled
from petl.checkpoint import convert
from petl.models import PetlModel, all_channel_scores, inject, salience, select_channels
from petl.models.channels import ChannelTuning
from petl.models.importance import REDUCTIONS
from petl.models.inject import delta_parameters
from petl.models.methods import (
    SCT,
    SSF,
    TTC,
    VPT,
    Adapter,
    AdaptFormer,
    BitFit,
    Convpass,
    FacT,
    Full,
    Linear,
    LNTune,
    LoRA,
    Method,
    NOAHSubnet,
    RepAdapter,
)
from petl.models.methods.adapters import GroupedAdapter

from ..cases import Case, UnknownPiece
from . import Outputs, run_from

run = run_from("petl")

_BACKBONE = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes")


def _backbone(config: Mapping[str, Any]) -> VisionTransformer:
    return VisionTransformer(**{key: config[key] for key in _BACKBONE if key in config})


def _tuned(case: Case, method: Method, state: Mapping[str, Tensor] | None = None) -> PetlModel:
    model = inject(_backbone(case.config), method)
    model.load_state_dict(convert(case.state_dict() if state is None else state, model), strict=False)
    return model.train(case.training)


def _forward(case: Case, model: PetlModel) -> Outputs:
    image = case.inputs()["imgs"]
    tokens = model.backbone.forward_features(image)
    return {"tokens": tokens, "features": tokens[:, 0], "logits": model(image)}


def _method(build: Callable[[Mapping[str, Any]], Method]) -> Callable[[Case], Outputs]:
    def piece(case: Case) -> Outputs:
        return _forward(case, _tuned(case, build(case.config)))

    return piece


def _ssf(case: Case) -> Outputs:
    state = {
        name: value + 1 if name.rpartition(".")[2].startswith("ssf_scale") else value
        for name, value in case.state_dict().items()
    }
    return _forward(case, _tuned(case, SSF(), state))


def _noah(config: Mapping[str, Any]) -> Method:
    sample = config["sample"]
    if any(sample.get("prefix_dim", [])):
        raise UnknownPiece("no subnet of NOAH with prefixes")
    return NOAHSubnet(sample["visual_prompt_dim"], sample["lora_dim"], sample["adapter_dim"])


def _noah_subnet(case: Case) -> Outputs:
    outputs = _forward(case, _tuned(case, _noah(case.config)))
    counted = _noah(case.config).sampled_parameters(case.config["embed_dim"])
    assert counted == case.config.get("sampled_params", counted), counted
    return outputs


def _sct(config: Mapping[str, Any]) -> Method:
    site = {"sct_attn": "attn", "sct_mlp": "mlp", "sct_qkv": "qv"}[config["tuning_mode"]]
    return SCT(config["channel_index"], site=site)


def _adapter(config: Mapping[str, Any]) -> Method:
    return Adapter(config["bottleneck"], act=config.get("act", "gelu"))


def _adaptformer(config: Mapping[str, Any]) -> Method:
    norm = config.get("layernorm", "none") == "in"
    return AdaptFormer(config["bottleneck"], config.get("scale", 1.0), norm=norm, act=config.get("act", "relu"))


def _lora(config: Mapping[str, Any]) -> Method:
    return LoRA(config["rank"], alpha=config["rank"] * config.get("scale", 1.0), targets=config["targets"])


def _convpass(config: Mapping[str, Any]) -> Method:
    return Convpass(config["dim"], config["scale"], place=config.get("place", "both"))


def _repadapter(config: Mapping[str, Any]) -> Method:
    return RepAdapter(config["hidden"], config["groups"], config["scale"], place=config.get("place", "both"))


def _repadapter_merge(case: Case) -> Outputs:
    config, state = case.config, case.state_dict()
    linear = nn.Linear(config["in_features"], config["out_features"])
    adapter = GroupedAdapter(config["in_features"], config["hidden"], config["groups"], config["scale"], 0.1).eval()
    linear.load_state_dict({name[7:]: value for name, value in state.items() if name.startswith("linear.")})
    adapter.load_state_dict(
        {
            "down.weight": state["conv_A.weight"][..., 0],
            "down.bias": state["conv_A.bias"],
            "up.weight": state["conv_B.weight"],
            "up.bias": state["conv_B.bias"],
        }
    )
    product, shift = adapter.matrix()
    weight = linear.weight + linear.weight @ product
    bias = linear.bias + linear.weight @ shift
    return {"y": linear(adapter(case.inputs()["x"])), "merged_weight": weight, "merged_bias": bias}


def _taylor(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    model = _tuned(case, LNTune())
    batches = [(inputs["imgs"][i : i + 4], inputs["labels"][i : i + 4]) for i in range(0, len(inputs["imgs"]), 4)]
    scores = all_channel_scores(model, batches, site=config["site"], tokens=config.get("tokens", "all"))
    outputs = {reduction: torch.stack(scores[reduction].values[""]) for reduction in REDUCTIONS}
    best = scores["abs_of_sum"]
    outputs["selected"] = torch.tensor(best.select(config["K"]))
    outputs["normalised"] = torch.stack(best.normalised()[""])
    mask = torch.zeros_like(outputs["normalised"])
    for row, channels in zip(mask, best.select(config["K"], "global"), strict=True):
        row[channels] = 1
    outputs["global_mask"] = mask
    return outputs


def _salience(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    site = {"sct_attn": "attn", "sct_mlp": "mlp", "sct_qkv": "qv"}[config["tuning_mode"]]
    scores = salience(_tuned(case, Linear()), [(inputs["imgs"], inputs["labels"])], site=site)
    outputs: Outputs = {}
    for part, values in scores.values.items():
        suffix = f"_{part}" if part else ""
        outputs[f"score{suffix}"] = torch.stack(values)
        outputs[f"selected{suffix}"] = torch.stack(select_channels(values, config["K"]))
    return outputs


def _ttc_module(case: Case) -> Outputs:
    config, inputs, state = case.config, case.inputs(), case.state_dict()
    module = ChannelTuning(
        inputs["channels"], config["dim"], scale=config["scale"], scale_on=config.get("scale_on", "module")
    )
    module.update.load_state_dict({name.removeprefix("linear."): value for name, value in state.items()})
    x = inputs["x"].requires_grad_()
    y = module(x)
    (y * inputs["grad_out"]).sum().backward()
    weight, bias = module.update.weight.grad, module.update.bias.grad
    return {"y": y, "grad_x": x.grad, "grad_weight": weight, "grad_bias": bias}


def _lr_schedule(case: Case) -> Outputs:
    config = case.config
    return {
        name: torch.tensor(
            [
                scheduled(
                    "warmup_cosine",
                    epoch,
                    lr=config["lr"],
                    total=config["epochs"],
                    warmup=config["warmup_epochs"],
                    warmup_lr=config["warmup_lr_init"],
                    min_lr=config["lr_min"],
                    lag=lag,
                )
                for epoch in range(config["epochs"])
            ],
            dtype=torch.float64,
        )
        for name, lag in (("lagged", 1), ("standard", 0))
    }


def counted_method(name: str) -> Method:
    """The method that an entry of `param_counts.json` counts."""
    words = name.split("_")
    numbers = [int(word) for word in words if word.isdigit()]
    size = numbers[0] if numbers else 0
    fixed = {"full": Full, "linear": Linear, "ln": LNTune, "bitfit": BitFit, "ssf": SSF}
    if name in fixed:
        return fixed[name]()
    kind = "_".join(word for word in words if word != "g2" and not word.isdigit())
    methods: dict[str, Callable[[], Method]] = {
        "vpt_shallow": lambda: VPT(size, deep=False),
        "vpt_deep": lambda: VPT(size),
        "adapter_mlp": lambda: Adapter(size),
        "adapter_attn_mlp": lambda: Adapter(size, "both"),
        "adaptformer": lambda: AdaptFormer(size),
        "adaptformer_ln": lambda: AdaptFormer(size, norm=True),
        "lora_qv": lambda: LoRA(size),
        "lora_qkv_packed": lambda: LoRA(size, targets=("q", "k", "v"), packed=True),
        "lora_qkv_separate": lambda: LoRA(size, targets=("q", "k", "v")),
        "fact_tt": lambda: FacT("tt", size),
        "fact_tk": lambda: FacT("tk", size),
        "convpass": lambda: Convpass(size),
        "convpass_attn": lambda: Convpass(size, place="attn"),
        "repadapter": lambda: RepAdapter(size),
        "repadapter_attn": lambda: RepAdapter(size, place="attn"),
        "sct_attn": lambda: SCT(k=size),
        "sct_qkv": lambda: SCT(k=size, site="qv"),
        "ttc": lambda: TTC(k=size),
    }
    if kind not in methods:
        raise UnknownPiece(f"no method of petl is counted as {name!r}")
    return methods[kind]()


def inventory(name: str, content: dict[str, Any]) -> None:
    """The counts of every method at every size, and the names of the published backbone.

    Raises:
        AssertionError: ours differ.
        UnknownPiece: an inventory of something else.
    """
    if name == "param_counts":
        for network in content.values():
            for method, count in (
                network.get("trainable_without_head", {}) if isinstance(network, dict) else {}
            ).items():
                with torch.device("meta"):
                    model = inject(_backbone(network["config"]), counted_method(method), num_classes=5)
                assert delta_parameters(model) == count, f"{method}: {delta_parameters(model)}, counted {count}"
        heads = content["heads_769_per_class"]
        for task, classes in heads["classes"].items():
            with torch.device("meta"):
                model = inject(_backbone({"embed_dim": 768, "depth": 1}), Linear(), num_classes=classes)
            assert delta_parameters(model, head=True) == heads["parameters"][task], task
        return
    if not name.startswith("keys_vit_base_patch16"):
        raise UnknownPiece(f"no inventory of petl is called {name!r}")
    published = {key: torch.full(shape, i).float() for i, (key, shape) in enumerate(content["keys"])}
    with torch.device("meta"):
        model = VisionTransformer(num_classes=0)
    ours = convert(published, model)
    assert ours.keys() == model.state_dict().keys() == published.keys()
    assert sum(value.numel() for value in ours.values()) == content["total"]


PIECES: dict[str, Callable[[Case], Outputs]] = {
    "adapter_mlp": _method(_adapter),
    "adaptformer_ln": _method(_adaptformer),
    "convpass": _method(_convpass),
    "fact_tk": _method(lambda config: FacT("tk", config["rank"], config["scale"])),
    "fact_tt": _method(lambda config: FacT("tt", config["rank"], config["scale"])),
    "lora_qv": _method(_lora),
    "lr_schedule": _lr_schedule,
    "noah_adapter": _method(_noah),
    "noah_lora": _method(_noah),
    "noah_subnet": _noah_subnet,
    "noah_vpt_deep": _method(_noah),
    "repadapter": _method(_repadapter),
    "repadapter_merge": _repadapter_merge,
    "salience_sct_attn": _salience,
    "salience_sct_mlp": _salience,
    "salience_sct_qkv": _salience,
    "sct_attn": _method(_sct),
    "sct_mlp": _method(_sct),
    "sct_qkv": _method(_sct),
    "ssf": _ssf,
    "taylor_attn": _taylor,
    "taylor_block": _taylor,
    "taylor_mlp": _taylor,
    "ttc_module": _ttc_module,
    "vit_plain": _method(lambda config: Linear()),
    "vpt_deep": _method(lambda config: VPT(config["length"], config["deep"])),
    "vpt_shallow": _method(lambda config: VPT(config["length"], config["deep"])),
}
