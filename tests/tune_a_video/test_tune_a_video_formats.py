"""Original single files, half precision, offloading, tiles, and other samplers from inverted latents."""

import shutil

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler
from original_layout import original_state
from random_sd import make_pipeline, make_video_pipeline, quiet
from safetensors.torch import save_file

from core.errors import ConfigError
from tune_a_video.interop.folders import NotAPipeline
from tune_a_video.interop.pipeline import TuneAVideoPipeline
from tune_a_video.trainer.tuning import TuneAVideoTrainer


@pytest.fixture
def pipe(sd_folder):
    """Every test's own: precision, tiles and offloading stay with a pipeline."""
    return make_video_pipeline(sd_folder)


def frames(count=3):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def noise(*sides):
    return torch.randn(1, 4, 3, *(sides or (8, 8)), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ original single files


@pytest.fixture
def single_file(tmp_path):
    save_file(original_state(make_pipeline()), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_an_original_file_is_a_base_with_the_configuration_of_a_folder(single_file, sd_folder, pipe, tmp_path):
    folder = tmp_path / "configuration"
    shutil.copytree(sd_folder, folder)
    for path in (*folder.rglob("*.safetensors"), *folder.rglob("*.bin")):
        path.unlink()  # only the small files are read
    made = quiet(TuneAVideoPipeline.from_base(single_file, config=folder))
    for part in ("vae", "text_encoder", "unet"):
        want = getattr(pipe, part).state_dict()
        have = getattr(made, part).state_dict()
        assert have.keys() == want.keys()
        assert all(torch.equal(have[name], want[name]) for name in want if "temp" not in name), part
    options = {"latents": noise(), "num_inference_steps": 2}
    torch.testing.assert_close(made("a", **options).videos, pipe("a", **options).videos)  # temporal output is zero
    tuned = TuneAVideoTrainer(str(single_file), base_config=str(folder))
    assert torch.equal(tuned.network.conv_in.weight, pipe.unet.conv_in.weight)


def test_a_file_without_configuration_says_what_to_give(single_file, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(NotAPipeline, match=r"config=.*model\.base_config="):
        TuneAVideoPipeline.from_base(single_file)
    with pytest.raises(ConfigError, match=r"model\.base_config="):
        TuneAVideoTrainer(str(single_file))
    with pytest.raises(NotAPipeline, match="no folder"):
        TuneAVideoPipeline.from_base(single_file, config=tmp_path / "nowhere")


def test_files_of_another_model_are_refused(single_file, sd_folder, tmp_path):
    state = original_state(make_pipeline())
    del state["first_stage_model.decoder.conv_in.weight"]
    save_file(state, tmp_path / "half.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.ckpt").write_text("no weights")
    for name in ("half.safetensors", "other.safetensors", "text.ckpt"):
        with pytest.raises(ValueError, match=name):
            TuneAVideoPipeline.from_base(tmp_path / name, config=sd_folder)
    with pytest.raises(ValueError, match=r"text\.ckpt"):
        TuneAVideoPipeline.from_base(tmp_path / "text.ckpt")


# ------------------------------------------------------------------ precision and memory


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_a_whole_edit_in_half_precision(sd_folder, pipe, dtype, near):
    def edited(made):
        latents = made.invert(made.encode_video(frames()), steps=4)
        return made("a cat", latents=latents, num_inference_steps=4, guidance_scale=3.0).videos

    half = quiet(TuneAVideoPipeline.from_base(sd_folder, torch_dtype=dtype))
    parts = (half.unet, half.vae, half.text_encoder)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {dtype}
    assert half.encode_prompt("a cat").dtype == dtype
    out = edited(half)
    assert out.dtype == torch.float32 and torch.isfinite(out).all()  # noise levels and pixels stay exact
    assert (out - edited(pipe)).abs().mean() < near


def test_tuning_in_bfloat16_ends_finite_with_float32_weights(sd_folder):
    torch.manual_seed(0)
    made = TuneAVideoTrainer(str(sd_folder)).train()
    batch = {"video": frames()[None], "caption": ["a man"], "sample_id": ["clip"]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = made.losses(batch)["loss_denoising"]
    loss.backward()
    gradients = [parameter.grad for parameter in made.parameters() if parameter.requires_grad]
    assert loss.dtype == torch.float32 and gradients
    assert all(gradient.dtype == torch.float32 and torch.isfinite(gradient).all() for gradient in gradients)


def test_offloaded_parts_give_the_same(sd_folder, pipe, monkeypatch):
    made = quiet(TuneAVideoPipeline.from_base(sd_folder))
    made.enable_model_cpu_offload(device="cpu")
    options = {"latents": noise(), "num_inference_steps": 2}
    for _ in range(2):  # hooks are in place again after a call
        torch.testing.assert_close(made("a", **options).videos, pipe("a", **options).videos)
        clean = pipe.encode_video(frames())
        torch.testing.assert_close(made.encode_video(frames()), clean)
        torch.testing.assert_close(made.invert(clean, steps=2), pipe.invert(clean, steps=2))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu")
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires accelerator"):
            enable()


def test_tiles_and_slices_of_the_autoencoder(pipe):
    small, large = noise(), noise(12, 20)
    whole, whole_large, latents = pipe.decode_latents(small), pipe.decode_latents(large), pipe.encode_video(frames())
    pipe.enable_vae_slicing()
    torch.testing.assert_close(pipe.decode_latents(small), whole)
    torch.testing.assert_close(pipe.encode_video(frames()), latents)
    pipe.enable_vae_tiling()
    torch.testing.assert_close(pipe.decode_latents(small), whole)  # a single tile
    torch.testing.assert_close(pipe.encode_video(frames()), latents)
    tiled = pipe.decode_latents(large)
    assert tiled.shape == whole_large.shape == (1, 3, 3, 24, 40) and not torch.equal(tiled, whole_large)
    assert (tiled - whole_large).abs().mean() < 0.5 * whole_large.std()
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    torch.testing.assert_close(pipe.decode_latents(large), whole_large)


# ------------------------------------------------------------------ samplers and callbacks


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, PNDMScheduler, HeunDiscreteScheduler])
def test_other_samplers_go_back_from_inverted_latents_too(pipe, kind):
    latents = pipe.encode_video(frames())
    by_ddim = pipe.invert(latents, steps=10)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    inverted = pipe.invert(latents, steps=10)
    torch.testing.assert_close(inverted, by_ddim)  # the path of DDIM, whatever samples
    options = {"num_inference_steps": 10, "guidance_scale": 1.0, "output_type": "latent"}
    back, far = (pipe("", latents=start, **options).videos for start in (inverted, noise()))
    assert (back - latents).abs().mean() < 0.25 * (far - latents).abs().mean()


def test_callbacks_replace_the_text_between_steps(pipe):
    options = {"latents": noise(), "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    want = pipe("a dog", **options).videos
    other = pipe.encode_prompt("a dog")

    def travel(owner, step, timestep, tensors):
        assert owner is pipe and set(tensors) == {"latents", "prompt_embeds"}
        return {"prompt_embeds": other}

    changed = pipe(
        "a cat",
        callback_on_step_end=travel,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        **options,
    ).videos
    plain = pipe("a cat", **options).videos
    assert (changed - plain).abs().max() > 1e-4
    assert (changed - want).abs().mean() < (plain - want).abs().mean()
    kept = pipe("a cat", callback_on_step_end=lambda *given: None, **options).videos
    torch.testing.assert_close(kept, plain)
