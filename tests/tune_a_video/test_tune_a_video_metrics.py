"""Scores of edited videos against hand computations, through a CLIP folder as users have one, and in an evaluator."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torchvision.models.optical_flow import raft_small
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from core.data import MissingDataError
from core.errors import ConfigError
from core.metrics.predictions import MetricError
from tune_a_video.metrics.clip_model import TransformersCLIP, load_clip
from tune_a_video.metrics.outside import OutsideScores, lpips_network
from tune_a_video.metrics.scores import (
    ClipScores,
    DrawnScores,
    EditQuality,
    FrameAccuracy,
    FrameConsistency,
    PickScore,
    TextAlignment,
    WarpError,
    consecutive_consistency,
    directional_similarity,
    frame_accuracy,
    frame_consistency,
    text_alignment,
)
from tune_a_video.metrics.warp import visible, warp, warp_error
from tune_a_video.standin import captions, draw_clip, make_tokenizer, measure, motion, path_distances
from tune_a_video.standin.folder import save_tiny_clip
from tune_a_video.standin.networks import Judge, TinyCLIP, text_config


# ---------------------------------------------------------------------- functions
def test_consistency_and_alignment_by_hand():
    frames = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    root = math.sqrt(0.5)
    assert frame_consistency(frames).item() == pytest.approx((0 + root + root) / 3, abs=1e-6)
    assert consecutive_consistency(frames).item() == pytest.approx((0 + root) / 2, abs=1e-6)
    text = torch.tensor([[-2.0, 0.0]])
    assert text_alignment(frames, text, math.log(100)).item() == pytest.approx(100 * (-1 + 0 - root) / 3, rel=1e-5)
    assert frame_accuracy(frames, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item() == pytest.approx(2 / 3)
    for function in (frame_consistency, consecutive_consistency):
        with pytest.raises(ValueError, match="two frames"):
            function(frames[:1])


# ---------------------------------------------------------------------- a CLIP folder
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random CLIP, saved as transformers saves one."""
    path = tmp_path_factory.mktemp("clip")
    tokenizer = make_tokenizer(captions())
    text = {**text_config(tokenizer, layers=1).to_dict(), "hidden_size": 16, "intermediate_size": 32}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@pytest.fixture
def videos():
    return torch.rand(2, 3, 4, 40, 48, generator=torch.Generator().manual_seed(1))


def test_embeddings_are_what_transformers_gives(folder, videos):
    clip = TransformersCLIP(folder, chunk=3)
    frames = videos[0].transpose(0, 1)
    pixels = (255 * frames).round().to(torch.uint8)
    values = clip.processor(images=list(pixels), return_tensors="pt").pixel_values
    assert values.shape == (4, 3, 32, 32)
    vision = clip.model.visual_projection(clip.model.vision_model(values).pooler_output)
    torch.testing.assert_close(clip.encode_frames(frames), vision)
    words = clip.tokenizer(captions()[:2], padding="max_length", max_length=10, return_tensors="pt").input_ids
    text = clip.model.text_projection(clip.model.text_model(words).pooler_output)
    torch.testing.assert_close(clip.encode_text(captions()[:2]), text)
    assert clip.encode_text(["a warm ball " * 20]).shape == (1, 8)  # too long: cut
    assert not torch.allclose(TransformersCLIP(folder, size=24).encode_frames(frames), vision, atol=1e-4)


