"""What users of diffusers do out of habit: its folders, its layouts of videos, its arguments; and what it cannot be."""

import json
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import export_to_gif, export_to_video
from PIL import Image
from random_sd import make_pipeline, quiet

from core.output.media import write_media
from tune_a_video.data import OneShotVideoDataset
from tune_a_video.data.video_io import save_video, to_pixels
from tune_a_video.inference.editing import Sampling
from tune_a_video.inference.inversion import ddim_invert
from tune_a_video.interop.folders import NotAPipeline, SchedulerMismatch
from tune_a_video.interop.pipeline import TuneAVideoPipeline
from tune_a_video.models import TuneAVideoUNet


def noise(videos=1, count=4):
    return torch.randn(videos, 4, count, 8, 8, generator=torch.Generator().manual_seed(0))


QUICK = {"num_inference_steps": 1, "guidance_scale": 1.0}

# ------------------------------------------------------------------ folders


FORMS = [(variant, safe, size) for variant in (None, "fp16") for safe in (True, False) for size in (None, "40KB")]


@pytest.mark.parametrize(("variant", "safe", "size"), [*FORMS, ("bf16", True, None), ("non_ema", False, "40KB")])
def test_every_form_of_folder_that_diffusers_writes(pipe, tmp_path, variant, safe, size):
    options = {"variant": variant, "safe_serialization": safe, "max_shard_size": size}
    image = make_pipeline()
    image.save_pretrained(tmp_path / "image", **options)
    made = quiet(TuneAVideoPipeline.from_base(tmp_path / "image", variant=variant))
    for part in ("unet", "vae", "text_encoder"):
        want, have = getattr(image, part).state_dict(), getattr(made, part).state_dict()
        assert all(torch.equal(have[name], value) for name, value in want.items()), part
    pipe.save_pretrained(tmp_path / "tuned", **options)
    for load in (TuneAVideoPipeline.from_pretrained, TuneAVideoPipeline.from_official):
        back = quiet(load(tmp_path / "tuned", variant=variant))
        torch.testing.assert_close(
            back("a", latents=noise(1, 2), **QUICK).videos, pipe("a", latents=noise(1, 2), **QUICK).videos
        )
    assert (size is not None) == (len(list((tmp_path / "tuned/unet").iterdir())) > 2)


def test_shards_as_older_releases_named_them(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    for name in ("safetensors.fp16.index", "fp16.safetensors.index"):
        index = index.rename(tmp_path / f"diffusion_pytorch_model.{name}.json")
        back = TuneAVideoUNet.from_official(tmp_path, variant="fp16").state_dict()
        assert all(torch.equal(back[name], value) for name, value in pipe.unet.state_dict().items())
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="gone"):
        TuneAVideoUNet.from_official(tmp_path, variant="fp16")


def test_variants_that_are_not_there_are_named(sd_folder, tmp_path):
    with pytest.raises(ValueError, match="no weights of the variant 'fp61'"):
        TuneAVideoPipeline.from_base(sd_folder, variant="fp61")
    make_pipeline().save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"there are diffusion_pytorch_model\.fp16\.safetensors"):
        TuneAVideoPipeline.from_base(tmp_path)


