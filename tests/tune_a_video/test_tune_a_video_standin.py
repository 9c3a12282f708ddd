"""The drawn world, the folder that is made of it, and the readings of its videos."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from core.data import MissingDataError
from core.data.prepare import run_task
from core.errors import ConfigError
from tune_a_video.standin import (
    Words,
    agreement,
    all_words,
    captions,
    draw_clip,
    draw_pictures,
    edits,
    identity_vae,
    jitter,
    joint_frames,
    load_judge,
    load_tiny_clip,
    make_tokenizer,
    make_unet,
    measure,
    motion,
    parse_caption,
    path_distances,
    right_words,
    training,
    words_of_looks,
)
from tune_a_video.standin.networks import token_ids
from tune_a_video.standin.world import LOOKS, caption_numbers, hsv_to_rgb, paint

SMALL = ["unet_steps=3", "clip_steps=3", "judge_steps=3", "channels=8,16", "tower=0.25", "batch=4", "check_steps=2"]


# ---------------------------------------------------------------------- world
def test_captions_leave_the_looks_open():
    assert len(set(captions())) == 18
    assert captions()[0] == "a warm ball moves in the night"
    assert [parse_caption(c) for c in captions()] == all_words()
    with pytest.raises(ValueError, match="no caption of the drawn world"):
        parse_caption("a jeep car is moving on the road")
    pictures, looks = draw_pictures(4000, torch.Generator().manual_seed(0))
    assert pictures.shape == (4000, 3, 16, 16) and pictures.abs().max() < 1.5
    for head, count in enumerate(LOOKS):
        assert looks[:, head].unique().tolist() == list(range(count))
    _, wanted = draw_pictures(400, torch.Generator().manual_seed(0), Words(1, 1, 2))
    assert [wanted[:, head].unique().tolist() for head in range(3)] == [[3, 4, 5], [2, 3], [6, 7, 8]]
    assert (words_of_looks(wanted) == torch.tensor([1, 1, 2])).all()
    assert (caption_numbers(wanted) == all_words().index(Words(1, 1, 2))).all()


def test_colours_are_those_of_hsv():
    import colorsys

    hues = [0.0, 0.13, 0.4, 0.55, 0.7, 0.95]
    ours = hsv_to_rgb(torch.tensor(hues), torch.full((6,), 0.8), torch.full((6,), 0.9))
    theirs = torch.tensor([colorsys.hsv_to_rgb(h, 0.8, 0.9) for h in hues])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_shapes_have_their_areas():
    looks = torch.tensor([[0, shape, 0] for shape in range(4)])
    radius = 3.2
    drawn = paint(looks, torch.ones(4, 3), torch.zeros(4, 3), torch.full((4,), radius), torch.full((4, 2), 8.0))
    disc, bar = math.pi * radius**2, 4 * 0.5 * 1.35 * radius**2
    areas = torch.tensor([disc, 0.75 * disc, bar, bar])
    torch.testing.assert_close(drawn[:, 0].sum((1, 2)), areas, rtol=0.05, atol=0)
    assert drawn[0, 0, 8, 8] == 1 and drawn[1, 0, 8, 8] == 0
    assert drawn[2, 0, 4, 8] == 1 and drawn[2, 0, 8, 4] == 0 and drawn[3, 0, 8, 4] == 1


def test_a_clip_is_a_function_of_its_seed():
    clip, again, other = draw_clip(3), draw_clip(3), draw_clip(4)
    assert torch.equal(clip.video, again.video) and not torch.equal(clip.video, other.video)
    # the six clips of the deciding run
    assert [draw_clip(s).caption.split()[1:3] + [draw_clip(s).caption.split()[-1]] for s in range(6)] == [
        ["pinkish", "ball", "night"],
        ["warm", "bar", "stone"],
        ["pinkish", "ball", "snow"],
        ["warm", "bar", "stone"],
        ["warm", "ball", "snow"],
        ["pinkish", "ball", "snow"],
    ]
    long = draw_clip(3, frames=24)
    assert torch.equal(long.centres[:8], clip.centres)
    assert long.centres.min() >= 4 and long.centres.max() <= 12
    steps = clip.centres.diff(dim=0).norm(dim=1)
    assert steps.max() <= 3.0001 and (steps > 1.9).sum() >= 3  # a reflection shortens a step
    with pytest.raises(ValueError, match="at least 1"):
        draw_clip(0, frames=0)


def test_a_mask_holds_the_object_and_nothing_else():
    for seed in range(4):
        clip = draw_clip(seed)
        plain = draw_clip(seed).video.median(dim=3).values.median(dim=2).values  # (f, 3) of the background
        off = (clip.video - plain[..., None, None]).abs().amax(1)
        assert off[~clip.masks].max() < 0.5, "nothing of the object lies outside"
        grid = torch.arange(16) + 0.5
        rows, columns = torch.meshgrid(grid, grid, indexing="ij")
        for mask, (x, y) in zip(clip.masks, clip.centres, strict=True):
            assert 12 < mask.sum() < 70
            assert (columns[mask].mean() - x).abs() < 0.51 and (rows[mask].mean() - y).abs() < 0.51


def test_curved_paths_bend_and_change_speed_and_size():
    bends, speeds, sizes = [], [], []
    for seed in range(6):
        clip = draw_clip(seed, 16, "curved")
        assert torch.equal(clip.centres[:9], draw_clip(seed, 9, "curved").centres)
        assert clip.centres.min() >= 4 and clip.centres.max() <= 12
        steps = clip.centres.diff(dim=0)
        lengths = steps.norm(dim=1)
        assert lengths.max() < 4
        bends.append(torch.nn.functional.cosine_similarity(steps[1:], steps[:-1], dim=1).mean())
        speeds.append(lengths.max() / lengths.min())
        areas = clip.masks.sum((1, 2)).float()
        sizes.append(areas.max() / areas.min())
        assert clip.looks.tolist() == draw_clip(seed).looks.tolist(), "the words are those of the straight clip"
    assert max(bends) < 0.95 and min(speeds) > 1.5 and min(sizes) > 1.1
    with pytest.raises(ValueError, match="path='round'"):
        draw_clip(0, path="round")


def test_eight_edits_change_what_they_say():
    source = Words(2, 1, 0)
    found = edits(source)
    assert [e.words for e in found] == [
        (0, 1, 0),
        (1, 1, 0),
        (2, 0, 0),
        (2, 1, 1),
        (2, 1, 2),
        (0, 0, 0),
        (1, 1, 1),
        (1, 0, 2),
    ]
    assert found[7].kind == "colour +2, shape, background +2"
    assert found[2].prompt == "a pinkish ball moves in the night"


# ---------------------------------------------------------------------- parts
def test_the_autoencoder_is_the_identity():
    vae = identity_vae()
    pictures = 2 * torch.rand(3, 3, 16, 16) - 1
    posterior = vae.encode(pictures).latent_dist
    latents = posterior.sample()
    torch.testing.assert_close(latents, pictures, atol=3e-4, rtol=0)
    torch.testing.assert_close(vae.decode(latents).sample, pictures, atol=3e-4, rtol=0)
    assert vae.config.scaling_factor == 0.8 and not vae.training


def test_the_tokenizer_has_a_token_for_every_word_and_every_text():
    tokenizer = make_tokenizer(captions())
    ids = token_ids(tokenizer, captions())
    assert ids.shape == (18, 10)
    assert len({tuple(row) for row in ids.tolist()}) == 18
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and (ids[:, 8:] == tokenizer.eos_token_id).all()
    assert (ids[:, 1:8] != tokenizer.eos_token_id).all()
    other = token_ids(tokenizer, ["Jeep, é"])[0].tolist()
    assert tokenizer.decode(other, skip_special_tokens=True).replace(" ", "") == "jeep,é"
    # Numbers have to be the same in every run and process: a text encoder knows no others.
    assert ids[0].tolist() == [0, 322, 547, 524, 520, 517, 521, 539, 1, 1]


def test_the_image_model_has_the_size_it_should():
    assert sum(p.numel() for p in make_unet().parameters()) == 1_001_251


# ---------------------------------------------------------------------- measures
def test_a_source_clip_lies_on_its_path():
    for seed in range(4):
        clip = draw_clip(seed)
        assert path_distances(clip.video, clip.centres).mean() < 0.25
        shifted = path_distances(clip.video, clip.centres + torch.tensor([3.0, 0.0]))
        assert 2.7 < shifted.mean() < 3.3


def test_a_frame_without_an_object_counts_eight_pixels():
    clip = draw_clip(0)
    video = clip.video.clone()
    video[2] = 0.3
    distances = path_distances(video, clip.centres)
    assert distances[2] == 8 and distances[[0, 1, 3]].max() < 0.3
    with pytest.raises(ValueError, match="7 centres for 8 frames"):
        path_distances(video, clip.centres[:7])


def test_motion_is_that_of_displacements_wherever_the_object_is():
    clip = draw_clip(1, 12, "curved")
    own = motion(clip.video, clip.centres)
    assert own.motion_cosine > 0.97 and own.speed_error < 0.25
    moved = motion(clip.video, clip.centres + torch.tensor([3.0, -2.0]))
    assert moved == pytest.approx(own, abs=1e-5)  # an offset of the whole path does not count
    back = motion(clip.video.flip(0), clip.centres)
    assert back.motion_cosine < 0.6
    # The opposite way: cosines turn, speeds stay.
    turned = motion(clip.video, -clip.centres)
    assert turned.motion_cosine == pytest.approx(-own.motion_cosine, abs=1e-5)
    assert turned.speed_error == pytest.approx(own.speed_error, abs=1e-5)
    faster = motion(clip.video, 0.5 * clip.centres)  # the source is half as fast
    half = 0.5 * clip.centres.diff(dim=0).norm(dim=1).mean().item()
    assert faster.speed_error == pytest.approx(half, abs=0.15)
    video = clip.video.clone()
    video[3] = 0.3  # no object: two displacements of cosine 0, and of 8 pixels' error
    lost = motion(video, clip.centres)
    assert own.motion_cosine - lost.motion_cosine == pytest.approx(2 / 11, abs=0.02)
    assert lost.speed_error - own.speed_error == pytest.approx(16 / 11, abs=0.1)
    with pytest.raises(ValueError, match="stands still"):
        motion(clip.video, torch.full_like(clip.centres, 8.0))
    with pytest.raises(ValueError, match="11 centres for 12 frames"):
        motion(clip.video, clip.centres[:11])


def test_agreement_words_and_joint_by_hand():
    looks = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 3], [1, 1, 2]])
    assert agreement(looks) == pytest.approx(1 / 6)
    assert agreement(looks[:2]) == 1 and agreement(looks[:1]) == 1
    assert agreement(looks, torch.tensor([True, True, False, True])) == pytest.approx(1 / 6)
    assert agreement(looks, torch.tensor([True, False, True, True])) == 0  # the pair that agrees lacks its words
    assert right_words(looks, Words(0, 0, 0)).tolist() == [True, True, False, True]
    distances = torch.tensor([0.1, 1.6, 0.1, 0.1])
    assert joint_frames(distances, looks, Words(0, 0, 0)).tolist() == [True, False, False, False]


def test_jitter_is_the_spread_of_the_objects_colour():
    video = -torch.ones(2, 3, 16, 16)
    video[0, :, 6:9, 6:9] = 1.0  # 1.0 of [0, 1]
    video[1, :, 2:5, 9:12] = 0.6  # 0.8
    assert jitter(video) == pytest.approx(10, abs=1e-3)
    assert jitter(video[:1]) == 0


def test_measure_reads_what_a_judge_sees():
    class Fixed:
        def looks(self, video):
            return torch.tensor([[3, 2, 6]]).repeat(len(video), 1)

    clip = draw_clip(1)
    right = measure(clip.video, clip.centres, Words(1, 1, 2), Fixed())
    assert (right.words, right.agree, right.joint) == (1, 1, 1) and right.path < 0.25
    wrong = measure(clip.video, clip.centres, clip.words, Fixed())
    assert (wrong.words, wrong.agree, wrong.agree_right) == (0, 1, 0) and right.agree_right == 1
    assert measure(clip.video, clip.centres + 5, Words(1, 1, 2), Fixed()).joint == 0


# ---------------------------------------------------------------------- folder
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("sd") / "tiny_sd"
    text = run_task("tune_a_video", "tiny_sd", [f"output={output}", *SMALL])
    assert "a Stable Diffusion folder" in text and "roundtrip" in text
    return output


def test_diffusers_loads_the_folder(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
    generator = torch.Generator().manual_seed(0)
    images = pipeline(["a warm ball moves in the night"] * 2, generator=generator, **options).images
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    assert pipeline.unet.config.block_out_channels == [8, 16]


def test_what_evaluates_it_is_read_back(folder):
    clip, judge = load_tiny_clip(folder), load_judge(folder / "judge")
    text = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).text_encoder
    ids = token_ids(clip.tokenizer, captions())
    own = clip.text(input_ids=ids).last_hidden_state
    torch.testing.assert_close(own, text(ids).last_hidden_state)
    assert clip.encode_text(captions()).shape == (18, 64)
    frames = torch.rand(5, 3, 16, 16)
    assert clip.encode_frames(frames).shape == (5, 64)
    torch.testing.assert_close(clip.encode_frames(frames)[2:3], clip.encode_frames(frames[2:3]))  # no batch statistics
    assert judge.looks(frames).shape == (5, 3)
    assert judge.looks(frames[None]).shape == (1, 5, 3)


def test_what_is_there_is_left_alone(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "model_index.json"}
    note = json.loads((folder / "tiny_sd.json").read_text())
    assert note["settings"]["channels"] == [8, 16] and set(note["checks"]) >= {"colour", "shape", "clip_top1"}
    shares = [note["checks"][f"gate_{head}"] for head in ("colour", "shape", "background")]
    assert note["checks"]["gate"] == (min(shares) >= 0.98) and max(shares) < 0.9, "three steps teach no words"
    run_task("tune_a_video", "tiny_sd", [f"output={folder}", *SMALL])
    assert before == {p: p.stat().st_mtime_ns for p in before}
    with pytest.raises(ConfigError, match="give an empty output="):
        run_task("tune_a_video", "tiny_sd", [f"output={folder}", *SMALL, "seed=1"])


def test_other_folders_and_numbers_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        run_task("tune_a_video", "tiny_sd", [f"output={tmp_path}"])
    with pytest.raises(ConfigError, match="at least 1"):
        run_task("tune_a_video", "tiny_sd", [f"output={tmp_path / 'new'}", "unet_steps=0"])
    with pytest.raises(ConfigError, match="multiples of 4"):
        run_task("tune_a_video", "tiny_sd", [f"output={tmp_path / 'new'}", "channels=8,18"])
    assert not (tmp_path / "new").exists()
    with pytest.raises(MissingDataError, match="task=tiny_sd"):
        load_judge(tmp_path)


@pytest.mark.long
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    states, nothing = torch.randn(18, 10, 64), torch.randn(10, 64)
    options = {"scaling_factor": 0.8, "steps": 5, "channels": (8, 16), "batch": 2}
    whole = training.train_unet(states, nothing, **options).state_dict()
    monkeypatch.setattr(training, "_KEEP_EVERY", 2)
    decay = training.ratio_decay

    def stop(step, limit):
        if step == 3:
            raise KeyboardInterrupt
        return decay(step, limit)

    monkeypatch.setattr(training, "ratio_decay", stop)
    with pytest.raises(KeyboardInterrupt):
        training.train_unet(states, nothing, **options, keep=tmp_path / "state.pt")
    monkeypatch.setattr(training, "ratio_decay", decay)
    resumed = training.train_unet(states, nothing, **options, keep=tmp_path / "state.pt").state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_an_image_model_is_trained_further_from_where_it_was(folder, tmp_path):
    output = tmp_path / "more"
    text = run_task("tune_a_video", "tiny_sd", [f"output={output}", *SMALL, "further_steps=2"])
    assert "gate" in text and not (output / "unet_further.pt").exists()
    file = "diffusion_pytorch_model.safetensors"
    first, further = (load_file(output / name / file) for name in ("unet_first", "unet"))
    plain = load_file(folder / "unet" / file)
    assert all(torch.equal(first[name], value) for name, value in plain.items()), "the first training is the same"
    assert any(not torch.equal(first[name], value) for name, value in further.items())
    start = make_unet((8, 16)).requires_grad_(False)
    for parameter in start.parameters():
        parameter.fill_(0.25)  # no new model has such weights, and a step of the warm-up hardly moves them
    options = {"scaling_factor": 0.8, "steps": 1, "channels": (8, 16), "batch": 2}
    trained = training.train_unet(torch.randn(18, 10, 64), torch.randn(10, 64), **options, start=start)
    for name, parameter in trained.named_parameters():
        assert (parameter - 0.25).abs().max() < 0.01, name
    with pytest.raises(ConfigError, match="give an empty output="):
        run_task("tune_a_video", "tiny_sd", [f"output={folder}", *SMALL, "further_steps=2"])
