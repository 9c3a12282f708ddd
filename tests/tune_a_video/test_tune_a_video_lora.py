"""LoRA weights in every layout that diffusers, PEFT and kohya write: merged as they were meant, or refused by name."""

import copy
import json
import math
import re

import pytest
import torch
from random_sd import make_pipeline
from safetensors.torch import save_file

from tune_a_video.interop.lora import merge_lora
from tune_a_video.interop.lora_files import LoRAFileError
from tune_a_video.interop.pipeline import TuneAVideoPipeline

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY, OUTPUT = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture
def pipe():
    return make_pipeline()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def pair(layer, rank=2):
    """A and B for a layer."""
    weight = layer.weight
    return draw(rank, *weight.shape[1:]), draw(len(weight), rank, *(1,) * (weight.ndim - 2), seed=1)


def product(up, down):
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


def merged(pipe, state, folder, metadata=None, name="lora.safetensors", scale=1.0, config=None):
    """The pipeline after a file of those tensors was merged, and how many layers that changed."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / name, metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    made = copy.deepcopy((pipe.unet, pipe.text_encoder))
    count = merge_lora(*made, folder if config is not None else folder / name, scale)
    return (*made, count)


@pytest.mark.parametrize(
    "names",
    [
        f"unet.{QUERY}.lora_A.weight unet.{QUERY}.lora_B.weight",
        f"unet.{QUERY}.lora_A.default.weight unet.{QUERY}.lora_B.default.weight",
        f"unet.{QUERY}.lora_A.style.weight unet.{QUERY}.lora_B.style.weight",
        f"unet.{QUERY}.lora.down.weight unet.{QUERY}.lora.up.weight",
        f"{BLOCK}.attn1.processor.to_q_lora.down.weight {BLOCK}.attn1.processor.to_q_lora.up.weight",
        f"unet.{BLOCK}.attn1.processor.to_q_lora.down.weight unet.{BLOCK}.attn1.processor.to_q_lora.up.weight",
        "KOHYA.lora_down.weight KOHYA.lora_up.weight",
    ],
)
@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_layouts_of_the_network(pipe, tmp_path, names, alpha):
    down, up = pair(pipe.unet.get_submodule(QUERY))
    first, second = names.replace("KOHYA", "lora_unet_" + QUERY.replace(".", "_")).split()
    state = {first: down, second: up}
    if alpha is not None:
        stem = re.sub(r"(\.lora(_A.*|\.down.*|_down.*)|\.down)\.weight$", "", first)
        state[f"{stem}.alpha"] = torch.tensor(alpha)
    unet, _, count = merged(pipe, state, tmp_path, scale=0.5)
    strength = 0.5 * (1.0 if alpha is None else alpha / 2)
    expected = pipe.unet.get_submodule(QUERY).weight + strength * up @ down
    torch.testing.assert_close(unet.get_submodule(QUERY).weight, expected)
    assert count == 1 and torch.equal(unet.conv_in.weight, pipe.unet.conv_in.weight)


@pytest.mark.parametrize(
    "names",
    [
        "text_encoder.text_model.{}.lora_A.weight text_encoder.text_model.{}.lora_B.weight",
        "text_encoder.text_model.{}.lora_linear_layer.down.weight "
        "text_encoder.text_model.{}.lora_linear_layer.up.weight",
        "text_encoder.text_model.{old}.to_q_lora.down.weight text_encoder.text_model.{old}.to_q_lora.up.weight",
        "lora_te_text_model_{joined}.lora_down.weight lora_te_text_model_{joined}.lora_up.weight",
        "lora_te1_text_model_{joined}.lora_down.weight lora_te1_text_model_{joined}.lora_up.weight",
    ],
)
def test_layouts_of_the_text_encoder(pipe, tmp_path, names):
    layer = pipe.text_encoder.get_submodule(TEXT)
    words = {"old": TEXT.removesuffix(".q_proj"), "joined": TEXT.replace(".", "_")}
    first, second = (name.format(TEXT, **words) for name in names.split())
    down, up = pair(layer)
    _, text, count = merged(pipe, {first: down, second: up}, tmp_path)
    torch.testing.assert_close(text.get_submodule(TEXT).weight, layer.weight + up @ down)
    assert count == 1


def test_first_layers_of_outputs_had_a_name_without_number(pipe, tmp_path):
    layer = pipe.unet.get_submodule(OUTPUT)
    down, up = pair(layer)
    stem = f"unet.{BLOCK}.attn1.processor.to_out_lora"
    unet, *_ = merged(pipe, {f"{stem}.down.weight": down, f"{stem}.up.weight": up}, tmp_path)
    torch.testing.assert_close(unet.get_submodule(OUTPUT).weight, layer.weight + up @ down)


@pytest.mark.parametrize("tucker", [False, True])
def test_convolutions_also_with_a_kernel_in_the_middle(pipe, tmp_path, tucker):
    layer = pipe.unet.get_submodule(CONV)
    down, up = pair(layer)
    stem = "lora_unet_" + CONV.replace(".", "_")
    state = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    update = product(up, down)
    if tucker:
        down, middle = draw(2, layer.in_channels, 1, 1), draw(2, 2, 3, 3, seed=4)
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": middle}
        # As it is computed in kohya's own layers: one convolution behind the other.
        x = draw(1, layer.in_channels, 5, 5, seed=5)
        conv = torch.nn.functional.conv2d
        wanted = conv(x, layer.weight, padding=1) + 0.5 * conv(conv(conv(x, down), middle, padding=1), up)
    unet, *_ = merged(pipe, state, tmp_path)
    made = unet.get_submodule(CONV).weight
    if tucker:
        torch.testing.assert_close(torch.nn.functional.conv2d(x, made, padding=1), wanted, atol=1e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(made, layer.weight + 0.5 * update)


# ------------------------------------------------------------------ strengths that are no keys


def settings(**changes):
    return {"r": 2, "lora_alpha": 6, "alpha_pattern": {}, "use_rslora": False, "peft_type": "LORA", **changes}


@pytest.mark.parametrize(
    ("changes", "strength"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"alpha_pattern": {"attn1.to_q": 8}}, 4.0),
        ({"alpha_pattern": {r"down_blocks\.\d.*to_q": 10, "to_k": 1}}, 5.0),
        ({"alpha_pattern": {"attn2.to_q": 8}}, 3.0),
    ],
)
@pytest.mark.parametrize("writer", ["peft", "diffusers"])
def test_alphas_beside_the_tensors(pipe, tmp_path, changes, strength, writer):
    layer = pipe.unet.get_submodule(QUERY)
    down, up = pair(layer)
    prefix = "base_model.model." if writer == "peft" else "unet."
    state = {f"{prefix}{QUERY}.lora_A.weight": down, f"{prefix}{QUERY}.lora_B.weight": up}
    said = settings(**changes)
    if writer == "peft":
        unet, *_ = merged(pipe, state, tmp_path, name="adapter_model.safetensors", config=said)
    else:
        packed = json.dumps({f"unet.{name}": value for name, value in said.items()} | {"text_encoder.lora_alpha": 100})
        unet, *_ = merged(pipe, state, tmp_path, {"format": "pt", "lora_adapter_metadata": packed})
    torch.testing.assert_close(unet.get_submodule(QUERY).weight, layer.weight + strength * up @ down)


def test_adapters_of_peft_find_the_text_encoder(pipe, tmp_path):
    layer = pipe.text_encoder.get_submodule(TEXT)
    down, up = pair(layer)
    stem = f"base_model.model.text_model.{TEXT}"
    state = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    _, text, _ = merged(pipe, state, tmp_path, name="adapter_model.safetensors", config=settings())
    torch.testing.assert_close(text.get_submodule(TEXT).weight, layer.weight + 3 * up @ down)


def test_alphas_in_kohyas_metadata_stand_in_for_keys(pipe, tmp_path):
    layer = pipe.unet.get_submodule(QUERY)
    down, up = pair(layer)
    stem = "lora_unet_" + QUERY.replace(".", "_")
    state = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    unet, *_ = merged(pipe, state, tmp_path, {"ss_network_alpha": "1", "ss_network_dim": "2"})
    torch.testing.assert_close(unet.get_submodule(QUERY).weight, layer.weight + 0.5 * up @ down)
    state[f"{stem}.alpha"] = torch.tensor(2.0)  # keys are nearer
    unet, *_ = merged(pipe, state, tmp_path, {"ss_network_alpha": "1", "ss_network_dim": "2"})
    torch.testing.assert_close(unet.get_submodule(QUERY).weight, layer.weight + up @ down)


# ------------------------------------------------------------------ DoRA and biases


@pytest.mark.parametrize("key", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"])
@pytest.mark.parametrize("where", [QUERY, CONV])
def test_dora_gives_every_output_its_magnitude(pipe, tmp_path, key, where):
    layer = pipe.unet.get_submodule(where)
    down, up = pair(layer)
    magnitude = draw(len(up), seed=7).abs() + 0.5
    stem = f"unet.{where}"
    names = ("lora_A.weight", "lora_B.weight")
    shape = (-1,) if where == QUERY else (1, -1, 1, 1)  # PEFT's
    if key == "dora_scale":
        stem, names = "lora_unet_" + where.replace(".", "_"), ("lora_down.weight", "lora_up.weight")
        shape = (-1, *(1,) * (layer.weight.ndim - 1))  # LyCORIS'
    state = {f"{stem}.{names[0]}": down, f"{stem}.{names[1]}": up, f"{stem}.{key}": magnitude.view(shape)}
    unet, *_ = merged(pipe, state, tmp_path, scale=0.5)
    plain = layer.weight.detach() + 0.5 * product(up, down)
    made = unet.get_submodule(where).weight
    lengths = made.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, magnitude)
    torch.testing.assert_close(made.flatten(1) / lengths[:, None], torch.nn.functional.normalize(plain.flatten(1)))


def test_dora_of_inputs(pipe, tmp_path):
    """LyCORIS may keep a magnitude for each input; the shape says so, also of a square matrix."""
    layer = pipe.unet.get_submodule(QUERY)
    down, up = pair(layer)
    magnitude = draw(1, layer.in_features, seed=7).abs() + 0.5
    stem = "lora_unet_" + QUERY.replace(".", "_")
    state = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": magnitude}
    unet, *_ = merged(pipe, state, tmp_path)
    torch.testing.assert_close(unet.get_submodule(QUERY).weight.norm(dim=0), magnitude[0])


def test_biases_of_updates_and_a_strength_of_zero(pipe, tmp_path):
    layer = pipe.unet.get_submodule(OUTPUT)
    down, up = pair(layer)
    bias = draw(len(up), seed=3)
    stem = f"unet.{OUTPUT}"
    state = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.lora_B.bias": bias}
    unet, *_ = merged(pipe, state, tmp_path, scale=2.0)
    torch.testing.assert_close(unet.get_submodule(OUTPUT).bias, layer.bias + 2 * bias)
    state[f"unet.{OUTPUT}.lora_magnitude_vector"] = torch.ones(len(up))
    unet, *_ = merged(pipe, state, tmp_path, scale=0.0)
    assert all(torch.equal(value, pipe.unet.state_dict()[name]) for name, value in unet.state_dict().items())


# ------------------------------------------------------------------ refusals


def whole(pipe):
    down, up = pair(pipe.unet.get_submodule(QUERY))
    stem = "lora_unet_" + QUERY.replace(".", "_")
    return stem, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}


@pytest.mark.parametrize(
    "more",
    [
        "lora_unet_mid_block_x.hada_w1_a",
        "lora_unet_mid_block_x.lokr_w1",
        "lora_unet_mid_block_x.oft_blocks",
        "lora_unet_conv_in.diff",
        "lora_unet_conv_in.diff_b",
        "bundle_emb.word.string_to_param.*",
        "unet.conv_in.base_layer.weight",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_unet_input_blocks_1_1_proj_in.lora_down.weight",
    ],
)
def test_what_is_no_low_rank_update_is_refused(pipe, tmp_path, more):
    _, state = whole(pipe)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    state[more] = draw(2, 8)
    if more.endswith("lora_down.weight"):
        state[more.replace("lora_down", "lora_up")] = draw(8, 2)
    with pytest.raises(LoRAFileError) as error:
        save_file(state, tmp_path / "lora.safetensors")
        merge_lora(pipe.unet, pipe.text_encoder, tmp_path / "lora.safetensors")
    assert more in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items()), (
        "nothing was changed"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"use_dora": True}, "no magnitudes"),
    ],
)
def test_adapters_that_are_more_than_an_update_are_refused(pipe, tmp_path, changes, message):
    down, up = pair(pipe.unet.get_submodule(QUERY))
    stem = f"base_model.model.{QUERY}"
    state = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    with pytest.raises(LoRAFileError, match=message):
        merged(pipe, state, tmp_path, name="adapter_model.safetensors", config=settings(**changes))
    merged(pipe, state, tmp_path, name="adapter_model.safetensors", config=settings(init_lora_weights="gaussian"))


def test_files_that_do_not_fit_name_what_is_wrong(pipe, tmp_path):
    stem, state = whole(pipe)
    half = {name: value for name, value in state.items() if "up" not in name}
    with pytest.raises(LoRAFileError, match=rf"no other half to {stem}\.lora_down"):
        merged(pipe, half, tmp_path)
    # As many numbers as the matrix has, but of another shape.
    wide = f"unet.{BLOCK}.attn2.to_k"
    out, into = pipe.unet.get_submodule(wide.removeprefix("unet.")).weight.shape
    assert out != into
    turned = {f"{wide}.lora_A.weight": draw(2, out), f"{wide}.lora_B.weight": draw(into, 2)}
    with pytest.raises(LoRAFileError, match="no place for"):
        merged(pipe, turned, tmp_path)
    with pytest.raises(LoRAFileError, match="no place for"):
        merged(pipe, {**state, f"{stem}.dora_scale": torch.ones(3)}, tmp_path)
    two = {f"unet.{QUERY}.lora_{half}.{name}.weight": draw(8, 8) for half in "AB" for name in ("a", "b")}
    with pytest.raises(LoRAFileError, match="adapters"):
        merged(pipe, two, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        merge_lora(pipe.unet, None, tmp_path / "empty")


# ------------------------------------------------------------------ a pipeline of the user's


def test_a_users_own_pipeline_stays_as_it_is(pipe, tmp_path):
    text = pipe.text_encoder.get_submodule(TEXT)
    state = {}
    for stem, layer in ((f"unet.{QUERY}", pipe.unet.get_submodule(QUERY)), (f"text_encoder.text_model.{TEXT}", text)):
        down, up = pair(layer)
        state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file(state, tmp_path / "lora.safetensors")
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    made = [TuneAVideoPipeline.from_base(pipe, lora=tmp_path / "lora.safetensors") for _ in range(3)]
    for one in made:
        for layer, own in ((QUERY, one.unet), (TEXT, one.text_encoder)):
            source = pipe.unet if own is one.unet else pipe.text_encoder
            down, up = pair(source.get_submodule(layer))
            torch.testing.assert_close(own.get_submodule(layer).weight, source.get_submodule(layer).weight + up @ down)
        with torch.no_grad():  # as tuning would
            for parameter in one.unet.parameters():
                parameter.add_(1.0)
    for name, part in parts.items():
        assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items()), name