def test_folders_of_image_pipelines_are_not_read_as_tuned_ones(pipe, sd_folder, tmp_path):
    with pytest.raises(NotAPipeline, match="from_base"):
        TuneAVideoPipeline.from_pretrained(sd_folder)
    with pytest.raises(NotAPipeline, match="from_base"):
        TuneAVideoPipeline.from_pretrained(str(sd_folder), torch_dtype=torch.float16)
    parts = dict(make_pipeline().components)
    with pytest.raises(ValueError, match="from_base"):
        TuneAVideoPipeline(**{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")})
    given = TuneAVideoPipeline.from_pretrained(sd_folder, unet=pipe.unet)
    assert given.unet is pipe.unet
    released = tmp_path / "released"
    pipe.save_pretrained(released)
    config = json.loads((released / "unet/config.json").read_text())
    for name in ("attention", "group_norm", "temporal"):
        del config[name]
    (released / "unet/config.json").write_text(json.dumps({**config, "_class_name": "UNet3DConditionModel"}))
    with pytest.raises(NotAPipeline, match="from_official"):
        TuneAVideoPipeline.from_pretrained(released)


# ------------------------------------------------------------------ layouts


def test_frames_have_the_layout_of_diffusers_video_pipelines(pipe, tmp_path):
    options = {"latents": noise(2), **QUICK}
    made = {kind: pipe(["a", "b"], output_type=kind, **options) for kind in ("pt", "np", "pil", "latent")}
    tensor = made["pt"].frames
    assert tensor.shape == (2, 4, 3, 16, 16) and made["pt"].videos.shape == (2, 3, 4, 16, 16)
    assert made["np"].frames.shape == (2, 4, 16, 16, 3) and made["np"].videos.shape == (2, 3, 4, 16, 16)
    assert len(made["pil"].frames) == 2 and len(made["pil"].frames[0]) == 4
    assert made["latent"].frames.shape == made["latent"].videos.shape == (2, 4, 4, 8, 8)
    np.testing.assert_array_equal(made["np"].frames, tensor.permute(0, 1, 3, 4, 2).numpy())
    np.testing.assert_array_equal(made["np"].videos, made["pt"].videos.numpy())
    pixels = to_pixels(made["pt"].videos[1])
    np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in made["pil"].frames[1]]), pixels)
    for kind, out in made.items():
        plain = pipe(["a", "b"], output_type=kind, return_dict=False, **options)
        assert isinstance(plain, tuple) and len(plain) == 1
        assert type(plain[0]) is type(out.frames) is type(out[0])
    for name, frames in (("np", made["np"].frames[1]), ("pil", made["pil"].frames[1])):
        file = export_to_video(list(frames), str(tmp_path / f"{name}.mp4"), fps=8)
        assert len(OneShotVideoDataset(file, "a", n_frames=None, size=None)[0]["video"]) == 4
    back = Image.open(export_to_gif(made["pil"].frames[1], str(tmp_path / "a.gif"), fps=8))
    assert back.n_frames == 4


def test_our_writer_takes_them_all(pipe, tmp_path):
    options = {"latents": noise(), **QUICK}
    video = pipe("a", **options).videos[0]
    want = to_pixels(video)
    frames = {kind: pipe("a", output_type=kind, **options).frames for kind in ("pt", "np", "pil")}
    given = {"pt": frames["pt"][0], "np": frames["np"][0], "pil": frames["pil"][0], "uint8": want, "ours": video}
    for name, value in given.items():
        folder = save_video(value, tmp_path / name)
        read = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])
        np.testing.assert_array_equal(read, want, err_msg=name)
    for wrong in (np.zeros((4, 16, 16)), torch.zeros(4, 4, 16, 16), [], np.full((4, 8, 8, 3), 7.0)):
        with pytest.raises(ValueError, match="video"):
            save_video(wrong, tmp_path / "wrong.gif")


@pytest.mark.parametrize("fps", [8, 10, 12.5, 24, 30])
def test_a_gif_keeps_its_frames_and_its_rate(tmp_path, fps):
    colours = [0, 0, 0, 90, 90, 200, 200, 200, 200, 0, 17]  # neighbours that are equal
    frames = np.stack([np.full((16, 16, 3), value, np.uint8) for value in colours])
    file = write_media(frames, tmp_path / "clip", fps=fps)
    with Image.open(file) as image:
        durations = []
        for i in range(image.n_frames):
            image.seek(i)
            durations.append(image.info["duration"])
    assert len(durations) == len(colours) and min(durations) >= 20
    assert sum(durations) == pytest.approx(1000 * len(colours) / fps, abs=10)
    read = OneShotVideoDataset(file, "a", n_frames=None, size=None)
    assert read.fps == pytest.approx(fps, rel=0.06)
    torch.testing.assert_close(
        (read[0]["video"][:, 0, 0, 0] + 1) * 127.5, torch.tensor(colours).float(), atol=0.5, rtol=0
    )


