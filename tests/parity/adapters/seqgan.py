"""Pieces of seqgan as the golden cases name them, built from their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqgan.checkpoint import convert, revert
from seqgan.inference.sampling import decoding_steps, guide, keep_likely
from seqgan.metrics.diagnostics import code_histogram, codebook_usage, teacher_forced
from seqgan.models import (
    ARTransformer,
    MaskedTransformer,
    MaskGITEntropy,
    PatchDiscriminator,
    RegionalDilatedAttention,
    ResidualBlock,
    SpatialAttention,
    StyleDiscriminator,
    UpsampleConv,
    UsageEntropy,
    VectorQuantizer,
    VQGANDecoder,
    VQGANEncoder,
    code_usage,
    conv_tokenizer,
    mask_ratio,
    training_mask,
    vqgan_tokenizer,
)
from seqgan.models.attention import partition
from seqgan.models.resample import Downsample, DownsampleConv, Upsample

from ..cases import Case, UnknownPiece
from . import Outputs, run_from

run = run_from("seqgan", "seqgan_losses")


def _load(module: nn.Module, case: Case, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    module.load_state_dict(convert(case.state_dict() if state is None else state, module))
    return module.train(case.training)


# ------------------------------------------------------------------ tokenizers


def _sizes(config: Mapping[str, Any], image_channels: str) -> dict[str, Any]:
    """Arguments of an encoder or decoder of VQGAN."""
    known = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels", "resamp_with_conv")
    return {key: config[key] for key in (*known, "dropout", image_channels) if key in config}


def _resnet_block(case: Case) -> Outputs:
    config = case.config
    module = ResidualBlock(config["in_channels"], config.get("out_channels"), dropout=config.get("dropout", 0.0))
    return {"out": _load(module, case)(case.inputs()["x"])}


def _attn_block(case: Case) -> Outputs:
    return {"out": _load(SpatialAttention(case.config["in_channels"]), case)(case.inputs()["x"])}


def _resample(case: Case) -> Outputs:
    x, dim = case.inputs()["x"], case.config["in_channels"]
    pieces = {"down": DownsampleConv(dim), "up": UpsampleConv(dim)}
    if not case.config["with_conv"]:
        pieces = {"down": Downsample(), "up": Upsample()}
    outputs = {}
    for side, piece in pieces.items():
        own = {name.removeprefix(f"{side}."): v for name, v in case.state_dict().items() if name.startswith(f"{side}.")}
        outputs[side] = _load(piece, case, own)(x)
    return outputs


def _encoder(case: Case) -> Outputs:
    module = VQGANEncoder(**_sizes(case.config, "in_channels"), double_z=case.config.get("double_z", False))
    return {"out": _load(module, case)(case.inputs()["image"])}


def _decoder(case: Case) -> Outputs:
    return {"out": _load(VQGANDecoder(**_sizes(case.config, "out_ch")), case)(case.inputs()["z"])}


def _vqmodel(case: Case) -> Outputs:
    config = case.config
    inner = config["ddconfig"]
    model = vqgan_tokenizer(
        **_sizes(inner, "in_channels"),
        out_ch=inner.get("out_ch", 3),
        double_z=inner.get("double_z", False),
        codebook_size=config["n_embed"],
        embed_dim=config["embed_dim"],
        beta=config.get("beta", 0.25),
        legacy_beta=config.get("legacy", True),
    )
    out = _load(model, case)(case.inputs()["image"])
    return {"reconstruction": out.reconstruction, "loss": sum(out.losses.values()), "indices": out.indices}


def _maskgit_vqgan(case: Case) -> Outputs:
    config = case.config
    term = MaskGITEntropy(config["entropy_loss_ratio"], config["entropy_temperature"])
    model = conv_tokenizer(
        config["filters"],
        config["channel_multipliers"],
        config["num_res_blocks"],
        config["codebook_size"],
        config["embedding_dim"],
        shortcut=config.get("shortcut", "official_output"),
        beta=config["commitment_cost"],
        entropy=term,
    )
    image = case.inputs()["image"]
    out = _load(model, case)(image)
    return {
        "pre_quant": model.features(image),
        "indices": out.indices,
        "reconstruction": out.reconstruction,
        "e_latent_loss": out.losses["commit"],
        "q_latent_loss": out.losses["codebook"],
        "entropy_loss": out.losses["entropy"],
    }


def _quantizer(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    module = VectorQuantizer(config["n_e"], config["e_dim"], config["beta"], legacy_beta=config["legacy"])
    _load(module, case)
    z = (inputs["z"] * config.get("z_scale", 1.0)).requires_grad_()
    z_q, indices, losses = module(z)
    loss = sum(losses.values())
    (loss + (z_q * inputs["grad"]).sum()).backward()
    return {
        "z_q": z_q,
        "loss": loss,
        "indices": indices,
        "grad_z": z.grad,
        "grad_codebook": module.embedding.weight.grad,
    }


def _entropy_usage(case: Case) -> Outputs:
    inputs, scale = case.inputs(), case.config["scale"]
    quantizer = VectorQuantizer(*inputs["codebook"].shape)
    quantizer.embedding.weight.data = scale * inputs["codebook"]
    outputs = {}
    for distance in ("l2", "l2_squared"):
        # Gradients are those of what the quantiser is given: the scaled features and codes.
        z, codebook = (scale * inputs["z"]).requires_grad_(), quantizer.embedding.weight
        term = UsageEntropy(1.0, distance=distance, sign="paper")
        squared = quantizer.squared_distances(rearrange(z, "b c h w -> b (h w) c"))
        value = term(squared)
        at_z, at_codebook = torch.autograd.grad(value, (z, codebook))
        outputs |= {
            f"usage_{distance}": code_usage(term.distances(squared))[0],
            f"entropy_{distance}": value,
            f"grad_z_{distance}": at_z,
            f"grad_codebook_{distance}": at_codebook,
        }
    return outputs


def _codebook_usage(case: Case) -> Outputs:
    return codebook_usage(code_histogram(case.inputs()["indices"], case.config["codebook"]))._asdict()


def _regional_dilated(case: Case) -> Outputs:
    config, x = case.config, case.inputs()["x"]
    module = RegionalDilatedAttention(
        config["channels"], config["window"], config["channels"] // config["heads"], config["groups"]
    )
    _load(module, case)
    places = torch.arange(x.shape[-2] * x.shape[-1]).view(1, *x.shape[-2:], 1)
    regional = module.regional(x)
    outputs = {"regional": regional, "out": module.dilated(regional)}
    for span in ("regional", "dilated"):
        outputs[f"index_{span}"] = partition(places, span, config["window"])[0, :, :, 0]
    return outputs


# ------------------------------------------------------------------ discriminators


def _patchgan(case: Case) -> Outputs:
    config = case.config
    module = _load(PatchDiscriminator(config["input_nc"], config["ndf"], config["n_layers"]), case)
    image = case.inputs()["image"].requires_grad_()
    logits = module(image)
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    return {"logits": logits, "grad_image": gradient}


def _stylegan_disc(case: Case) -> Outputs:
    config = case.config
    module = StyleDiscriminator(
        config["image_size"],
        config.get("channel_multiplier", 1),
        blur=config["blur_resample"],
        channels=config.get("channels"),
    )
    return {"logits": _load(module, case)(case.inputs()["image"])}


# ------------------------------------------------------------------ transformers and sampling


def _gpt_model(config: Mapping[str, Any], codes: int, classes: int, class_rows: str) -> ARTransformer:
    return ARTransformer(
        codes,
        classes,
        config["block_size"],
        config["n_embd"],
        config["n_layer"],
        config["n_head"],
        class_rows=class_rows,
    )


def _gpt(case: Case) -> Outputs:
    tokens = case.inputs()["tokens"]
    vocabulary = case.config["vocab_size"]
    model = _load(_gpt_model(case.config, vocabulary, vocabulary, "shared"), case)
    logits = model.token_logits(tokens)
    greedy = [tokens[:, 0]]
    cache = model.allocate(len(tokens))
    for position in range(tokens.shape[1] - 1):
        greedy.append(model.step(greedy[-1], position, cache).argmax(dim=-1))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, dims=1).flatten())
    return {"logits": logits, "loss": loss, "greedy": torch.stack(greedy, dim=1)}


def _ar_teacher_forced(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    model = _load(_gpt_model(config, config["codebook"], config["classes"], "own"), case)
    return teacher_forced(model, inputs["codes"], inputs["label"])._asdict()


def _maskgit_transformer(case: Case) -> Outputs:
    config = case.config
    # One class and the mask are the last two rows; the case reads all rows alike.
    model = MaskedTransformer(
        config["vocab_size"] - 2,
        1,
        config["max_position_embeddings"] - 1,
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["intermediate_size"],
    )
    return {"logits": _load(model, case).token_logits(case.inputs()["tokens"])}


def _top_k(case: Case) -> Outputs:
    logits = case.inputs()["logits"] / case.config["temperature"]
    return {"probs": keep_likely(logits, case.config["k"]).softmax(dim=-1)}


def _guidance(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    progress = config["step"] / max(config["steps"] - 1, 1)
    pair = inputs["cond"], inputs["uncond"], config["w"]
    return {schedule: guide(*pair, schedule, progress) for schedule in ("constant", "linear")}


def _mask_schedule(case: Case) -> Outputs:
    ratio, total = case.inputs()["ratio"], case.config["total_unknown"]
    return {name: mask_ratio(name, ratio, total) for name in case.golden}


def _training_mask(case: Case) -> Outputs:
    inputs = case.inputs()
    mask = training_mask(inputs["ratio"], inputs["score"], case.config["min_masking_rate"])
    return {"count": mask.sum(dim=1), "mask": mask}


def _maskgit_decode(case: Case) -> Outputs:
    config, inputs = case.config, case.inputs()
    noise = {3: inputs["sample_noise"], 2: inputs["choice_noise"]}
    batch, length, _ = inputs["sample_noise"].shape

    def predict(step: int, codes: Tensor, masked: Tensor) -> Tensor:
        rows = inputs["table"][torch.where(masked, config["mask_token_id"], codes)]
        return config["scale"] * (rows + 0.5 * rows.roll(1, dims=1) + inputs["position"])

    known = (torch.arange(length) < config["given"]).expand(batch, length)
    states = decoding_steps(
        predict,
        torch.full((batch, length), 3),
        known,
        lambda shape: noise[len(shape)],
        config["steps"],
        config["schedule"],
        config["choice_temperature"],
    )
    return {"sequences": torch.stack(list(states), dim=1)}


PIECES = {
    "resnet_block": _resnet_block,
    "attn_block": _attn_block,
    "resample": _resample,
    "encoder": _encoder,
    "decoder": _decoder,
    "vqmodel": _vqmodel,
    "maskgit_vqgan": _maskgit_vqgan,
    "quantizer": _quantizer,
    "entropy_usage": _entropy_usage,
    "codebook_usage": _codebook_usage,
    "regional_dilated": _regional_dilated,
    "patchgan": _patchgan,
    "stylegan_disc": _stylegan_disc,
    "gpt": _gpt,
    "ar_teacher_forced": _ar_teacher_forced,
    "maskgit_transformer": _maskgit_transformer,
    "top_k": _top_k,
    "guidance": _guidance,
    "mask_schedule": _mask_schedule,
    "training_mask": _training_mask,
    "maskgit_decode": _maskgit_decode,
}


# ------------------------------------------------------------------ inventories


def inventory(name: str, content: Mapping[str, Any]) -> None:
    """Names and shapes of a published network convert into ours, fit it, and come back.

    Raises:
        UnknownPiece: a network that is not built.
        CheckpointMismatch: entries are missing, left over or of another shape.
        AssertionError: the count differs, or the way back gives something else.
    """
    with torch.device("meta"):
        module = _published(name, content["config"])
        state = {key: torch.empty(shape) for key, shape in content["keys"]}
    converted = convert(state, module)
    if name.startswith("keys_maskgit") or name.startswith("keys_stylegan"):
        heads = content["config"].get("num_attention_heads", 1)
        back = revert(converted, layout="flax", num_heads=heads)
    else:
        back = revert(converted)
    inside = {key: value.shape for key, value in state.items() if not _beside(key)}
    assert {key: value.shape for key, value in back.items()} == inside, f"{name}: the way back gives other entries"
    parts = [module]
    if "disc_num_layers" in content["config"]:
        with torch.device("meta"):
            parts.append(PatchDiscriminator(n_layers=content["config"]["disc_num_layers"]))
        prefix = "loss.discriminator."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        assert revert(convert(own, parts[1])).keys() == own.keys(), f"{name}: the discriminator's entries differ"
    total = sum(p.numel() for part in parts for p in part.parameters())
    assert total == content["total_parameters"], f"{name}: {total} parameters, published {content['total_parameters']}"


def _beside(key: str) -> bool:
    return key.startswith("loss.") or key.endswith("attn.mask")


def _published(name: str, config: Mapping[str, Any]) -> nn.Module:
    if name.startswith("keys_vqgan"):
        inner = config["ddconfig"]
        return vqgan_tokenizer(
            **_sizes(inner, "in_channels"),
            out_ch=inner["out_ch"],
            double_z=inner["double_z"],
            codebook_size=config["n_embed"],
            embed_dim=config["embed_dim"],
        )
    if name.startswith("keys_gpt"):
        return _gpt_model(config, config["vocab_size"], 1, "shared")
    if name.startswith("keys_maskgit_vqgan"):
        return conv_tokenizer(
            config["filters"],
            config["channel_multipliers"],
            config["num_res_blocks"],
            config["codebook_size"],
            config["embedding_dim"],
        )
    if name.startswith("keys_maskgit_transformer"):
        return MaskedTransformer(
            config["vocab_size"] - 2,
            1,
            config["max_position_embeddings"] - 1,
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["intermediate_size"],
        )
    if name.startswith("keys_stylegan"):
        return StyleDiscriminator(config["image_size"], config["channel_multiplier"], blur=config["blur_resample"])
    raise UnknownPiece(f"inventory of {name}, unknown to the adapter")