def test_metrics_are_means_over_videos(folder, videos):
    clip = load_clip(folder)
    prompts, sources = captions()[:2], captions()[5:7]
    embedded = [clip.encode_frames(v.transpose(0, 1)) for v in videos]
    text, source = clip.encode_text(prompts), clip.encode_text(sources)
    wanted = {
        "frame_consistency": 100 * sum(frame_consistency(e) for e in embedded) / 2,
        "text_alignment": sum(text_alignment(e, t, clip.logit_scale) for e, t in zip(embedded, text, strict=True)) / 2,
        "consecutive_consistency": sum(consecutive_consistency(e) for e in embedded) / 2,
        "frame_accuracy": sum(frame_accuracy(*three) for three in zip(embedded, text, source, strict=True)) / 2,
    }
    scores = ClipScores(clip, list(wanted))
    scores.update(videos[:1], prompts[:1], sources[:1])
    scores.update(videos[1:], prompts[1:], sources[1:])
    for name, value in scores.compute().items():
        assert value.item() == pytest.approx(wanted[name].item(), rel=1e-5), name
    singles = {
        "frame_consistency": (FrameConsistency(clip), ()),
        "consecutive_consistency": (FrameConsistency(clip, consecutive=True), ()),
        "text_alignment": (TextAlignment(clip), (prompts,)),
        "frame_accuracy": (FrameAccuracy(clip), (prompts, sources)),
    }
    for name, (metric, texts) in singles.items():
        metric.update(videos, *texts)
        assert metric.compute().item() == pytest.approx(wanted[name].item(), rel=1e-5), name
    pick = PickScore(folder)
    pick.update(videos, prompts)
    resized = TransformersCLIP(folder, size=480)
    by_hand = [
        text_alignment(resized.encode_frames(v.transpose(0, 1)), t, clip.logit_scale)
        for v, t in zip(videos, text, strict=True)
    ]
    assert pick.compute().item() == pytest.approx(sum(by_hand).item() / 2, rel=1e-5)


def test_wrong_input_is_named(folder, videos, tmp_path):
    clip = load_clip(folder)
    with pytest.raises(ConfigError, match=r"'frame_consistensy'.*frame_consistency"):
        ClipScores(clip, ["frame_consistensy"])
    with pytest.raises(ValueError, match=r"\(b, 3, f, H, W\)"):
        FrameConsistency(clip).update(videos.transpose(1, 2))
    with pytest.raises(ValueError, match="text_alignment needs prompts: a list of 2"):
        TextAlignment(clip).update(videos, captions()[:1])
    with pytest.raises(ValueError, match="frame_accuracy needs source_prompts"):
        FrameAccuracy(clip).update(videos, captions()[:2])
    with pytest.raises(MissingDataError, match="there is no CLIP"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(MissingDataError, match="cannot be read as a CLIP"):
        load_clip(tmp_path)


# ---------------------------------------------------------------------- warp error
def test_warping_fetches_along_the_flow():
    frames = torch.arange(8.0).expand(1, 1, 6, 8).clone()
    flow = torch.zeros(1, 2, 6, 8)
    torch.testing.assert_close(warp(frames, flow), frames)
    flow[:, 0] = 1.5
    assert warp(frames, flow)[0, 0, 0].tolist() == pytest.approx([1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7, 7])


def test_a_video_that_moves_with_its_flow_has_no_error():
    first = torch.rand(3, 12, 20)
    second = torch.roll(first, 2, dims=2)  # two pixels to the right
    flow = torch.zeros(1, 2, 12, 20)
    flow[:, 0] = 2
    assert visible(flow, -flow)[0, 0].tolist() == [True] * 18 + [False] * 2
    assert not visible(flow, flow).any()
    video = torch.stack([first, second])
    assert warp_error(video, flow, -flow).item() < 1e-10
    still = torch.stack([first, first])
    expected = (first[:, :, 2:] - first[:, :, :18]).square().mean()
    assert warp_error(still, flow, -flow).item() == pytest.approx(expected.item(), rel=1e-4)
    assert warp_error(still, flow, flow).item() == 0  # nothing is visible in both


def test_warp_error_takes_the_sources_motion(tmp_path):
    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "raft.pth")
    metric = WarpError(tmp_path / "raft.pth", model="small", updates=1)
    videos, sources = torch.rand(2, 1, 3, 2, 128, 128)
    metric.update(videos, sources)
    pair = 2 * sources[0].transpose(0, 1) - 1
    with torch.no_grad():
        forward, backward = (metric.raft(a[None], b[None], num_flow_updates=1)[-1] for a, b in (pair, pair.flip(0)))
    by_hand = 1000 * warp_error(videos[0].transpose(0, 1), forward, backward)
    assert metric.compute().item() == pytest.approx(by_hand.item(), rel=1e-4) and by_hand > 0
    with pytest.raises(ValueError, match="64 x 64: RAFT takes"):
        metric.update(torch.rand(1, 3, 2, 64, 64))
    with pytest.raises(ValueError, match="two frames or more"):
        metric.update(torch.rand(1, 3, 1, 128, 128))
    with pytest.raises(ConfigError, match="model=huge"):
        WarpError(tmp_path / "raft.pth", model="huge")