def test_a_gif_of_another_writer_is_read_frame_by_frame(tmp_path):
    """Frames that are deltas, transparent or shown for different times."""
    images = [Image.new("RGBA", (16, 16), (i * 40, 0, 0, 255)) for i in range(4)]
    for i, image in enumerate(images):
        image.putpixel((i, i), (255, 255, 255, 255))
    images[0].save(
        tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[100, 200, 100, 100], disposal=2
    )
    read = OneShotVideoDataset(tmp_path / "a.gif", "a", n_frames=None, size=None)
    video = (read[0]["video"] + 1) * 127.5
    assert video.shape == (4, 3, 16, 16) and read.fps == pytest.approx(8.0)
    for i, frame in enumerate(video):
        assert frame[:, i, i].min() > 250 and frame[0, 15, 0] == pytest.approx(i * 40, abs=1)


# ------------------------------------------------------------------ arguments


def states(pipe, length, count=1):
    return torch.zeros(count, length, pipe.unet.config.cross_attention_dim)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": -3}, "num_inference_steps=-3"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({"num_inference_steps": 1000}, "at most 999"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0"),
        ({"prompt": None, "prompt_embeds": 9}, "9 text states, the negative prompt 16"),
        ({"prompt": None, "prompt_embeds": 9, "negative_prompt_embeds": 16}, "9 text states, the negative prompt 16"),
        ({"prompt": "a", "negative_prompt_embeds": 5}, "16 text states, the negative prompt 5"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 15)}, r"\(1, 16, 15\).*\(b, L, 16\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(16, 16)}, r"\(b, L, 16\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 16, 16)}, r"\(b, L, 16\)"),
        ({"prompt": "a", "prompt_embeds": 16}, "not both"),
        ({"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": 16}, "not both"),
        ({"prompt": "a", "negative_prompt": []}, "negative_prompt is an empty list"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "2 negative prompts for 3 videos"),
        ({"prompt": "a", "negative_prompt": 3}, "negative_prompt is a text"),
        ({"latents": torch.zeros(1, 3, 4, 8, 8)}, r"latents are .*\(b, 4, f, h, w\)"),
        ({"latents": torch.zeros(4, 4, 8, 8)}, r"latents are .*\(b, 4, f, h, w\)"),
        ({"latents": None, "video_length": 0}, "video_length=0"),
        ({"latents": None, "video_length": -1}, "video_length=-1"),
        ({"latents": None, "video_length": 2, "height": 0}, "0 x 0"),
        ({"latents": None, "video_length": 2, "width": 15}, "15 x 15"),
        ({"height": 15}, "15 x 15"),
    ],
)
def test_arguments_that_mean_nothing(pipe, options, message):
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if isinstance(options.get(name), int):
            options = {**options, name: states(pipe, options[name])}
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a", "latents": noise(), "num_inference_steps": 1, **options})


def test_text_of_any_length_that_is_one(pipe):
    out = pipe(prompt_embeds=states(pipe, 9), negative_prompt_embeds=states(pipe, 9), latents=noise(), **QUICK)
    assert out.frames.shape == (1, 4, 3, 16, 16)


def test_odd_sizes_of_latents_pass(pipe):
    latents = torch.randn(1, 4, 2, 7, 5)
    assert pipe("a", latents=latents, **QUICK).frames.shape == (1, 2, 3, 14, 10)


