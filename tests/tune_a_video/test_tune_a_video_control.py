"""ControlNets of image models guide the frames of a video."""

import json

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from random_sd import UNET

from tune_a_video.interop.pipeline import TuneAVideoPipeline

LATENT = {"num_inference_steps": 4, "output_type": "latent"}


def network(seed=0, zero=False):
    """A ControlNet for pictures of 16 x 16 beside latents of 8 x 8; freshly made, its outputs are zero."""
    torch.manual_seed(seed)
    names = ("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim", "attention_head_dim")
    made = ControlNetModel(
        **{name: UNET[name] for name in (*names, "norm_num_groups")}, conditioning_embedding_out_channels=(8, 8)
    )
    strides = made.controlnet_cond_embedding.blocks
    assert [block.stride for block in strides] == [(1, 1), (2, 2)]
    if not zero:
        for name, parameter in made.named_parameters():
            if "controlnet_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def noise(videos=1, count=3):
    return torch.randn(videos, 4, count, 8, 8, generator=torch.Generator().manual_seed(1))


def depth(count=3, seed=0, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_a_fresh_network_changes_nothing_and_another_one_does(pipe):
    plain = pipe("a cat", latents=noise(), **LATENT).videos
    options = {"latents": noise(), "control_video": depth(), **LATENT}
    torch.testing.assert_close(pipe("a cat", controlnet=network(zero=True), **options).videos, plain)
    guided = pipe("a cat", controlnet=network(), **options).videos
    assert (guided - plain).abs().max() > 1e-2
    none = pipe("a cat", controlnet=network(), controlnet_conditioning_scale=0.0, **options).videos
    torch.testing.assert_close(none, plain)
    half = pipe("a cat", controlnet=network(), controlnet_conditioning_scale=0.5, **options).videos
    assert (half - plain).abs().max() > 1e-3 and (half - guided).abs().max() > 1e-3
    other = pipe("a cat", controlnet=network(), **{**options, "control_video": depth(seed=1)}).videos
    assert (other - guided).abs().max() > 1e-3


def test_a_step_adds_the_residuals_of_the_image_networks_frames(pipe):
    made, latents, frames = network(), noise(), depth()
    pipe.scheduler.set_timesteps(4)
    t = pipe.scheduler.timesteps[0]
    text = pipe.encode_prompt("a cat")
    rows = latents[0].transpose(0, 1)
    with torch.no_grad():
        parts = [made(row[None], t, text, frame[None]) for row, frame in zip(rows, frames, strict=True)]  # one by one
        down = [torch.cat(level) for level in zip(*(part.down_block_res_samples for part in parts), strict=True)]
        middle = torch.cat([part.mid_block_res_sample for part in parts])
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        prediction = pipe.unet(latents, t, text, **residuals).sample
        want = pipe.scheduler.step(prediction, t, latents).prev_sample
    seen = {}
    pipe(
        "a cat",
        latents=latents,
        guidance_scale=1.0,
        controlnet=made,
        control_video=frames,
        callback_on_step_end=lambda owner, i, t, tensors: seen.update({i: tensors["latents"]}),
        **LATENT,
    )
    torch.testing.assert_close(seen[0], want, atol=1e-4, rtol=1e-4)


def test_spans_leave_the_other_steps_alone(pipe):
    def steps(**options):
        seen = []
        pipe(
            "a cat",
            latents=noise(),
            callback_on_step_end=lambda owner, i, t, tensors: seen.append(tensors["latents"]),
            **options,
            **LATENT,
        )
        return seen

    control = {"controlnet": network(), "control_video": depth()}
    plain, whole = steps(), steps(**control)
    late, early = steps(control_guidance_start=0.5, **control), steps(control_guidance_end=0.5, **control)
    torch.testing.assert_close(late[1], plain[1])
    assert (late[2] - plain[2]).abs().max() > 1e-3
    torch.testing.assert_close(early[1], whole[1])
    assert (early[2] - whole[2]).abs().max() > 1e-3


def test_several_networks_add_up_and_prompts_have_their_own_frames(pipe):
    first, second = network(), network(1)
    both = pipe("a", latents=noise(), controlnet=[first, second], control_video=[depth(), depth(seed=1)], **LATENT)
    one = {"controlnet_conditioning_scale": [1.0, 0.0], "control_video": [depth(), depth(seed=1)]}
    alone = pipe("a", latents=noise(), controlnet=first, control_video=depth(), **LATENT).videos
    torch.testing.assert_close(pipe("a", latents=noise(), controlnet=[first, second], **one, **LATENT).videos, alone)
    assert (both.videos - alone).abs().max() > 1e-3
    clips = torch.stack([depth(seed=1), depth()])
    pair = pipe(["b", "a"], latents=noise(), controlnet=first, control_video=clips, **LATENT).videos
    torch.testing.assert_close(pair[1:], alone, atol=1e-3, rtol=1e-3)
    shared = pipe("b", latents=noise(), controlnet=first, control_video=depth(), **LATENT).videos
    assert (shared - pair[:1]).abs().max() > 1e-3


def test_frames_as_users_have_them(pipe):
    pixels = (255 * depth()).round().byte()
    arrays = pixels.movedim(1, -1).numpy()
    pictures = [Image.fromarray(frame) for frame in arrays]
    options = {"latents": noise(), "controlnet": network(), **LATENT}
    want = pipe("a", control_video=pixels.float() / 255, **options).videos
    for given in (pixels, arrays, arrays.astype(np.float32) / 255, pictures):
        torch.testing.assert_close(pipe("a", control_video=given, **options).videos, want)


def test_windows_see_the_frames_they_are_at(pipe, monkeypatch):
    made, seen = network(), []
    forward = type(made).forward

    def watched(self, rows, *args, controlnet_cond, **options):
        seen.append([round(float(value)) for value in 10 * controlnet_cond.mean((1, 2, 3))])
        return forward(self, rows, *args, controlnet_cond=controlnet_cond, **options)

    monkeypatch.setattr(type(made), "forward", watched)
    grey = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 16, 16) / 10
    options = {"latents": noise(count=6), "controlnet": made, "control_video": grey, "output_type": "latent"}
    pipe("a", window=3, overlap=1, num_inference_steps=1, guidance_scale=1.0, **options)
    assert seen == [[0, 1, 2], [0, 2, 3, 4], [0, 3, 4, 5]]
    seen.clear()
    pipe("a", num_inference_steps=1, guidance_scale=4.0, **options)
    assert seen == [[*range(6), *range(6)]]


