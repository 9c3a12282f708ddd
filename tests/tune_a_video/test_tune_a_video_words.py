"""What protects words and sources: prior preservation, dropped captions and low rank as components, null-text."""

import pytest
import torch
from random_sd import make_pipeline, make_video_pipeline

from core.config import compose
from core.errors import ConfigError
from tune_a_video.inference.editing import Sampling, edit
from tune_a_video.inference.null_text import null_text_inversion
from tune_a_video.losses import add_noise
from tune_a_video.trainer import TuneAVideoTrainer

PRIOR = {"samples": 2, "steps": 2, "guidance_scale": 2.0}


def trainer(folder, **options):
    torch.manual_seed(0)
    return TuneAVideoTrainer(str(folder), **options).train()


def batch():
    video = torch.rand(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shape = {"noise": torch.randn(1, 4, 3, 8, 8), "posterior_noise": torch.zeros(1, 4, 3, 8, 8)}
    return {"video": video, "caption": ["a man"], "sample_id": ["clip"], "timesteps": torch.tensor([300]), **shape}


# ------------------------------------------------------------------ prior preservation


@pytest.mark.parametrize("prompts", [None, ["a dog", "a cat"]])
def test_the_prior_is_the_denoising_loss_of_images_of_the_untuned_model(sd_folder, prompts):
    made = trainer(sd_folder, prior_weight=0.5, prior={**PRIOR, "prompts": prompts})
    plain = trainer(sd_folder)
    given = batch()
    torch.manual_seed(3)
    losses = made.losses(given)
    torch.testing.assert_close(losses["loss_denoising"], plain.losses(given)["loss_denoising"])

    # The images, by the image pipeline of diffusers itself.
    image = make_pipeline()
    image.set_progress_bar_config(disable=True)
    image.scheduler = made.pipe.scheduler.__class__.from_config(made.pipe.scheduler.config)
    texts = [text for text in prompts or ["a man"] for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    images = torch.cat(
        [
            image(
                text, latents=torch.randn(1, 4, 1, 8, 8, generator=generator)[:, :, 0], num_inference_steps=2,
                guidance_scale=2.0, output_type="latent",
            ).images
            for text in texts
        ]
    )  # fmt: skip
    latents, states = made.prior_images("a man", (8, 8))
    torch.testing.assert_close(latents[:, :, 0], images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states, made.pipe.encode_prompt(texts))

    torch.manual_seed(3)
    chosen = int(torch.rand(1) * len(texts))
    noise, times = torch.randn(1, 4, 1, 8, 8), torch.randint(1000, (1,))
    alphas, _ = made.noise_levels()
    noisy = add_noise(latents[chosen : chosen + 1], noise, times, alphas)
    by_hand = (made.network(noisy, times, states[chosen : chosen + 1]).sample - noise).square().mean()
    torch.testing.assert_close(losses["loss_prior"], 0.5 * by_hand)
    assert "loss_prior" not in made.eval().losses(given)


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 2}}, {"delta": True}])
def test_its_images_are_the_bases_also_when_a_run_goes_on(sd_folder, tmp_path, options):
    made = trainer(sd_folder, prior_weight=1.0, prior=PRIOR)
    want, _ = made.prior_images("a man", (8, 8))
    with torch.no_grad():
        for name in made.trained:
            made.network.get_parameter(name).add_(0.1)
    if options.get("delta"):
        options = {"delta": str(made.network.save_delta(tmp_path / "tuned"))}
    on = trainer(sd_folder, prior_weight=1.0, prior=PRIOR, **options)
    tuned = {name: on.network.get_parameter(name).data.add_(0.05).clone() for name in on.trained}
    have, _ = on.prior_images("a man", (8, 8))
    torch.testing.assert_close(have, want)
    assert all(torch.equal(on.network.get_parameter(name), value) for name, value in tuned.items()) and on.training


def test_priors_that_mean_nothing(sd_folder):
    wrong = [
        ({"prior_weight": -1.0}, "prior_weight"),
        ({"prior": {"sample": 2}}, "sample"),
        ({"prior": {"steps": 0}}, "steps=0"),
    ]
    for options, message in [*wrong, ({"prior": {"prompts": "a"}}, "list of texts")]:
        with pytest.raises(ConfigError, match=message):
            trainer(sd_folder, **options)


