"""A random Stable Diffusion on disk, once for all tests."""

import pytest
from random_sd import make_pipeline


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """Folder of a random Stable Diffusion: 16 x 16 pixels, 8 x 8 latents."""
    folder = tmp_path_factory.mktemp("sd")
    make_pipeline().save_pretrained(folder)
    return folder