def test_a_pipelines_own_networks_are_kept_in_its_folder(pipe, tmp_path):
    options = {"latents": noise(), "control_video": depth(), **LATENT}
    own = TuneAVideoPipeline(**{**pipe.components, "controlnet": network()})
    own.set_progress_bar_config(disable=True)
    want = own("a", **options).videos
    assert (want - pipe("a", latents=noise(), **LATENT).videos).abs().max() > 1e-3
    own.save_pretrained(tmp_path / "own")
    back = TuneAVideoPipeline.from_pretrained(tmp_path / "own")
    torch.testing.assert_close(back("a", **options).videos, want)
    pipe.save_pretrained(tmp_path / "without")
    given = TuneAVideoPipeline.from_pretrained(tmp_path / "without", controlnet=own.controlnet)
    torch.testing.assert_close(given("a", **options).videos, want)
    assert TuneAVideoPipeline.from_pretrained(tmp_path / "without").controlnet is None
    index = json.loads((tmp_path / "without" / "model_index.json").read_text())
    del index["controlnet"]  # a folder from before there was such a part
    (tmp_path / "without" / "model_index.json").write_text(json.dumps(index))
    assert TuneAVideoPipeline.from_pretrained(tmp_path / "without").controlnet is None


def test_several_networks_of_a_pipeline_are_kept_too(pipe, tmp_path):
    own = TuneAVideoPipeline(**{**pipe.components, "controlnet": [network(), network(1)]})
    options = {"latents": noise(), "control_video": [depth(), depth(seed=1)], **LATENT}
    own.save_pretrained(tmp_path)
    torch.testing.assert_close(
        TuneAVideoPipeline.from_pretrained(tmp_path)("a", **options).videos, own("a", **options).videos
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controlnet": network()}, "control_video="),
        ({"control_video": depth()}, "controlnet="),
        ({"controlnet": network(), "control_video": depth(4)}, "4 frames, the video 3"),
        ({"controlnet": network(), "control_video": depth(size=8)}, "8 x 8 pixels, the video 16 x 16"),
        ({"controlnet": network(), "control_video": depth()[None].repeat(2, 1, 1, 1, 1)}, "2 control videos for 1"),
        ({"controlnet": network(), "control_video": 2 * depth() - 1}, "0 to 1"),
        ({"controlnet": network(), "control_video": "depth.mp4"}, "list of pictures"),
        ({"controlnet": [network(), network()], "control_video": depth()}, "one for each"),
        ({"controlnet": network(), "control_video": depth(), "control_guidance_end": 0.0}, "start < end"),
        (
            {"controlnet": network(), "control_video": depth(), "controlnet_conditioning_scale": [1.0, 1.0]},
            "2 numbers for 1",
        ),
        ({"controlnet": torch.nn.Linear(2, 2), "control_video": depth()}, "ControlNetModel"),
    ],
)
def test_what_does_not_fit_is_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe("a", latents=noise(), **options, **LATENT)
