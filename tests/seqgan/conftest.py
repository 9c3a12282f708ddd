"""Files of published networks in their own layouts, with random weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as library
from torchvision.models import vgg16


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's Inception."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = library.FeatureExtractorInceptionV3("random", ["64"])
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):
            value *= math.sqrt(6)  # so that activations neither vanish nor grow
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def vgg16_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's VGG16; its 124 million weights of linear layers are one byte each, all the same."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16().state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if name.startswith("classifier") and name.endswith("weight"):
            state[name] = torch.zeros(1, dtype=torch.uint8).expand(shape)
        else:
            state[name] = torch.zeros(shape)
            if len(shape) > 1:
                nn.init.kaiming_normal_(state[name])
    path = tmp_path_factory.mktemp("weights") / "vgg16-397923af.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def lpips_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LPIPS' weights of VGG16's channels."""
    widths = (64, 128, 256, 512, 512)
    state = {f"lin{i}.model.1.weight": torch.full((1, width, 1, 1), 0.1) for i, width in enumerate(widths)}
    path = tmp_path_factory.mktemp("weights") / "lpips_vgg.pth"
    torch.save(state, path)
    return path
