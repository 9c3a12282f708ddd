"""`tools/convert.py` for video models: files in the layouts that others publish, written from real modules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from torchvision.models.video import swin3d_t
from torchvision.models.video.swin_transformer import SwinTransformer3d

from core.engine.commands.convert import ConversionError, main
from stvit.checkpoint import CheckpointMismatch, convert
from stvit.models.stvit_video import stvit_video_swin_tiny
from stvit.models.video_swin import VideoSwin, video_swin_tiny


@pytest.fixture(scope="module")
def theirs() -> SwinTransformer3d:
    """torchvision's Video Swin-T, untrained, with tables that are not nearly 0."""
    torch.manual_seed(0)
    model = swin3d_t(weights=None, num_classes=400).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    return model


def official(model: SwinTransformer3d) -> dict[str, Tensor]:
    """The same weights under the names of Video Swin's authors, who train inside mmaction: backbone and head apart."""
    renamed = {}
    for name, value in model.state_dict().items():
        if match := re.fullmatch(r"features\.(\d+)\.(.+)", name):
            stage, merging = divmod(int(match[1]), 2)
            # Merging is numbered with the stage before it.
            name = f"layers.{stage}.{'downsample.' if merging else 'blocks.'}{match[2]}"
        name = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        renamed[name.replace("head.", "cls_head.fc_cls.") if name.startswith("head.") else f"backbone.{name}"] = value
    return renamed


def tool(src: Path, capsys: pytest.CaptureFixture[str], **options: str) -> tuple[dict[str, Tensor], str]:
    """What the tool wrote and printed."""
    dst = src.with_name("ours.safetensors")
    words = [f"{key}={value}" for key, value in options.items()]
    main(["paper=stvit", f"src={src}", f"dst={dst}", *words], "Convert.")
    from safetensors.torch import load_file

    return load_file(dst), capsys.readouterr().out


def same_answers(ours: VideoSwin, theirs: SwinTransformer3d) -> None:
    clip = torch.randn(1, 3, 2, 224, 224)  # whole windows: theirs attends padding, and misplaces small windows' tables
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(clip), theirs(clip), rtol=1e-4, atol=1e-4)


def test_torchvisions_file(theirs: SwinTransformer3d, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(theirs.state_dict(), tmp_path / "swin3d_t.pth")
    weights, text = tool(tmp_path / "swin3d_t.pth", capsys, target="video_swin_tiny")
    model = video_swin_tiny()
    model.load_state_dict(weights)
    same_answers(model, theirs)
    assert "12 dropped (index table, computed by the model)" in text and text.count(" dropped (") == 1


def test_the_authors_file(theirs: SwinTransformer3d, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "swin_tiny_patch244_window877_kinetics400_1k.pth"
    torch.save({"meta": {"epoch": 30}, "state_dict": official(theirs)}, file)
    weights, text = tool(file, capsys, target="video_swin_tiny")
    model = video_swin_tiny()
    model.load_state_dict(weights)
    same_answers(model, theirs)
    assert "left aside: meta" in text and text.count(" dropped (") == 1


@pytest.mark.parametrize("layout", ["torchvision", "official"])
def test_semantic_layers_explain_what_they_drop(
    layout: str, theirs: SwinTransformer3d, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = official(theirs) if layout == "official" else theirs.state_dict()
    torch.save({"state_dict": state}, tmp_path / "video.pth")
    weights, text = tool(tmp_path / "video.pth", capsys, target="stvit_video_swin_tiny")
    model = stvit_video_swin_tiny()
    model.load_state_dict(weights)
    # Three of six layers of the third stage and both of the fourth have semantic tokens.
    assert "5 dropped (the layer works on semantic tokens" in text
    third = state["backbone.layers.2.blocks.5.mlp.fc1.bias" if layout == "official" else "features.4.5.mlp.0.bias"]
    assert torch.equal(weights["stages.2.semantic.0.mlp.fc1.bias"], third)


def test_image_weights_are_inflated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = timm.create_model("swin_tiny_patch4_window7_224").eval()
    torch.save({"model": image.state_dict()}, tmp_path / "swin_tiny_patch4_window7_224.pth")
    found = {}
    for inflation in ("mean", "centre"):
        found[inflation], text = tool(
            tmp_path / "swin_tiny_patch4_window7_224.pth", capsys, target="video_swin_tiny", inflation=inflation
        )
        assert re.search(r"2 dropped \(classifier.*head\.fc\.weight", text)
    model = video_swin_tiny(num_classes=0).eval()
    model.load_state_dict(found["mean"])
    picture = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        features = model.forward_features(picture[:, :, None].expand(-1, -1, 4, -1, -1))
        expected = image.forward_features(picture)
    torch.testing.assert_close(features, expected[:, None].expand_as(features), rtol=1e-3, atol=1e-3)
    assert torch.equal(found["centre"]["stem.proj.weight"][:, :, 1], image.patch_embed.proj.weight)
    assert not found["centre"]["stem.proj.weight"][:, :, 0].any()


def test_a_classifier_of_other_classes_stays_out(
    theirs: SwinTransformer3d, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = official(theirs)
    for part in ("weight", "bias"):
        state[f"cls_head.fc_cls.{part}"] = state[f"cls_head.fc_cls.{part}"][:174]
    torch.save({"state_dict": state}, tmp_path / "something_something.pth")
    weights, text = tool(tmp_path / "something_something.pth", capsys, target="video_swin_tiny")
    assert "2 dropped (classifier of another number of classes" in text
    assert weights.keys() == {name for name in video_swin_tiny().state_dict() if not name.startswith("head.")}


def test_what_does_not_fit_is_listed_and_nothing_is_written(
    theirs: SwinTransformer3d, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = official(theirs)
    del state["backbone.layers.0.blocks.1.attn.relative_position_bias_table"]
    state["backbone.layers.3.blocks.2.mlp.fc1.bias"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointMismatch) as error:
        tool(tmp_path / "odd.pth", capsys, target="video_swin_tiny")
    assert re.search(r"missing:\n +stages\.0\.blocks\.1\.attn\.relative_position_bias_table\n", str(error.value))
    assert re.search(r"unexpected:\n +stages\.3\.blocks\.2\.mlp\.fc1\.bias", str(error.value))
    assert not (tmp_path / "ours.safetensors").exists()
    with pytest.raises(ConversionError, match=r"name the target, one of video_swin_tiny, .*stvit_video_swin_base"):
        tool(tmp_path / "odd.pth", capsys)


def test_models_are_targets_too(theirs: SwinTransformer3d) -> None:
    sizes = dict(clip_size=(4, 32, 32), embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=3)
    model, other = VideoSwin(**sizes), VideoSwin(**sizes)
    own = convert(model.state_dict(), other)
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())
    kept = convert(model.state_dict(), other, load_head=False)
    assert torch.equal(kept["head.weight"], other.head.weight)
    with pytest.raises(CheckpointMismatch, match=r"features|stages\.2"):
        convert(theirs.state_dict(), model)
