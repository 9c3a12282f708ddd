"""The pipeline as users of diffusers expect it: folders in and out, prompts in batches, inversion that leads back."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from random_sd import make_pipeline, make_tokenizer, quiet
from safetensors.torch import save_file

from core.output.media import as_pixels
from tune_a_video.data.video_io import save_video, to_pixels, video_grid
from tune_a_video.inference.inversion import ddim_invert
from tune_a_video.inference.text import PartsMismatch
from tune_a_video.inference.windows import predict_in_windows, window_spans
from tune_a_video.interop.folders import NotAPipeline
from tune_a_video.interop.lora import merge_lora
from tune_a_video.interop.pipeline import TuneAVideoPipeline
from tune_a_video.models import TuneAVideoUNet


def frames(count=3, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(videos=1, count=3, seed=0):
    return torch.randn(videos, 4, count, 8, 8, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ folders


def test_three_lines_give_a_gif_and_an_mp4(sd_folder, tmp_path):
    pipe = TuneAVideoPipeline.from_base(sd_folder)
    video = quiet(pipe)("a panda is surfing", video_length=4, num_inference_steps=2).videos[0]
    files = [save_video(video, tmp_path / name) for name in ("panda.gif", "panda.mp4", "panda")]
    assert video.shape == (3, 4, 16, 16) and video.min() >= 0 and video.max() <= 1
    assert all(file.exists() for file in files)
    assert [file.name for file in sorted(files[2].iterdir())] == [f"{i:05d}.png" for i in range(4)]


def test_saved_pipeline_reads_back(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    back = quiet(TuneAVideoPipeline.from_pretrained(tmp_path))
    assert isinstance(back.unet, TuneAVideoUNet)
    options = {"latents": noise(), "num_inference_steps": 2}
    torch.testing.assert_close(back("a", **options).videos, pipe("a", **options).videos)
    given = quiet(TuneAVideoPipeline.from_pretrained(tmp_path, unet=pipe.unet, torch_dtype=torch.bfloat16))
    assert given.unet is pipe.unet and given.vae.dtype == torch.bfloat16


def test_released_folder(pipe, sd_folder, tmp_path):
    folder = tmp_path / "released"
    shutil.copytree(sd_folder, folder)
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", safe_serialization=False)
    config = json.loads((folder / "unet" / "config.json").read_text())
    for name in ("attention", "group_norm", "temporal"):
        del config[name]
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "UNet3DConditionModel"}))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "TuneAVideoPipeline", "unet": ["models", "UNet3DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    back = quiet(TuneAVideoPipeline.from_official(folder))
    options = {"latents": noise(), "num_inference_steps": 2}
    torch.testing.assert_close(back("a", **options).videos, pipe("a", **options).videos)
    assert back.unet.config.temporal["enabled"]


def test_sampler_of_the_base_gives_way_to_ddim(pipe):
    assert type(pipe.scheduler) is DDIMScheduler
    config = pipe.scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)


def test_pipeline_in_memory_is_a_base(pipe):
    made = quiet(TuneAVideoPipeline.from_base(make_pipeline(), attention="self"))
    assert made.unet.config.attention == "self"
    assert made("a", latents=noise(), num_inference_steps=1).videos.shape == (1, 3, 3, 16, 16)


@pytest.mark.parametrize("missing", ["vae", "unet", "tokenizer"])
def test_folder_that_is_no_pipeline_names_what_it_lacks(sd_folder, tmp_path, missing):
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    shutil.rmtree(folder / missing)
    for load in (TuneAVideoPipeline.from_base, TuneAVideoPipeline.from_official):
        with pytest.raises(NotAPipeline, match=f"lacks {missing}"):
            load(folder)
    with pytest.raises(NotAPipeline, match="no folder"):
        TuneAVideoPipeline.from_base(tmp_path / "nowhere")
    with pytest.raises(NotAPipeline, match=r"model\.base"):
        TuneAVideoPipeline.from_base(None)


def test_parts_of_different_models_are_refused(pipe):
    parts = dict(pipe.components)
    bigger = make_tokenizer(extra=[f"word{i}" for i in range(40)])
    with pytest.raises(PartsMismatch, match="embeddings"):
        TuneAVideoPipeline(**{**parts, "tokenizer": bigger})
    other = TuneAVideoUNet.from_config({**dict(pipe.unet.config), "cross_attention_dim": 24})
    with pytest.raises(PartsMismatch, match="24"):
        TuneAVideoPipeline(**{**parts, "unet": other})


# ------------------------------------------------------------------ sampling


def test_prompts_of_a_batch_have_their_own_generators(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    options = {"video_length": 3, "num_inference_steps": 3, "eta": 1.0}
    both = pipe(["a cat", "a dog"], generator=generators, **options).videos
    alone = pipe("a dog", generator=[torch.Generator().manual_seed(8)], **options).videos
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_guidance_is_against_the_negative_prompt(pipe):
    options = {"latents": noise(), "num_inference_steps": 2, "output_type": "latent"}
    plain = pipe("a cat", guidance_scale=1.0, **options).videos
    same = pipe("a cat", negative_prompt="a cat", guidance_scale=9.0, **options).videos
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    assert (pipe("a cat", guidance_scale=9.0, **options).videos - plain).abs().max() > 1e-3


def test_one_start_serves_all_prompts_and_copies(pipe):
    out = pipe(["a", "b"], latents=noise(), num_videos_per_prompt=2, num_inference_steps=2, output_type="latent").videos
    assert out.shape == (4, 4, 3, 8, 8)
    torch.testing.assert_close(out[0], out[1], atol=1e-4, rtol=1e-4)
    assert (out[0] - out[2]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_samplers_are_exchanged(sd_folder, kind):
    pipe = quiet(TuneAVideoPipeline.from_base(sd_folder))
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    video = pipe("a", video_length=2, num_inference_steps=3, generator=generator).videos
    assert torch.isfinite(video).all()
    with pytest.raises(ValueError, match="eta"):
        pipe("a", video_length=2, num_inference_steps=1, eta=0.5)


def test_callbacks_see_and_change_latents(pipe):
    seen = []

    def callback(owner, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = pipe("a", latents=noise(), num_inference_steps=4, callback_on_step_end=callback, output_type="latent")
    assert seen == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert (out.videos == 0).all()
    with pytest.raises(ValueError, match="timesteps"):
        pipe("a", latents=noise(), callback_on_step_end_tensor_inputs=["timesteps"])


def test_output_types(pipe):
    options = {"latents": noise(), "num_inference_steps": 1, "guidance_scale": 1.0}
    tensor = pipe("a", **options).videos
    np.testing.assert_allclose(pipe("a", output_type="np", **options).videos, tensor.numpy())
    pictures = pipe("a", output_type="pil", **options).frames
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures[0]]), to_pixels(tensor[0]))
    assert pipe("a", return_dict=False, output_type="latent", **options)[0].shape == (1, 4, 3, 8, 8)


def test_slicing_and_precision(sd_folder, pipe):
    options = {"latents": noise(), "num_inference_steps": 2}
    want = pipe("a", **options).videos
    pipe.enable_vae_slicing()
    torch.testing.assert_close(pipe("a", **options).videos, want)
    pipe.disable_vae_slicing()
    half = quiet(TuneAVideoPipeline.from_base(sd_folder, torch_dtype=torch.bfloat16))
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}
    assert (
        half("a", guidance_scale=1.0, **options).videos - pipe("a", guidance_scale=1.0, **options).videos
    ).abs().mean() < 0.02
    assert [part.strip() for part in half.model_cpu_offload_seq.split("->")] == ["text_encoder", "unet", "vae"]


def test_clean_latents_are_noised_as_far_as_asked(pipe):
    clean = noise(seed=3)
    options = {"num_inference_steps": 10, "guidance_scale": 1.0, "output_type": "latent"}
    starts, steps = {}, {}
    for strength in (0.2, 0.9):
        seen = []
        generator = torch.Generator().manual_seed(0)
        pipe(
            "a",
            latents=clean,
            strength=strength,
            generator=generator,
            callback_on_step_end=lambda owner, i, t, tensors, seen=seen: (
                seen.append((int(t), tensors["latents"])) or {}
            ),
            **options,
        )
        steps[strength] = [t for t, _ in seen]
        starts[strength] = (seen[0][1] - clean).abs().mean()
    assert steps == {0.2: [101, 1], 0.9: [801, 701, 601, 501, 401, 301, 201, 101, 1]}
    assert starts[0.9] > 2 * starts[0.2]
    with pytest.raises(ValueError, match="strength"):
        pipe("a", latents=clean, strength=1.5)


@pytest.mark.parametrize(("kind", "calls"), [(EulerDiscreteScheduler, 5), (HeunDiscreteScheduler, 9)])
def test_other_samplers_leave_out_the_same_share_of_steps(sd_folder, kind, calls):
    pipe = quiet(TuneAVideoPipeline.from_base(sd_folder))
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    seen = []
    options = {"num_inference_steps": 10, "guidance_scale": 1.0, "output_type": "latent"}
    out = pipe(
        "a",
        latents=noise(),
        strength=0.5,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda _, i, t, tensors: seen.append(float(t)) or {},
        **options,
    ).videos
    assert len(seen) == calls and seen[0] < 501 and torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "at least one"),
        ({"prompt": 3}, "not 3"),
        ({"prompt": ["a", None]}, "list of texts"),
        ({"prompt": None}, "give prompt"),
        ({"prompt": "a"}, "video_length"),
        ({"prompt": "a", "video_length": 3, "height": 17}, "use 16 x 16"),
        ({"prompt": "a", "video_length": 5, "latents": noise()}, "the latents have 3"),
        ({"prompt": ["a", "b", "c"], "latents": noise(2)}, "for 3 videos"),
        ({"prompt": "a", "latents": noise(), "output_type": "gif"}, "pil"),
        ({"prompt": ["a", "b"], "latents": noise(), "negative_prompt": ["x", "y", "z"]}, "negative"),
        ({"prompt": ["a", "b"], "video_length": 2, "generator": [torch.Generator()]}, "one for each"),
    ],
)
def test_arguments_that_do_not_go_together(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=1, **options)


def test_frames_that_the_autoencoder_cannot_take(pipe):
    with pytest.raises(ValueError, match="use 16 x 16"):
        pipe.encode_video(torch.zeros(2, 3, 16, 17))
    with pytest.raises(ValueError, match=r"\(f, 3, H, W\)"):
        pipe.encode_video(torch.zeros(2, 16, 16, 3))


def test_black_videos_are_errors(pipe):
    with pytest.raises(ValueError, match="bfloat16"):
        pipe.decode_latents(torch.full((1, 4, 2, 8, 8), float("nan")))


# ------------------------------------------------------------------ long clips


def test_windows_cover_the_clip():
    assert window_spans(8, 8, 2) == [(0, 8)]
    assert window_spans(20, 8, 2) == [(0, 8), (6, 14), (12, 20)]
    assert window_spans(10, 8, 0) == [(0, 8), (2, 10)]
    with pytest.raises(ValueError, match="overlap"):
        window_spans(20, 8, 8)


def test_overlapping_windows_share_the_first_frame_and_are_averaged():
    seen = []

    def predict(part, frames):
        seen.append(part.shape[2])
        torch.testing.assert_close(part.flatten(), torch.tensor([1.0 + i for i in frames]))
        return part + part[:, :, :1] + len(seen)

    latents = torch.arange(1.0, 7.0).view(1, 1, 6, 1, 1)
    out = predict_in_windows(predict, latents, 4, 2).flatten()
    assert seen == [4, 5]
    torch.testing.assert_close(out, torch.tensor([3.0, 4.0, 5.5, 6.5, 8.0, 9.0]))


def test_a_window_as_long_as_the_clip_changes_nothing_and_shorter_ones_need_less_at_a_time(pipe, monkeypatch):
    options = {"latents": noise(count=6), "num_inference_steps": 2, "output_type": "latent"}
    whole = pipe("a", **options).videos
    torch.testing.assert_close(pipe("a", window=6, **options).videos, whole)
    lengths = []
    forward = type(pipe.unet).forward
    monkeypatch.setattr(
        type(pipe.unet), "forward", lambda self, x, *a, **k: lengths.append(x.shape[2]) or forward(self, x, *a, **k)
    )
    assert torch.isfinite(pipe("a", window=3, overlap=1, **options).videos).all()
    inverted = pipe.invert(noise(count=6), steps=2, window=3, overlap=1)
    assert inverted.shape == (1, 4, 6, 8, 8)
    assert set(lengths) == {3, 4}


# ------------------------------------------------------------------ latents and inversion


def test_latents_are_the_scaled_posterior(pipe):
    video = frames()
    latents = pipe.encode_video(video)
    direct = pipe.vae.encode(video).latent_dist
    torch.testing.assert_close(latents[0].transpose(0, 1), direct.mean * pipe.vae.config.scaling_factor)
    mean, std = pipe.posterior(video, at_once=2)
    drawn = pipe.encode_video(video, sample=True, generator=torch.Generator().manual_seed(1))
    expected = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, expected)


def tame(alpha_kind):
    """A predictor that is smooth in x and t, in the meaning of the kind."""

    def predict(x, t):
        return 0.3 * torch.tanh(x) + 0.1 * torch.sin(t / 300)

    return predict


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inversion_is_that_of_diffusers_and_leads_back(kind):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": kind}
    ddim = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    inverse = DDIMInverseScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    steps, predict, start = 20, tame(kind), noise()
    inverse.set_timesteps(steps)
    x = start
    for t in inverse.timesteps:
        x = inverse.step(predict(x, t + 1 - 1), t, x).prev_sample
    ours = ddim_invert(predict, ddim, start, steps)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    errors = []
    for iterations in (0, 4):
        x = ddim_invert(predict, ddim, start, steps, iterations=iterations)
        ddim.set_timesteps(steps)
        for t in ddim.timesteps:
            x = ddim.step(predict(x, t), t, x).prev_sample
        errors.append((x - start).abs().max())
    assert errors[1] < 1e-3 < errors[0]


def test_inverted_latents_lead_back_through_the_network(pipe):
    latents = pipe.encode_video(frames())
    options = {"num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "latent"}
    exact = pipe("", latents=pipe.invert(latents, steps=20, iterations=5), **options).videos
    rough = pipe("", latents=pipe.invert(latents, steps=20), **options).videos
    far = pipe("", latents=noise(), **options).videos
    errors = [(video - latents).abs().mean() for video in (exact, rough, far)]
    assert errors[0] < errors[1] < errors[2]


def test_inversions_are_kept_by_weights_latents_and_settings(sd_folder, tmp_path, monkeypatch):
    pipe = quiet(TuneAVideoPipeline.from_base(sd_folder))
    latents = pipe.encode_video(frames())
    calls = []
    forward = type(pipe.unet).forward
    monkeypatch.setattr(type(pipe.unet), "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))

    def invert(**changed):
        before = len(calls)
        result = pipe.invert(**{"latents": latents, "steps": 4, "cache": tmp_path, **changed})
        return result, len(calls) - before

    first, cost = invert()
    again, free = invert()
    assert (cost, free) == (4, 0)
    torch.testing.assert_close(again, first, atol=0, rtol=0)
    assert invert(prompt="a")[1] == 4
    assert invert(latents=latents + 0.1)[1] == 4
    assert invert(iterations=1)[1] == 8
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(0.1)
    assert invert()[1] == 4
    assert invert()[1] == 0


# ------------------------------------------------------------------ LoRA and files


@pytest.mark.parametrize("layout", ["diffusers", "old", "kohya"])
def test_lora_files_are_merged(sd_folder, tmp_path, layout):
    unet = TuneAVideoUNet.from_pretrained_2d(sd_folder, "unet")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 8), (8, 2)))
    names = {
        "diffusers": (f"unet.{path}.to_q.lora_A.weight", f"unet.{path}.to_q.lora_B.weight"),
        "old": (f"{path}.processor.to_q_lora.down.weight", f"{path}.processor.to_q_lora.up.weight"),
        "kohya": tuple(f"lora_unet_{path.replace('.', '_')}_to_q.lora_{part}.weight" for part in ("down", "up")),
    }[layout]
    state = dict(zip(names, (down, up), strict=True))
    strength = 1.0
    if layout == "kohya":
        state[names[0].replace("lora_down.weight", "alpha")] = torch.tensor(1.0)
        strength = 0.5
    save_file(state, tmp_path / "lora.safetensors")
    before = unet.get_submodule(path).to_q.weight.clone()
    assert merge_lora(unet, None, tmp_path / "lora.safetensors", 2.0) == 1
    torch.testing.assert_close(unet.get_submodule(path).to_q.weight, before + 2.0 * strength * up @ down)


def test_lora_of_another_model_is_refused(sd_folder, tmp_path):
    unet = TuneAVideoUNet.from_pretrained_2d(sd_folder, "unet")
    save_file({"unet.deep.to_q.lora_A.weight": torch.ones(2, 8)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"unet\.deep"):
        merge_lora(unet, None, tmp_path / "lora.safetensors")
    save_file({"conv_in.weight": torch.ones(2, 8)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(unet, None, tmp_path / "none.safetensors")


def test_grid_rounds_unless_the_released_way_is_asked():
    videos = torch.full((2, 3, 2, 4, 4), 0.999 / 1)
    assert video_grid(videos)[0, 3, 3].tolist() == [255] * 3
    assert video_grid(videos, truncate=True)[0, 3, 3].tolist() == [254] * 3
    assert as_pixels(video_grid(videos, n_rows=2), "grid").shape == (2, 8, 14, 3)


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4"):
        save_video(torch.zeros(3, 2, 8, 8), tmp_path / "video.webm")
    with pytest.raises(ValueError, match=r"\(3, f, H, W\)"):
        save_video(torch.zeros(2, 4, 8, 8), tmp_path / "video.gif")