@pytest.mark.parametrize("name", ["edit", "car_turn", "man_skiing", "man_surfing", "rabbit_watermelon"])
def test_they_are_components(name):
    cfg = compose([f"experiment=tune_a_video/{name}"])
    keys = {component["key"]: component for component in cfg["components"].values()}
    for key, default in (("prior_weight", 0.0), ("caption_dropout", 0.0), ("lora", None)):
        assert keys[f"model.{key}"]["default"] == default == cfg["model"][key]
        assert keys[f"model.{key}"]["alternatives"]
    drawn = compose(["experiment=tune_a_video/moving_shapes"])
    assert {"model.caption_dropout", "model.lora"} <= {part["key"] for part in drawn["components"].values()}


# ------------------------------------------------------------------ null-text inversion


@pytest.fixture(scope="module")
def pipe(sd_folder):
    made = make_video_pipeline(sd_folder)
    with torch.no_grad():
        for name, parameter in made.unet.named_parameters():
            if "attn2" in name:  # the text matters
                parameter.mul_(3)
    return made


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def test_null_texts_lead_guidance_back_to_the_source(pipe, latents):
    steps, scale = 4, 7.5
    path = pipe.invert(latents, "a cat", steps, trajectory=True)
    found = null_text_inversion(pipe, path, "a cat", scale, iterations=8, learning_rate=0.1, tolerance=0.0)
    assert found.shape == (steps, 1, 16, 16) and not found.requires_grad
    options = {"latents": path[-1], "num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent"}
    plain = pipe("a cat", **options).videos
    back = pipe("a cat", negative_prompt_embeds=found, **options).videos
    distance = [(video - latents).square().mean().item() for video in (plain, back)]
    assert distance[1] < 0.5 * distance[0]
    by_hand, text = path[-1], pipe.encode_prompt("a cat")
    with torch.no_grad():
        for t, empty in zip(pipe.scheduler.timesteps, found, strict=True):  # each step under its own
            without, with_text = (pipe.unet(by_hand, t, states).sample for states in (empty, text))
            by_hand = pipe.scheduler.step(without + scale * (with_text - without), t, by_hand).prev_sample
    torch.testing.assert_close(back, by_hand, atol=1e-3, rtol=1e-3)
    unmoved = null_text_inversion(pipe, path, "a cat", scale, iterations=0)
    torch.testing.assert_close(unmoved, pipe.encode_prompt("")[None].expand(steps, -1, -1, -1))
    torch.testing.assert_close(pipe("a cat", negative_prompt_embeds=unmoved, **options).videos, plain)
    with pytest.raises(ValueError, match="of 4 steps, sampling takes 2"):
        pipe("a cat", negative_prompt_embeds=found, **{**options, "num_inference_steps": 2})
    with pytest.raises(ValueError, match="trajectory is"):
        null_text_inversion(pipe, path[0], "a cat", scale)


def test_the_first_step_is_the_gradient_step_by_hand(pipe, latents):
    """One update of Adam is the learning rate times the sign of the gradient."""
    path = pipe.invert(latents, "a cat", 4, trajectory=True)
    found = null_text_inversion(pipe, path, "a cat", 3.0, iterations=1, learning_rate=0.01, tolerance=0.0)[0]
    empty = pipe.encode_prompt("").requires_grad_()
    t = pipe.scheduler.timesteps[0]
    with_text = pipe.unet(path[-1], t, pipe.encode_prompt("a cat")).sample.detach()
    without = pipe.unet(path[-1], t, empty).sample
    alpha, before = pipe.scheduler.alphas_cumprod[t], pipe.scheduler.alphas_cumprod[t - 250]
    noise = without + 3.0 * (with_text - without)
    clean = (path[-1] - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    led = before.sqrt() * clean + (1 - before).sqrt() * noise
    gradient = torch.autograd.grad((led - path[-2]).square().mean(), empty)[0]
    certain = gradient.abs() > 0.01 * gradient.abs().max()
    wanted = -0.01 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close((found - empty)[certain], wanted[certain], atol=1e-5, rtol=1e-2)


def test_edits_by_null_text(pipe, latents):
    options = {"steps": 2, "guidance_scale": 4.0, "inversion_prompt": None, "null_text": 2}
    plain, found = (
        edit(pipe, latents, "a cat", ["a dog"], Sampling(**{**options, "null_text": count})) for count in (0, 2)
    )
    assert found.shape == plain.shape == (1, 3, 2, 16, 16) and (found - plain).abs().max() > 1e-4
    for wrong in (
        {"inversion_prompt": ""},
        {"init": "noise"},
        {"negative_prompt": "a"},
        {"scheduler": "DDIMScheduler"},
    ):
        with pytest.raises(ValueError, match="null_text"):
            Sampling(**{**options, **wrong})
