"""A random Stable Diffusion on disk, once for all tests, and a pipeline of clips over it."""

import pytest
from random_sd import make_pipeline, make_video_pipeline


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """Folder of a random Stable Diffusion: 16 x 16 pixels, 8 x 8 latents."""
    folder = tmp_path_factory.mktemp("sd")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(sd_folder):
    """A pipeline of clips over it, shared by a file's tests, which leave it as it is."""
    return make_video_pipeline(sd_folder)
