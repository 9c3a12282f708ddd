"""Training with a teacher, and reducers on the small model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import stvit
from core.checkpoint import StateMismatch
from core.trainer import unwrap
from stvit.checkpoint import CheckpointMismatch, from_deit
from stvit.models import SemanticTokenViT
from stvit.models.reducers import count_macs
from stvit.models.small import SmallSemanticTokenViT
from stvit.trainer.distillation import DistillationTrainer, load_teacher, logit_divergence
from tests.gradients import unreached

TINY = dict(img_size=32, patch_size=4, num_classes=5, embed_dim=32, depth=4, num_heads=2, base_depth=1)


def vit(tokens: str = "all", **options: object) -> SemanticTokenViT:
    return SemanticTokenViT(**TINY, tokens=tokens, class_token=True, **options)


def batch(size: int = 3) -> dict[str, object]:
    return {
        "image": torch.randn(size, 3, 32, 32),
        "label": torch.randint(5, (size,)),
        "sample_id": [str(i) for i in range(size)],
    }


def test_divergence_by_hand() -> None:
    logits, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    p, q = teacher.softmax(1), logits.softmax(1)
    loss = logit_divergence(logits, teacher)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum() / 3)
    loss.backward()
    assert teacher.grad is None and logits.grad.abs().sum() > 0
    assert logit_divergence(teacher, teacher).abs() < 1e-6
    assert logit_divergence(100 * torch.randn(3, 5).bfloat16(), torch.zeros(3, 5)).isfinite()


def test_terms_of_dynamicvit_with_a_teacher() -> None:
    torch.manual_seed(1)
    network, teacher = vit("dynamicvit"), vit()
    trainer = DistillationTrainer(network, teacher, logit_weight=0.5, token_weight=0.25)
    trainer.freeze()
    trainer.train()
    assert not teacher.training and network.training
    data = batch()
    torch.manual_seed(2)
    terms = trainer.losses(data)
    assert set(terms) == {"loss_cls", "loss_distill", "loss_keep_ratio", "loss_tokens", "accuracy"}
    torch.manual_seed(2)
    logits = network(data["image"])
    tokens = teacher.forward_features(data["image"])
    own = network.auxiliary_losses(tokens, 0.25)
    torch.testing.assert_close(terms["loss_distill"], 0.5 * logit_divergence(logits, teacher.forward_head(tokens)))
    torch.testing.assert_close(terms["loss_tokens"], own["loss_tokens"])
    assert terms["loss_tokens"] > 0
    trainer.parse_losses(terms)[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert unreached(network) == []


@pytest.mark.parametrize("tokens", ["tome", "evit", "random"])
def test_every_reducer_can_follow_a_teacher(tokens: str) -> None:
    trainer = DistillationTrainer(vit(tokens, **({"token_options": {"r": 4}} if tokens == "tome" else {})), vit())
    assert set(trainer.train().losses(batch())) == {"loss_cls", "loss_distill", "accuracy"}
    without = DistillationTrainer(vit("dynamicvit"), vit(), token_weight=0.0).train().losses(batch())
    assert set(without) == {"loss_cls", "loss_distill", "loss_keep_ratio", "accuracy"}


def test_a_teacher_starts_from_a_run_or_a_bare_file(tmp_path: Path) -> None:
    source = vit()
    run = {f"network.{name}": value for name, value in source.state_dict().items()}
    torch.save({"model": run}, tmp_path / "run.pth")
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    for name in ("run.pth", "bare.pth"):
        trainer = DistillationTrainer(vit("dynamicvit"), vit(), teacher_weights=str(tmp_path / name))
        for key, value in trainer.teacher.state_dict().items():
            assert torch.equal(value, source.state_dict()[key])
    with torch.device("meta"):  # tables and profiles build without memory and without reading
        DistillationTrainer(vit("dynamicvit"), vit(), teacher_weights="nowhere.pth")
    other = SemanticTokenViT(**(TINY | dict(num_classes=3)), tokens="all", class_token=True)
    with pytest.raises(StateMismatch, match=r"head\.weight"):
        load_teacher(other, str(tmp_path / "bare.pth"))


def test_the_network_is_what_inference_costs() -> None:
    trainer = DistillationTrainer(vit("tome"), vit())
    assert unwrap(trainer).inference_network() is trainer.network
    assert trainer.example_inputs(2, "cpu")[0].shape == (2, 3, 32, 32)


def test_a_deit_checkpoint_starts_a_dynamicvit() -> None:
    full, pruned = vit(), vit("dynamicvit")
    before = copy.deepcopy(pruned.state_dict())
    pruned.load_state_dict(from_deit(full.state_dict(), pruned))
    for name, value in pruned.state_dict().items():
        expected: Tensor = before[name] if name.startswith("reduction.") else full.state_dict()[name]
        assert torch.equal(value, expected)
    with pytest.raises(CheckpointMismatch, match=r"reduction\.predictors"):
        from_deit(pruned.state_dict(), full)


@pytest.mark.long
def test_reducers_on_the_small_model() -> None:
    target = 0.6 * count_macs(SmallSemanticTokenViT(tokens="all"), (28, 28), 1)
    for tokens, options in (("tome", {}), ("topk", {}), ("dynamicvit", {}), ("evit", {"score": "norm"})):
        model = SmallSemanticTokenViT(tokens=tokens, token_options=options, macs=target)
        assert count_macs(model, (28, 28), 1) == pytest.approx(target, rel=0.01)
        assert model.eval()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_names_at_the_package_root() -> None:
    from stvit.interop.token_reduction import sparsify

    assert stvit.sparsify is sparsify and stvit.DistillationTrainer is DistillationTrainer
