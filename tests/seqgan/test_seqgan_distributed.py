"""Two processes: codebooks that move stay the same on both, figures are those of all samples, failures are shared."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from core.errors import VitrineError
from core.metrics import TorchMetrics
from seqgan.codes import CodeCache
from seqgan.metrics import CodeBits, CodebookUse, ImageScores, LinearProbe
from seqgan.models import EMAQuantizer, RestartQuantizer, conv_tokenizer

COUNT = 12


class Means(torch.nn.Module):
    """In place of Inception: means of quarters of a picture, and some logits."""

    width = 12

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return features, features[:, :5] * 9


def features() -> torch.Tensor:
    return torch.randn(1, 2, 8, COUNT, generator=torch.Generator().manual_seed(0))


def samples(start: int = 0, stop: int = COUNT) -> dict:
    generator = torch.Generator().manual_seed(1)
    whole = {
        "sample": torch.randint(0, 256, (COUNT, 3, 8, 8), generator=generator, dtype=torch.uint8),
        "image": torch.rand(COUNT, 3, 8, 8, generator=generator) * 2 - 1,
        "indices": torch.randint(0, 8, (COUNT, 2, 2), generator=generator),
        "nll": torch.rand(COUNT, 4, generator=generator),
        "right": torch.rand(COUNT, 4, generator=generator) > 0.5,
        "mask": torch.rand(COUNT, 4, generator=generator) > 0.3,
        "label": torch.arange(COUNT) % 2,
        "sample_id": [str(i) for i in range(COUNT)],
    }
    return {name: value[start:stop] for name, value in whole.items()}


def judge() -> TorchMetrics:
    metrics = {
        "images": ImageScores(Means(), splits=1, neighbours=2),
        "use": CodebookUse(8),
        "bits": CodeBits(64),
        "probe": LinearProbe(8),
    }
    inputs = {
        "images": ["sample", "image"],
        "use": ["indices"],
        "bits": ["nll", "right", "mask"],
        "probe": ["indices", "label", "sample_id"],
    }
    return TorchMetrics(metrics, inputs=inputs)


def _share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    averages, restarts = EMAQuantizer(4, 2, decay=0.9), RestartQuantizer(4, 2, patience=1)
    for quantizer in (averages, restarts):
        quantizer.load_state_dict(torch.load(f"{folder}/{type(quantizer).__name__}.pt"))
        torch.manual_seed(rank)  # draws differ between processes, codebooks must not
        half = features()[..., rank * 6 : rank * 6 + 6]
        for _ in range(2):
            quantizer.train()(half.clone().requires_grad_())
    shared = judge()
    if rank == 0:  # nothing is left for the other one
        shared.process({}, samples(0, 5))
        shared.process({}, samples(5, COUNT))
    figures = shared.evaluate(COUNT)
    torch.save([averages.embedding.weight, restarts.embedding.weight, restarts.idle, figures], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_codebooks_and_figures_of_two_processes(tmp_path) -> None:
    joint, restarts = EMAQuantizer(4, 2, decay=0.9), RestartQuantizer(4, 2, patience=1)
    for quantizer in (joint, restarts):
        torch.save(quantizer.state_dict(), tmp_path / f"{type(quantizer).__name__}.pt")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_share, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    for _ in range(2):
        joint.train()(features().requires_grad_())
    assert torch.allclose(first[0], joint.embedding.weight, atol=1e-6)
    alone = judge()
    alone.process({}, samples())
    expected = alone.evaluate(COUNT)
    assert len(expected) >= 11
    for figures in (first[3], second[3]):
        assert figures == pytest.approx(expected, rel=1e-5)


class Torn(torch.utils.data.Dataset):
    """Random pictures of which the second process can read the first alone."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        if index and dist.get_rank() == 1:
            raise OSError(f"picture {index} is torn")
        return {"image": torch.rand(3, 32, 32)}


def _encode(rank: int, folder: str) -> None:
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=wait)
    torch.manual_seed(0)
    try:
        CodeCache(f"{folder}/codes").fill(Torn(), conv_tokenizer(32, (1, 1), 1, codebook_size=8, z_dim=4))
    except (OSError, VitrineError) as error:
        Path(folder, str(rank)).write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


def test_a_process_that_cannot_encode_its_images_leaves_none_waiting(tmp_path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_encode, (str(tmp_path),), nprocs=2)
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert said[1].startswith("OSError: picture ") and said[1].endswith(" is torn")
    assert said[0] == f"VitrineError: keeping codes ended because process 1 failed: {said[1]}"