# ---------------------------------------------------------------------- the drawn world, evaluators
@pytest.fixture
def standin(tmp_path):
    """The evaluating parts of a stand-in's folder, untrained."""
    from transformers import CLIPTextModelWithProjection

    from core.checkpoint import save_atomic

    tokenizer = make_tokenizer(captions())
    save_tiny_clip(
        TinyCLIP(CLIPTextModelWithProjection(text_config(tokenizer)), tokenizer, 0.25), tmp_path / "tiny_clip"
    )
    save_atomic(Judge(0.25).state_dict(), tmp_path / "judge/model.pt")
    (tmp_path / "judge/config.json").write_text(json.dumps({"width": 0.25}))
    return tmp_path


def test_drawn_scores_are_readings(standin):
    clips = [draw_clip(seed) for seed in range(2)]
    videos = torch.stack([(c.video.transpose(0, 1) + 1) / 2 for c in clips])
    centres = torch.stack([c.centres for c in clips])
    metric = DrawnScores(standin)
    metric.update(videos, centres, [c.caption for c in clips])
    figures = metric.compute()
    by_hand = [
        {**measure(c.video, c.centres, c.words, metric.judge)._asdict(), **motion(c.video, c.centres)._asdict()}
        for c in clips
    ]
    assert set(figures) == {"path", "words", "agree", "agree_right", "joint", "jitter", "motion_cosine", "speed_error"}
    assert figures["path"] < 0.25 and figures["motion_cosine"] > 0.9
    for name, value in figures.items():
        mean = sum(reading[name] for reading in by_hand) / 2
        assert value.item() == pytest.approx(mean, rel=1e-3), name
    # The frames that started from noise have a path of their own; a video without such frames does not count in it.
    shifted = videos.roll(2, dims=-1)
    shifted[:, :, :-2] = videos[:, :, :-2]
    mask = torch.arange(videos.shape[2]) >= videos.shape[2] - 2
    metric = DrawnScores(standin)
    metric.update(shifted, centres, [c.caption for c in clips], mask.expand(2, -1))
    metric.update(videos, centres, [c.caption for c in clips], torch.zeros_like(mask).expand(2, -1))
    frames = 2 * shifted[:, :, mask].transpose(1, 2) - 1
    distances = [path_distances(f, c.centres[mask]).mean().item() for f, c in zip(frames, clips, strict=True)]
    assert metric.compute()["path_new"].item() == pytest.approx(sum(distances) / 2, rel=1e-5) and min(distances) > 1
    with pytest.raises(ValueError, match="no caption of the drawn world"):
        metric.update(videos, centres, ["a jeep", "a car"])


def test_an_evaluator_counts_every_edit_of_every_clip(standin, folder):
    evaluator = EditQuality(standin, ("frame_consistency", "frame_accuracy"), pick_score=folder, drawn=standin)
    alone = DrawnScores(standin)
    for seed, count in ((0, 1), (1, 3)):
        clip = draw_clip(seed)
        edits = ((clip.video.expand(count, -1, -1, -1, -1) + 1) / 2).clamp(0, 1)
        prompts = [clip.caption, *captions()[:2]][:count]
        predicted = {
            "video": edits.transpose(1, 2),
            "prompt": prompts,
            "source_prompt": [clip.caption] * count,
            "centres": clip.centres.expand(count, -1, -1),
            "from_noise": torch.zeros(count, len(clip.centres), dtype=torch.bool),
        }
        evaluator.process({}, {**predicted, "sample_id": [f"drawn-{seed}/{k}" for k in range(count)]})
        alone.update(predicted["video"], predicted["centres"], prompts)
    figures = evaluator.evaluate(2)
    drawn = {name: value.item() for name, value in alone.compute().items()}
    assert set(figures) == {"frame_consistency", "frame_accuracy", "pick_score", *drawn}
    assert {name: figures[name] for name in drawn} == pytest.approx(drawn) and figures["path"] < 0.3
    assert alone.count.tolist() == [4] * 8 + [0]
    with pytest.raises(MetricError, match="not one sample"):
        evaluator.evaluate(2)
    with pytest.raises(MetricError, match="'video'"):
        evaluator.process({}, {"edit": edits, "sample_id": ["x"]})
    with pytest.raises(MetricError, match="'centres'"):
        evaluator.process({}, {key: value for key, value in predicted.items() if key != "centres"} | {"sample_id": "x"})
    with pytest.raises(ConfigError, match="give clip="):
        EditQuality()


