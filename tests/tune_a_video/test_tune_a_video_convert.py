"""Conversion by command: official networks of every size pass, and files with an entry too few or too many do not."""

import json
from pathlib import Path

import pytest
import torch
from random_sd import UNET
from safetensors.torch import load_file, save_file

from core.engine.commands.convert import Options, convert_file
from tune_a_video.checkpoint import CheckpointMismatch, convert, network_like, revert
from tune_a_video.models import TRAINABLE_MODULES, TuneAVideoUNet

CASES = Path(__file__).parents[1] / "parity/cases/tune_a_video"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return TuneAVideoUNet(**UNET)


def by_command(state, folder, **options):
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "src.safetensors")
    convert_file(
        Options(
            paper="tune_a_video", src=str(folder / "src.safetensors"), dst=str(folder / "out.safetensors"), **options
        )
    )
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("name", ["keys_unet3d_sd14", "keys_unet3d_sd21"])
def test_official_networks_are_known_by_their_shapes(name):
    content = json.loads((CASES / f"{name}.json").read_text())
    with torch.device("meta"):
        published = {key: torch.empty(shape) for key, shape in content["keys"]}
    for target in ("network", None):
        assert convert({f"module.{key}": value for key, value in published.items()}, target).keys() == published.keys()
    made = network_like(published)
    assert sum(value.numel() for value in made.parameters()) == content["total"]
    image = revert(published, layout="image")
    assert convert(image).keys() == image.keys()
    with pytest.raises(CheckpointMismatch, match=r"missing:\n.*attn_temp"):
        convert(image, "network")


@pytest.mark.parametrize("target", ["network", None])
@pytest.mark.parametrize(
    "lacking",
    [
        "conv_in.weight", "conv_out.bias", "time_embedding.linear_2.bias", "conv_norm_out.weight",
        "down_blocks.0.resnets.0.time_emb_proj.weight", "down_blocks.0.downsamplers.0.conv.bias",
        "mid_block.attentions.0.proj_out.weight", "up_blocks.1.resnets.1.conv_shortcut.weight",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn_temp.to_q.weight",
        "up_blocks.1.attentions.0.transformer_blocks.0.norm_temp.bias",
    ],
)  # fmt: skip
def test_networks_with_an_entry_too_few_are_not_written(network, tmp_path, lacking, target):
    state = dict(network.state_dict())
    del state[lacking]
    with pytest.raises(CheckpointMismatch, match=lacking.replace(".", r"\.")):
        by_command(state, tmp_path, target=target)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("target", ["network", None])
@pytest.mark.parametrize("more", ["extra.weight", "conv_in.scale", "mid_block.resnets.2.conv1.weight"])
def test_networks_with_an_entry_too_many_are_not_written(network, tmp_path, more, target):
    with pytest.raises(CheckpointMismatch, match=more.replace(".", r"\.")):
        by_command({**network.state_dict(), more: torch.zeros(3)}, tmp_path, target=target)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("temporal", [{}, {"conv": "conv3"}, {"conv": "lora"}])
def test_whole_networks_are_written(tmp_path, temporal):
    made = TuneAVideoUNet(**UNET, temporal=temporal)
    for target in ("network", None):
        written = by_command(made.state_dict(), tmp_path, target=target)
        assert all(torch.equal(written[name], value) for name, value in made.state_dict().items())


def test_tuned_tensors_alone(network, tmp_path):
    state = network.delta_state_dict(TRAINABLE_MODULES)
    for target in ("delta", None):
        assert by_command(state, tmp_path, target=target).keys() == state.keys()
        (tmp_path / "out.safetensors").unlink()
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        few = {key: value for key, value in state.items() if key != name}
        for wrong, message in ((few, name), ({**state, "mid_block.bogus": torch.zeros(1)}, "mid_block.bogus")):
            with pytest.raises(CheckpointMismatch, match=message.replace(".", r"\.")):
                by_command(wrong, tmp_path, target=target)
            assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(CheckpointMismatch, match=r"unexpected:\n    conv1\.weight"):
        by_command({"conv1.weight": torch.zeros(1)}, tmp_path, target="delta")