def test_all_steps_are_inverted_or_it_is_said_how_many_can_be(pipe):
    predict = lambda x, t: 0.1 * x  # noqa: E731
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    plain, offset = DDIMScheduler(**betas), DDIMScheduler(**betas, steps_offset=1)
    assert ddim_invert(predict, plain, torch.ones(2), 1000).isfinite().all()
    assert ddim_invert(predict, offset, torch.ones(2), 999).isfinite().all()
    with pytest.raises(ValueError, match="at most 999"):
        ddim_invert(predict, offset, torch.ones(2), 1000)
    for steps, message in ((1000, "at most 999"), (0, "steps=0"), (1001, "1001")):
        with pytest.raises(ValueError, match=message):
            pipe.invert(noise(), steps=steps)
    with pytest.raises(ValueError, match=r"\(b, 4, f, h, w\)"):
        pipe.invert(noise()[0], steps=2)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
)
def test_samplers_of_flow_matching_are_refused_by_name(pipe, sd_folder, tmp_path, scheduler):
    name = type(scheduler).__name__
    own, image = pipe.scheduler, make_pipeline()
    try:
        pipe.scheduler = scheduler
        for call in (lambda: pipe("a", latents=noise()), lambda: pipe.invert(noise(), steps=2)):
            with pytest.raises(SchedulerMismatch, match=name):
                call()
    finally:
        pipe.scheduler = own
    image.scheduler = scheduler
    with pytest.raises(SchedulerMismatch, match=name):
        TuneAVideoPipeline.from_base(image)
    shutil.copytree(sd_folder, tmp_path / "base")
    scheduler.save_pretrained(tmp_path / "base/scheduler")
    with pytest.raises(SchedulerMismatch, match=name):
        TuneAVideoPipeline.from_base(tmp_path / "base")
    with pytest.raises(SchedulerMismatch, match=name):
        TuneAVideoPipeline(**{**pipe.components, "scheduler": scheduler})
    if name.startswith("Flow"):
        with pytest.raises(ValueError, match=name):
            Sampling(scheduler=name)


# ------------------------------------------------------------------ adapters of the text encoder


@pytest.fixture
def adapted(sd_folder, monkeypatch):
    """A pipeline whose text encoder has one adapter, by a stand-in of PEFT's layers, and the same one without."""
    peft = ModuleType("peft.tuners.tuners_utils")

    class BaseTunerLayer(torch.nn.Module):
        active_adapters = ("style",)

        def __init__(self, layer):
            super().__init__()
            self.base_layer, self.scale = layer, 1.0

        def scale_layer(self, scale):
            self.scale *= scale

        def unscale_layer(self, scale):
            self.scale /= scale

        def set_scale(self, adapter, scale):
            self.scale = scale

        def forward(self, x):
            return self.base_layer(x) + self.scale * x.roll(1, -1)

    peft.BaseTunerLayer = BaseTunerLayer
    names = ("peft", "peft.tuners")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["peft"].PeftModel = type("PeftModel", (), {})  # diffusers asks for it where PEFT is installed
    monkeypatch.setitem(sys.modules, peft.__name__, peft)
    monkeypatch.setattr("tune_a_video.inference.text.USE_PEFT_BACKEND", True)
    torch.manual_seed(5)
    plain, made = (quiet(TuneAVideoPipeline.from_base(sd_folder)) for _ in range(2))
    made.unet.load_state_dict(plain.unet.state_dict())
    attention = next(m for n, m in made.text_encoder.named_modules() if n.endswith("self_attn"))
    attention.v_proj = BaseTunerLayer(attention.v_proj)
    return made, plain, attention.v_proj


def test_the_scale_of_adapters_holds_for_the_text_encoder(adapted):
    made, plain, layer = adapted
    options = {"latents": noise(), "num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"}
    options["negative_prompt"] = "a dog"
    off = made("a cat", cross_attention_kwargs={"scale": 0}, **options).videos
    torch.testing.assert_close(off, plain("a cat", **options).videos)
    assert layer.scale == 1.0  # afterwards as before
    whole = made("a cat", **options).videos
    half = made("a cat", cross_attention_kwargs={"scale": 0.5}, **options).videos
    assert (whole - off).abs().max() > 1e-3 and not torch.allclose(half, whole) and not torch.allclose(half, off)
    torch.testing.assert_close(made("a cat", cross_attention_kwargs={"scale": 1.0}, **options).videos, whole)
    assert layer.scale == 1.0
    assert torch.equal(made.encode_prompt("a", lora_scale=0.0), plain.encode_prompt("a"))
