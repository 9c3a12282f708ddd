"""One-shot tuning: the loss, what is trained and kept, what a run leaves, and the errors on the way."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import compose
from core.engine.launch import build_trainer, run
from core.errors import ConfigError
from tests.gradients import unreached
from tune_a_video.data.video_io import save_video
from tune_a_video.inference.editing import Sampling, edit, plain_scores, starting_latents
from tune_a_video.interop.pipeline import TuneAVideoPipeline
from tune_a_video.losses import (
    add_noise,
    denoising_loss,
    frame_noise,
    min_snr_weight,
    prediction_target,
)
from tune_a_video.models import TuneAVideoUNet
from tune_a_video.trainer.tuning import TuneAVideoTrainer

QUICK = {"steps": 2, "guidance_scale": 2.0}
DRAWS = {
    "noise": torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    "posterior_noise": torch.zeros(1, 4, 3, 8, 8),
    "timesteps": torch.tensor([400]),
}


def trainer(folder, **options):
    torch.manual_seed(0)
    return TuneAVideoTrainer(str(folder), sample=QUICK, **options)


def batch(count=3, seed=0):
    video = torch.rand(1, count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return {"video": video, "caption": ["a man is skiing"], "sample_id": ["clip"]}


# ------------------------------------------------------------------ the loss

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_target_and_noisy_latents_determine_the_clean_ones(kind):
    latents, noise = torch.randn(2, 4, 3, 5, 5), torch.randn(2, 4, 3, 5, 5)
    times = torch.tensor([10, 800])
    noisy = add_noise(latents, noise, times, ALPHAS)
    target = prediction_target(latents, noise, times, ALPHAS, kind)
    alpha = ALPHAS[times].view(2, 1, 1, 1, 1)
    back = {
        "epsilon": (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt(),
        "v_prediction": alpha.sqrt() * noisy - (1 - alpha).sqrt() * target,
        "sample": target,
    }[kind]
    torch.testing.assert_close(back, latents, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="velocity"):
        prediction_target(latents, noise, times, ALPHAS, "velocity")


def test_loss_is_taken_in_float32_over_every_element():
    prediction = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    loss = denoising_loss(prediction, torch.zeros(2, 2, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32 and loss == 2.5
    assert denoising_loss(prediction, torch.zeros(2, 2), torch.tensor([1.0, 0.0])) == 2.25


def test_min_snr_leaves_noisy_steps_alone_and_caps_easy_ones():
    times = torch.tensor([5, 990])
    snr = ALPHAS[times] / (1 - ALPHAS[times])
    weight = min_snr_weight(times, ALPHAS, 5.0)
    torch.testing.assert_close(weight, torch.tensor([5.0 / snr[0], 1.0]))
    torch.testing.assert_close(min_snr_weight(times, ALPHAS, 5.0, "v_prediction")[1], snr[1] / (snr[1] + 1))
    with pytest.raises(ValueError, match="positive"):
        min_snr_weight(times, ALPHAS, 0.0)


@pytest.mark.parametrize(
    ("kind", "near", "far"), [("iid", 0.0, 0.0), ("shared", 1.0, 1.0), ("mixed", 0.5, 0.5), ("progressive", 0.894, 0.8)]
)
def test_noise_of_frames_has_unit_variance_and_its_correlation(kind, near, far):
    noise = frame_noise((1, 4, 4, 64, 64), kind, generator=torch.Generator().manual_seed(0))
    rows = noise.transpose(1, 2).reshape(4, -1)
    torch.testing.assert_close(rows.std(dim=1), torch.ones(4), atol=0.03, rtol=0)
    correlation = torch.corrcoef(rows)
    assert abs(correlation[1, 2] - near) < 0.03 and abs(correlation[1, 3] - far) < 0.03
    with pytest.raises(ValueError, match="progressive"):
        frame_noise((1, 4, 4, 8, 8), "pink")


def test_noise_offset_is_constant_over_places():
    plain, shifted = (
        frame_noise((1, 2, 3, 4, 4), "iid", s, generator=torch.Generator().manual_seed(0)) for s in (0, 0.5)
    )
    difference = shifted - plain
    assert difference.flatten(3).std(dim=3).max() < 1e-6 < difference.abs().min()


# ------------------------------------------------------------------ steps


def losses_of_steps(made, steps=3):
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-3)
    made.train()
    torch.manual_seed(7)
    losses = []
    for _ in range(steps):
        loss = made.losses(batch())["loss_denoising"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("option", [{}, {"gradient_checkpointing": True}])
def test_what_is_cached_changes_no_loss(sd_folder, option):
    plain = losses_of_steps(trainer(sd_folder, cache_latents=False))
    assert losses_of_steps(trainer(sd_folder, **option)) == pytest.approx(plain, rel=1e-5)
    assert len(set(plain)) == len(plain)


def test_the_clip_is_encoded_once_and_drawn_every_step(sd_folder, monkeypatch):
    made = trainer(sd_folder)
    encoded = []
    encode = made.pipe.vae.encode
    monkeypatch.setattr(made.pipe.vae, "encode", lambda x: encoded.append(len(x)) or encode(x))
    draws = [made._clean(batch())[0] for _ in range(3)]
    assert sum(encoded) == 3
    assert not torch.equal(draws[0], draws[1])
    mean, std, _ = made.encoding(batch()["video"][0], "a man is skiing", "clip")
    assert ((draws[0] - mean).abs() <= 6 * std).all()


def test_given_draws_decide_the_loss(sd_folder):
    made = trainer(sd_folder)
    shape = (1, 4, 3, 8, 8)
    given = {"noise": torch.randn(shape), "posterior_noise": torch.zeros(shape), "timesteps": torch.tensor([300])}
    loss = made.losses({**batch(), **given})["loss_denoising"]
    assert loss == made.losses({**batch(), **given})["loss_denoising"]
    latents, text = made.encoding(batch()["video"][0], "a man is skiing", "clip")[::2]
    alphas, kind = made.noise_levels()
    noisy = add_noise(latents, given["noise"], given["timesteps"], alphas)
    by_hand = (made.network(noisy, 300, text).sample - given["noise"]).square().mean()
    assert kind == "epsilon"
    torch.testing.assert_close(loss, by_hand)


def test_dropped_captions_are_empty_ones(sd_folder):
    given = {"noise": torch.randn(1, 4, 3, 8, 8), "posterior_noise": torch.zeros(1, 4, 3, 8, 8)}
    given["timesteps"] = torch.tensor([300])
    dropped = trainer(sd_folder, caption_dropout=1.0).train()
    empty = trainer(sd_folder).train()
    torch.testing.assert_close(
        dropped.losses({**batch(), **given}), empty.losses({**batch(), "caption": [""], **given})
    )
    dropped.eval()
    torch.testing.assert_close(
        dropped.losses({**batch(), **given}), empty.losses({**batch(), "sample_id": ["b"], **given})
    )


def test_only_the_chosen_parameters_move(sd_folder):
    made = trainer(sd_folder)
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    losses_of_steps(made)
    moved = {name for name, value in made.network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and moved <= set(made.trained)
    assert any("attn1.to_q" in name for name in moved) and any("attn_temp.to_out.0" in name for name in moved)
    assert not any("norm_temp" in name for name in made.trained)
    everything = trainer(sd_folder, trainable_modules=["all"])
    assert len(everything.trained) == len(list(everything.network.parameters()))


def test_low_rank_updates_alone_are_trained_and_read_back(sd_folder, tmp_path):
    made = trainer(sd_folder, lora={"rank": 2, "alpha": 4})
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    plain = trainer(sd_folder)
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) < sum(
        p.numel() for p in plain.parameters() if p.requires_grad
    )
    torch.testing.assert_close(made.losses({**batch(), **DRAWS}), plain.losses({**batch(), **DRAWS}))
    losses_of_steps(made)
    moved = {name for name, value in made.network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "attn_temp" in name for name in moved)
    assert any("attn1.to_q.lora_A" in name for name in moved) and any("attn2.to_q.lora_B" in name for name in moved)
    assert {name for name, p in made.network.named_parameters() if p.grad is not None} == set(made.trained)
    assert unreached(made.network) == []
    want = made.eval().losses({**batch(), **DRAWS})
    assert (want["loss_denoising"] - plain.eval().losses({**batch(), **DRAWS})["loss_denoising"]).abs() > 1e-5

    file = made.network.save_delta(tmp_path / "tuned")
    merged = trainer(sd_folder, delta=str(file)).eval()  # a network without such layers
    assert not any("lora" in name for name in merged.network.state_dict())
    torch.testing.assert_close(merged.losses({**batch(), **DRAWS}), want)
    again = trainer(sd_folder, lora={"rank": 2, "alpha": 4}).eval()
    assert again.network.load_delta(file)["attention"] == "first_prev"
    torch.testing.assert_close(again.losses({**batch(), **DRAWS}), want)
    resumed = trainer(sd_folder, lora={"rank": 2, "alpha": 4}).eval()
    resumed.load_state_dict(made.state_dict(), strict=False)
    torch.testing.assert_close(resumed.losses({**batch(), **DRAWS}), want)


def test_a_pipeline_tuned_by_low_rank_updates_is_saved_whole(sd_folder, tmp_path):
    from tune_a_video.inference.page import ResultsPage

    made = trainer(sd_folder, lora={"rank": 2}, trainable_modules=["attn1", "attn_temp"])
    losses_of_steps(made)
    runner = SimpleNamespace(model=made.eval(), work_dir=str(tmp_path), iter=3)
    ResultsPage(pipeline=True).after_train(runner)
    back = TuneAVideoPipeline.from_pretrained(tmp_path / "pipeline")
    options = {"latents": torch.randn(1, 4, 3, 8, 8), "num_inference_steps": 2, "output_type": "latent"}
    torch.testing.assert_close(back("a", **options).videos, made.pipe("a", **options).videos, atol=1e-4, rtol=1e-4)
    assert made.network.state_dict().keys() - back.unet.state_dict().keys()  # the trained one goes on as it was


def test_low_rank_updates_that_mean_nothing(sd_folder, tmp_path):
    for options, message in (
        ({"lora": {"rank": 0}}, "rank=0"),
        ({"lora": {"r": 4}}, "lora has no r"),
        ({"lora": {"rank": 2}, "trainable_modules": ["conv_in"]}, "conv_in is a Conv2d"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(sd_folder, **options)
    file = trainer(sd_folder, lora={"rank": 2}).network.save_delta(tmp_path / "tuned")
    state = load_file(file)
    state = {name: value[:, :4].contiguous() if "lora_A" in name else value for name, value in state.items()}
    save_file(state, tmp_path / "narrow.safetensors")
    with pytest.raises(ConfigError, match="no place here"):
        trainer(sd_folder, delta=str(tmp_path / "narrow.safetensors"))


def test_checkpoints_hold_the_tuned_tensors_and_fit_back(sd_folder):
    made = trainer(sd_folder)
    losses_of_steps(made)
    state = {name: value.clone() for name, value in made.state_dict().items()}
    assert {name.removeprefix("network.") for name in made.trained} - {
        n.removeprefix("network.") for n in state
    } == set()
    assert not any("conv_in" in name for name in state)
    fresh = trainer(sd_folder)
    fresh.load_state_dict(state, strict=False)
    for name, value in made.network.state_dict().items():
        torch.testing.assert_close(fresh.network.state_dict()[name], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": None}, r"model\.base"),
        ({"base": "nowhere"}, "no folder"),
        ({"attention": "both"}, "first_prev"),
        ({"temporal": {"position": "absolute"}}, "rotary"),
        ({"trainable_modules": ["attn7"]}, "attn7"),
        ({"noise": "pink"}, "iid"),
        ({"caption_dropout": 2.0}, "share"),
        ({"sample": {"init": "inversion"}}, "ddim_inversion"),
        ({"sample": {"init": "ddim_inversion:0"}}, "whole number from 1"),
        ({"sample": {"init": "sdedit:2"}}, "strength"),
        ({"sample": {"scheduler": "DDIM"}}, "DDIMScheduler"),
        ({"sample": {"step": 3}}, "step"),
        ({"delta": "nowhere.safetensors"}, "nowhere"),
    ],
)
def test_configurations_that_mean_nothing(sd_folder, options, message):
    with pytest.raises(ConfigError, match=message):
        TuneAVideoTrainer(**{"base": str(sd_folder), **options})


# ------------------------------------------------------------------ edits


def test_rows_of_a_prediction(sd_folder):
    made = trainer(sd_folder, prompts=["a cat", "a dog"]).eval()
    clips = batch()
    clips["centres"] = torch.zeros(1, 3, 2)
    rows = made.predict(clips)
    assert rows["video"].shape == rows["source"].shape == (2, 3, 3, 16, 16)
    assert (rows["prompt"], rows["source_prompt"]) == (["a cat", "a dog"], ["a man is skiing"] * 2)
    assert rows["sample_id"] == ["clip/0", "clip/1"] and rows["centres"].shape == (2, 3, 2)
    torch.testing.assert_close(rows["source"][1].transpose(0, 1), clips["video"][0] / 2 + 0.5)
    assert made.media(clips)["edits"].shape == (3, 20, 4 * 18 + 2, 3)


@pytest.mark.long
def test_clips_of_one_name_are_clips_of_their_own(sd_folder, tmp_path):
    """Two files `clip` of different folders, in one batch, one after the other, and through `infer`."""
    made = trainer(sd_folder, prompts=["a cat"]).eval()
    one, two = batch(seed=0), batch(seed=1)
    parts = [made.val_step(part) for part in (one, two)]
    for part, clip in zip(parts, (one, two), strict=True):
        assert (
            part["scores"][0]["inversion_psnr"]
            == trainer(sd_folder, prompts=["a cat"]).eval().val_step(clip)["scores"][0]["inversion_psnr"]
        )
        latents = made.encoding(clip["video"][0], "a man is skiing", "clip")[0]
        torch.testing.assert_close(latents, made.pipe.encode_video(clip["video"]))
    both = {key: torch.cat([one[key], two[key]]) if key == "video" else one[key] + two[key] for key in one}
    together = made.val_step(both)
    torch.testing.assert_close(together["video"], torch.cat([part["video"] for part in parts]))
    assert len(made.shown) == 2 and not torch.equal(made.shown[0].source, made.shown[1].source)
    shown = made.media(two)["edits"]
    assert (shown == made.shown[1].grid()).all() and not (shown == made.shown[0].grid()).all()
    assert made.provenance()["clips"] == ["clip", "clip"]
    # The same clip under another caption has another text, too.
    other = made.encoding(one["video"][0], "a dog", "clip")[2]
    assert not torch.equal(other, made.encoding(one["video"][0], "a man is skiing", "clip")[2])
    folders = [tmp_path / name for name in "ab"]
    made.clip = {"prompt": "a man", "n_frames": 3, "size": 16}
    changes = []
    for folder, clip in zip(folders, (one, two), strict=True):
        save_video(clip["video"][0].movedim(0, 1) / 2 + 0.5, folder / "clip")
        changes.append(made.infer(folder / "clip"))
    assert not (changes[0].pictures["source"] == changes[1].pictures["source"]).all()
    again = trainer(sd_folder, prompts=["a cat"], clip=made.clip).eval().infer(folders[1] / "clip")
    assert (again.pictures["edit_0"] == changes[1].pictures["edit_0"]).all()


def test_a_prompt_may_come_twice_or_be_called_as_a_column_is(sd_folder, tmp_path):
    prompts = ["a cat", "a cat", "inversion", "source", "a dog"]
    made = trainer(sd_folder, prompts=prompts, clip={"prompt": "a man", "n_frames": 3, "size": 16}).eval()
    save_video(batch()["video"][0].movedim(0, 1) / 2 + 0.5, tmp_path / "clip")
    found = made.infer(tmp_path / "clip")
    videos = {name: value for name, value in found.pictures.items() if not name[-5:].isdigit()}
    assert list(videos) == ["side_by_side", "source", "inversion", *(f"edit_{i}" for i in range(5))]
    alone = trainer(sd_folder, prompts=["a dog"], clip=made.clip).eval().infer(tmp_path / "clip")
    assert (videos["edit_4"] == alone.pictures["edit_0"]).all()
    assert (videos["edit_0"] == videos["edit_1"]).all() and not (videos["edit_0"] == videos["inversion"]).all()
    page = found.write(tmp_path / "page")
    assert page.read_text().count("<figure>") == len(list((tmp_path / "page" / "frames").iterdir())) == 7


def test_a_base_that_was_tuned_is_asked_for_what_it_was_tuned_with(sd_folder, tmp_path):
    TuneAVideoPipeline.from_base(sd_folder, attention="full").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="was tuned with attention='full'"):
        trainer(tmp_path)
    with torch.device("meta"), pytest.raises(ConfigError, match="was tuned with attention='full'"):
        trainer(tmp_path)
    assert trainer(tmp_path, attention="full").network.config.attention == "full"
    assert TuneAVideoPipeline.from_base(tmp_path).unet.config.attention == "full"


def test_prompts_of_the_data_set_stand_in_for_configured_ones(sd_folder):
    made = trainer(sd_folder).eval()
    assert made.predict({**batch(), "edits": {"style": ["a cat"], "object": ["a dog"]}})["prompt"] == ["a cat", "a dog"]
    with pytest.raises(ConfigError, match=r"model\.prompts"):
        made.predict(batch())


@pytest.mark.parametrize("init", ["ddim_inversion", "noise", "shared_noise", "sdedit:0.6"])
def test_edits_do_not_depend_on_their_neighbours(sd_folder, init):
    made = trainer(sd_folder).eval()
    latents = made.encoding(batch()["video"][0], "a man", "clip")[0]
    sampling = Sampling(init=init, steps=4, guidance_scale=2.0, eta=1.0)
    both = edit(made.pipe, latents, "a man", ["a cat", "a dog"], sampling)
    alone = edit(made.pipe, latents, "a man", ["a dog"], sampling)
    split = edit(made.pipe, latents, "a man", ["a cat", "a dog"], Sampling(**{**vars(sampling), "prompts_at_once": 1}))
    torch.testing.assert_close(both[1:], alone, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(both, split, atol=1e-3, rtol=1e-3)


def test_windows_of_an_evaluation_reach_inversion_and_sampling(sd_folder, monkeypatch):
    made = trainer(sd_folder).eval()
    lengths = []
    forward = type(made.network).forward
    monkeypatch.setattr(
        type(made.network), "forward", lambda self, x, *a, **k: lengths.append(x.shape[2]) or forward(self, x, *a, **k)
    )
    latents = torch.randn(1, 4, 5, 8, 8)
    out = edit(made.pipe, latents, "a man", ["a cat"], Sampling(steps=1, window=2, overlap=1))
    assert out.shape == (1, 3, 5, 16, 16) and lengths == [2, 3, 3, 3] * 2


def test_starts_of_sampling(sd_folder):
    made = trainer(sd_folder).eval()
    latents = made.encoding(batch()["video"][0], "a man", "clip")[0]
    starts = {
        init: starting_latents(made.pipe, latents, "a man", Sampling(init=init, steps=4))
        for init in ("ddim_inversion", "noise", "shared_noise", "sdedit:0.5")
    }
    assert starts["shared_noise"].std(dim=2).max() == 0 < starts["noise"].std(dim=2).min()
    assert torch.equal(starts["sdedit:0.5"], latents)
    gaps = Sampling(init="ddim_inversion:2", steps=4)
    start = starting_latents(made.pipe, latents, "a man", gaps)
    assert torch.equal(start[:, :, ::2], starts["ddim_inversion"][:, :, ::2])
    assert torch.equal(start[:, :, 1], starts["noise"][:, :, 1])
    assert gaps.from_noise(3).tolist() == [False, True, False]
    assert Sampling(init="noise").from_noise(3).all() and not Sampling(init="sdedit:0.5").from_noise(3).any()
    captioned = starting_latents(made.pipe, latents, "a man", Sampling(steps=4, inversion_prompt=None))
    assert not torch.allclose(captioned, starts["ddim_inversion"])
    assert type(made.pipe.scheduler).__name__ == "DDIMScheduler"
    sampling = Sampling(init="noise", steps=2, scheduler="EulerDiscreteScheduler")
    assert edit(made.pipe, latents, "a man", ["a cat"], sampling).shape == (1, 3, 3, 16, 16)
    assert type(made.pipe.scheduler).__name__ == "DDIMScheduler"


def test_plain_scores_of_a_copy_and_of_a_change(sd_folder):
    made = trainer(sd_folder).eval().edits(batch()["video"][0], "a man", ["a cat"], "clip")
    made.videos = torch.stack([made.source, (made.source + 0.1).clamp(max=1)])
    made.prompts = ["copy", "lighter"]
    made.inversion = made.source + 0.1
    scores = plain_scores(made)
    assert scores["inversion_psnr"] == pytest.approx(20.0, abs=0.01)
    assert scores["edits"][0]["change"] == 0.0
    assert scores["edits"][0]["flicker"] == pytest.approx(scores["source_flicker"])
    assert 5 < scores["edits"][1]["change"] <= 10


# ------------------------------------------------------------------ runs


def overrides(sd_folder, tmp_path):
    return [
        "experiment=tune_a_video/edit",
        "runtime=cpu",
        f"runs_dir={tmp_path / 'runs'}",
        f"run_dir={tmp_path / 'run'}",
        f"model.base={sd_folder}",
        f"train_dataloader.dataset.path={tmp_path / 'clip.mp4'}",
        "train_dataloader.dataset.prompt='a man is skiing'",
        "train_dataloader.dataset.size=16",
        "model.n_frames=3",
        "model.prompts=['a cat/dog is skiing','a man, sketch']",
        "model.sample.steps=2",
        "train_cfg.max_steps=3",
    ]


@pytest.mark.long
def test_one_command_tunes_edits_and_leaves_a_page_and_another_one_edits_again(sd_folder, tmp_path):
    from core.engine.commands.inference import infer
    from tune_a_video.data.video_io import save_video

    save_video(torch.rand(3, 6, 16, 16), tmp_path / "clip.mp4")
    given = overrides(sd_folder, tmp_path)
    result = run(compose([*given, "custom_hooks.page.pipeline=true"]))
    assert result["steps"] == 3 and result["metrics"]["change"] > 0
    assert result["parameters"] > result["trainable_parameters"] > 0
    page = tmp_path / "run" / "page" / "clip"
    text = (page / "index.html").read_text()
    assert "a man is skiing" in text and "a cat/dog is skiing" in text
    names = sorted(path.name for path in page.iterdir())
    assert "side_by_side.gif" in names and "02-a-cat-dog-is-skiing.gif" in names and "03-a-man-sketch.mp4" in names
    assert len(list((page / "frames" / "00-source").iterdir())) == 3
    scores = json.loads((page / "scores.json").read_text())
    assert [one["prompt"] for one in scores["edits"]] == ["a cat/dog is skiing", "a man, sketch"]

    tuned = TuneAVideoUNet.from_pretrained_2d(sd_folder, "unet")
    about = tuned.load_delta(tmp_path / "run" / "tuned.safetensors")
    assert (about["steps"], about["caption"], about["frames"]) == (3, ["a man is skiing"], [3])
    saved = TuneAVideoPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    for name, value in saved.unet.state_dict().items():
        torch.testing.assert_close(value, tuned.state_dict()[name])
    again = build_trainer(compose([*given, f"model.delta={tmp_path / 'run' / 'tuned.safetensors'}"]))
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], value)

    class Options:
        checkpoint, input = str(tmp_path / "run"), str(tmp_path / "clip.mp4")
        output, device, config_dir = str(tmp_path / "out"), "cpu", None

    (record,) = infer([*given, "model.prompts=['a wolf is skiing']"], Options)
    assert record["prompts"] == ["a wolf is skiing"] and record["scores"]["edits"][0]["change"] > 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"clip_edit_0.gif", "clip_side_by_side.gif", "clip_edit_0_00002.png", "results.json"} <= files
    page = tmp_path / "out" / "clip" / "index.html"
    assert record["page"] == str(page) and "a wolf is skiing" in page.read_text()
    assert json.loads((page.parent / "scores.json").read_text())["edits"] == record["scores"]["edits"]
    assert len(list((page.parent / "frames" / "02-a-wolf-is-skiing").iterdir())) == 3
    assert (page.parent / "02-a-wolf-is-skiing.gif").exists()


@pytest.mark.long
def test_resumed_tuning_ends_with_the_same_weights(sd_folder, tmp_path):
    from tune_a_video.data.video_io import save_video

    save_video(torch.rand(3, 4, 16, 16), tmp_path / "clip.mp4")
    given = [*overrides(sd_folder, tmp_path), "test_dataloader=null", "test_evaluator=null", "checkpoint.every_steps=2"]

    def weights(name, steps, *more):
        run(compose([*given, f"train_cfg.max_steps={steps}", f"run_dir={tmp_path / name}", *more]))
        unet = TuneAVideoUNet.from_pretrained_2d(sd_folder, "unet")
        unet.load_delta(tmp_path / name / "tuned.safetensors")
        return unet.state_dict()

    whole, half = weights("whole", 4), weights("half", 2)
    rest = weights("rest", 4, f"resume={tmp_path / 'half'}")
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
    assert not all(torch.equal(whole[name], half[name]) for name in whole)


def test_empty_prompts_stop_a_run_with_what_to_set(sd_folder, tmp_path):
    from tune_a_video.data.video_io import save_video

    save_video(torch.rand(3, 4, 16, 16), tmp_path / "clip.mp4")
    with pytest.raises(ConfigError, match=r"model\.prompts"):
        run(compose([*overrides(sd_folder, tmp_path), "model.prompts=[]"]))
    assert not (tmp_path / "run" / "tuned.safetensors").exists()


def test_clips_that_are_too_short_stop_before_training(sd_folder, tmp_path):
    from tune_a_video.data.video_io import save_video

    save_video(torch.rand(3, 4, 16, 16), tmp_path / "clip.mp4")
    with pytest.raises(ConfigError, match="4"):
        run(compose([*overrides(sd_folder, tmp_path), "model.n_frames=9"]))
