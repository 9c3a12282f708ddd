"""Two processes train as one with the joint batch; codebooks agree, figures are of all samples, failures are shared."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.errors import VitrineError
from core.metrics import TorchMetrics
from core.optim.groups import OptimConstructor
from core.trainer import DataParallelTrainer
from seqgan.data.codes import CodeCache
from seqgan.losses.perceptual import SemanticPerceptualLoss, TappedNetwork
from seqgan.metrics.evaluators import CodeBits, CodebookUse, ImageScores, LinearProbe
from seqgan.models import (
    ARTransformer,
    EMAQuantizer,
    MaskedTransformer,
    MaskGITEntropy,
    RestartQuantizer,
    StyleDiscriminator,
    UsageEntropy,
    conv_tokenizer,
)
from seqgan.trainer import TokenizerTrainer, TransformerTrainer
from tests import forked

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


@pytest.mark.processes
def test_codebooks_and_figures_of_two_processes(tmp_path) -> None:
    joint, restarts = EMAQuantizer(4, 2, decay=0.9), RestartQuantizer(4, 2, patience=1)
    for quantizer in (joint, restarts):
        torch.save(quantizer.state_dict(), tmp_path / f"{type(quantizer).__name__}.pt")
    forked.pair(_share, str(tmp_path))
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
    wait = timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=wait)
    torch.manual_seed(0)
    try:
        CodeCache(f"{folder}/codes").fill(Torn(), conv_tokenizer(32, (1, 1), 1, codebook_size=8, z_dim=4))
    except (OSError, VitrineError) as error:
        Path(folder, str(rank)).write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


@pytest.mark.processes
def test_a_process_that_cannot_encode_its_images_leaves_none_waiting(tmp_path) -> None:
    forked.pair(_encode, str(tmp_path))
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert said[1].startswith("OSError: picture ") and said[1].endswith(" is torn")
    assert said[0] == f"VitrineError: keeping codes ended because process 1 failed: {said[1]}"


# ------------------------------------------------------------------ training
def tokenizer_trainer(kind: str) -> TokenizerTrainer:
    """Small, with all terms; `adaptive` has the weight of gradients, a ramp, and MaskGIT's entropy."""
    torch.manual_seed(0)
    entropy = MaskGITEntropy(0.1, temperature=1.0) if kind == "adaptive" else UsageEntropy(0.1)
    network = conv_tokenizer(32, (1, 1), 1, codebook_size=16, z_dim=8, entropy=entropy)
    torch.nn.init.normal_(network.quantizer.embedding.weight)
    classifier = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(784, 5)
    )
    semantic = SemanticPerceptualLoss(TappedNetwork(classifier, {"low": "1", "out": ""}), 0.5, ("low",), ("out",))
    critic = StyleDiscriminator(16, channels={4: 8, 8: 8, 16: 4})
    options = {"adversarial": "hinge", "adaptive": True, "adversarial_ramp": 1} if kind == "adaptive" else {}
    return TokenizerTrainer(network, semantic, discriminator=critic, penalty_every=2, **options)


def transformer_trainer(kind: str) -> TransformerTrainer:
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "dropout": 0.0}
    network = (
        ARTransformer(8, 2, 16, **sizes, null_class=True) if kind == "ar" else MaskedTransformer(8, 2, 16, **sizes)
    )
    torch.nn.init.normal_(network.tokens.weight)
    return TransformerTrainer(network, label_drop=0.5)


BUILD = {
    "logistic": tokenizer_trainer,
    "adaptive": tokenizer_trainer,
    "ar": transformer_trainer,
    "nar": transformer_trainer,
}


def joint_batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "image": torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1,
        "codes": torch.randint(8, (8, 4, 4), generator=generator),
        "label": torch.arange(8) % 2,
    }


def after_two_steps(kind: str, rank: int = 0, processes: int = 1) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses; gradient descent, so that weights differ as much as gradients do."""
    trainer = BUILD[kind](kind)
    trainer.freeze()
    sgd = {"optimizer": {"type": "torch.optim.SGD", "lr": 0.05}}
    several = kind in ("logistic", "adaptive")
    optim = OptimConstructor({"network": sgd, "discriminator": sgd} if several else sgd)(trainer)
    model = trainer.train()
    if processes > 1:
        model = DataParallelTrainer(trainer, broadcast_buffers=False, find_unused_parameters=several)
    torch.manual_seed(7)
    logs = []
    for step in range(2):
        own = {name: value[rank::processes] for name, value in joint_batch(step).items()}
        logs.append(float(model.train_step(own, optim)["loss"]))
    return {name: value.clone() for name, value in trainer.state_dict().items()}, logs


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({kind: after_two_steps(kind, rank, 2) for kind in BUILD}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("shares")
    forked.pair(_train, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.processes
@pytest.mark.parametrize("kind", BUILD)
def test_two_processes_train_as_one_with_the_joint_batch(kind: str, shares: list[dict]) -> None:
    (first, one), (second, two) = (share[kind] for share in shares)
    start = BUILD[kind](kind).state_dict()
    expected, losses = after_two_steps(kind)
    moved = [name for name, value in expected.items() if not torch.equal(value, start[name])]
    parts = ("network.encoder", "network.quantizer", "network.decoder", "discriminator")
    for part in parts if kind in ("logistic", "adaptive") else ("network.tokens", "network.blocks"):
        assert any(name.startswith(part) for name in moved), part
    for name in moved:
        assert torch.equal(first[name], second[name]), name
        change = (expected[name] - start[name]).abs().max().item()
        torch.testing.assert_close(first[name], expected[name], atol=1e-3 * change + 1e-7, rtol=0)
    assert [(a + b) / 2 for a, b in zip(one, two, strict=True)] == pytest.approx(losses, rel=1e-4)