# ---------------------------------------------------------------------- what an edit leaves alone, and where it goes
def test_directional_similarity_by_hand(folder, videos):
    before, frames = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [0.0, 5.0]])
    source, target = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 4.0]])
    # The first frame goes where the text goes, the second stays: a cosine of 1 and one of 0.
    assert directional_similarity(frames, before, target, source).item() == pytest.approx(0.5)
    assert directional_similarity(before, frames, target, source).item() == pytest.approx(-0.5)
    clip = load_clip(folder)
    score = ClipScores(clip, ("directional_similarity",))
    texts, sources = ["warm ball", "cool bar"], ["cool ball", "cool ball"]
    score.update(videos, texts, sources, videos.flip(0))
    embeddings = [clip.encode_frames(video.transpose(0, 1)) for video in videos]
    wanted = [
        directional_similarity(embeddings[i], embeddings[1 - i], *(clip.encode_text([t[i]]) for t in (texts, sources)))
        for i in (0, 1)
    ]
    assert score.compute()["directional_similarity"].item() == pytest.approx(
        torch.stack(wanted).mean().item(), abs=1e-5
    )
    with pytest.raises(ValueError, match="needs sources"):
        score.update(videos, texts, sources)
    quality = EditQuality(clip=folder, figures=["directional_similarity"])
    rows = {"video": videos, "source": videos.flip(0), "prompt": texts, "source_prompt": sources}
    quality.process(rows, rows)
    assert quality.evaluate()["directional_similarity"] == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-5)


def test_psnr_counts_the_pixels_outside_the_mask(videos):
    masks = torch.zeros(2, 4, 40, 48)
    masks[:, :, 10:30, 5:20] = 1
    sources = videos.clone()
    changed = torch.where(masks[:, None] > 0, 1 - videos, (videos + 0.1 * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1)))
    score = OutsideScores()
    score.update(changed, sources, masks)
    by_hand = [-10 * math.log10(error**2) for error in (0.1, 0.2)]
    assert score.compute()["outside_psnr"].item() == pytest.approx(sum(by_hand) / 2, abs=1e-3)
    whole = OutsideScores()
    whole.update(torch.where(masks[:, None] > 0, 1 - videos, videos), sources, masks)
    assert whole.compute()["outside_psnr"] == 100
    for wrong, message in ((masks[:, :3], "masks"), (torch.ones_like(masks), "covers every pixel")):
        with pytest.raises(ValueError, match=message):
            OutsideScores().update(changed, sources, wrong)


def test_lpips_outside_the_mask_is_that_of_torchmetrics(tmp_path):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save({f"features.{name}": v for name, v in alexnet().features.state_dict().items()}, tmp_path / "alexnet.pth")
    network = lpips_network(tmp_path / "alexnet.pth")
    source = torch.rand(1, 3, 2, 64, 64)
    mask = torch.zeros(1, 2, 64, 64)
    mask[..., 20:40, 20:40] = 1
    inside = torch.where(mask[:, None] > 0, 1 - source, source)
    everywhere = 1 - source
    kept = torch.where(mask[:, None] > 0, source, everywhere)
    scores = []
    for video in (inside, everywhere):
        score = OutsideScores(lpips=tmp_path / "alexnet.pth")
        score.update(video, source, mask)
        scores.append(score.compute()["outside_lpips"].item())
    frames, others = (2 * x[0].transpose(0, 1) - 1 for x in (kept, source))
    assert (
        scores[0] == 0 and scores[1] == pytest.approx(network(frames, others).mean().item(), rel=1e-5) and scores[1] > 0
    )
    features = network.net.slice1[0].weight
    torch.testing.assert_close(features, torch.load(tmp_path / "alexnet.pth", weights_only=True)["features.0.weight"])
    with pytest.raises(ConfigError, match="lpips"):
        OutsideScores(lpips=3)
