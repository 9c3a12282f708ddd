"""Kinds of quantisers: each raises the use of a badly begun codebook, or does what its equations say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqgan.models import (
    EMAQuantizer,
    FactorizedQuantizer,
    RestartQuantizer,
    UsageEntropy,
    conv_tokenizer,
    quantizer_of_kind,
)
from seqgan.models.codebooks import KINDS, kmeans
from seqgan.models.quantizer import VectorQuantizer, rotated
from seqgan.trainer import DEAD_AFTER, TokenizerTrainer


def clouds(count: int = 96, seed: int = 0) -> torch.Tensor:
    """Features `(1, 2, 8, count/8)` around eight points of a circle of radius 3."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.arange(count) % 8 * torch.pi / 4
    points = 3 * torch.stack([angle.cos(), angle.sin()])
    return (points + 0.1 * torch.randn(2, count, generator=generator)).view(1, 2, 8, -1)


def train(quantizer: torch.nn.Module, steps: int = 60) -> torch.Tensor:
    """Codes in use after steps on fixed features, from a codebook that begins far away on one side."""
    torch.manual_seed(0)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([9.0, 9.0]) + torch.randn(8, 2))
        if hasattr(quantizer, "cluster_sum"):
            quantizer.cluster_sum.copy_(quantizer.embedding.weight)
    trained = [p for p in quantizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.05) if trained else None
    for step in range(steps):
        found = quantizer.train()(clouds(seed=step).requires_grad_())
        if optimizer is not None:
            optimizer.zero_grad()
            sum(found.losses.values()).backward()
            optimizer.step()
    return quantizer.eval()(clouds()).indices.unique()


def test_restarts_bring_every_code_into_use() -> None:
    plain = train(VectorQuantizer(8, 2))
    assert len(plain) <= 3
    assert len(train(RestartQuantizer(8, 2, patience=5))) >= 7
    # Without k-means, restarts alone do it as well.
    late = RestartQuantizer(8, 2, patience=5)
    late.started.fill_(True)
    assert len(train(late)) >= 6
    with pytest.raises(ValueError, match="patience=0"):
        RestartQuantizer(8, 2, patience=0)


def test_codes_are_replaced_after_patience_and_not_before() -> None:
    quantizer = RestartQuantizer(3, 2, patience=2, iterations=0).train()
    quantizer.started.fill_(True)
    far = torch.tensor([[3.0, 0.0], [50.0, 50.0], [-50.0, 50.0]])
    quantizer.embedding.weight.data.copy_(far)
    z = torch.tensor([3.0, 0.1]).view(1, 2, 1, 1)
    for _ in range(2):
        quantizer(z)
        assert torch.equal(quantizer.embedding.weight, far) and quantizer.idle[0] == 0
    assert quantizer.idle.tolist() == [0, 2, 2]
    quantizer(z)
    assert torch.equal(quantizer.embedding.weight[1:], z.view(1, 2).expand(2, 2))
    assert torch.equal(quantizer.embedding.weight[0], far[0])
    assert quantizer.idle.max() == 1, "a code that began anew has its patience again"
    quantizer.idle.fill_(9)
    kept = quantizer.embedding.weight.clone()
    quantizer.eval()(z)
    assert torch.equal(quantizer.embedding.weight, kept) and (quantizer.idle == 9).all()


def test_kmeans_finds_the_clouds() -> None:
    torch.manual_seed(1)
    features = clouds(400)[0].flatten(1).T
    spread = torch.cdist(features, kmeans(features, 24, 10)).amin(dim=1)
    assert spread.mean() < 0.15
    assert kmeans(features[:3], 5, 2).shape == (5, 2)
    one = kmeans(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), 1, 1)
    assert torch.equal(one, torch.tensor([[1.0, 0.0]]))


def test_moving_averages_are_those_of_the_equations() -> None:
    torch.manual_seed(0)
    quantizer = EMAQuantizer(4, 2, decay=0.9).train()
    start = quantizer.embedding.weight.detach().clone()
    z = torch.randn(2, 2, 3, 3, requires_grad=True)
    found = quantizer(z)
    assert found.losses.keys() == {"commit"} and quantizer.embedding.weight.grad_fn is None
    flat, indices = z.detach().movedim(1, -1).reshape(-1, 2), found.indices.flatten()
    for code in range(4):
        chosen = flat[indices == code]
        size = 0.9 + 0.1 * len(chosen)
        expected = (0.9 * start[code] + 0.1 * chosen.sum(dim=0)) / size
        assert torch.allclose(quantizer.embedding.weight[code], expected, atol=1e-6)
    moved = quantizer.embedding.weight.clone()
    quantizer.eval()(z)
    with torch.no_grad():
        quantizer.train()(z)
    assert torch.equal(quantizer.embedding.weight, moved), "evaluation moves no code"
    found.losses["commit"].backward()
    expected = 2 * quantizer.beta * (z.detach() - found.z_q.detach()) / z.numel()
    assert torch.allclose(z.grad, expected, atol=1e-6) and not quantizer.embedding.weight.requires_grad


def test_a_code_that_nobody_chooses_keeps_its_place() -> None:
    quantizer = EMAQuantizer(3, 2, decay=0.5).train()
    quantizer.embedding.weight.data = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    quantizer.cluster_sum.copy_(quantizer.embedding.weight)
    near = torch.full((1, 2, 2, 2), 0.1)
    for _ in range(300):  # its size has long become zero
        quantizer(near)
    assert quantizer.embedding.weight[1:].tolist() == [[50.0, 0.0], [0.0, 50.0]] and quantizer.cluster_size[1] == 0
    assert torch.allclose(quantizer.embedding.weight[0], torch.tensor(0.1))
    quantizer(torch.tensor([49.0, 1.0]).view(1, 2, 1, 1))
    assert torch.allclose(quantizer.embedding.weight[1], torch.tensor([49.0, 1.0])), "and lives when it is chosen again"


def test_moving_averages_follow_the_features() -> None:
    quantizer = EMAQuantizer(8, 2, decay=0.8)
    before = F.mse_loss(quantizer(clouds()).z_q, clouds())
    for step in range(40):
        quantizer.train()(clouds(seed=step).requires_grad_())
    assert F.mse_loss(quantizer.eval()(clouds()).z_q, clouds()) < 0.5 * before


def test_factorised_codes_are_compared_by_their_angle() -> None:
    torch.manual_seed(0)
    quantizer = FactorizedQuantizer(16, 6, code_dim=3)
    z = torch.randn(2, 6, 4, 4)
    found = quantizer(z)
    low = F.normalize(quantizer.project(z.movedim(1, -1)), dim=-1)
    codes = F.normalize(quantizer.embedding.weight, dim=-1)
    assert torch.equal(found.indices, (low @ codes.T).argmax(dim=-1))
    expected = quantizer.expand(codes[found.indices]).movedim(-1, 1)
    assert torch.allclose(found.z_q, expected, atol=1e-6)
    assert torch.equal(quantizer.nearest(z.movedim(1, -1)), found.indices)
    assert torch.allclose(quantizer.lookup(found.indices), found.z_q, atol=1e-6)
    quantizer.embedding.weight.data *= 7
    assert torch.equal(quantizer(z).indices, found.indices), "a code's length does not matter"
    assert found.losses["codebook"].item() == pytest.approx(F.mse_loss(codes[found.indices], low).item(), rel=1e-5)


def test_factorised_codes_are_used_where_plain_ones_collapse() -> None:
    """Narrow features far from the origin: distances favour few of the plain codes."""
    torch.manual_seed(0)
    z = torch.randn(4, 16, 8, 8) * torch.linspace(0.2, 2, 16)[None, :, None, None]
    plain = VectorQuantizer(64, 16)
    plain.embedding.weight.data.normal_()
    factorised = FactorizedQuantizer(64, 16, code_dim=4)
    assert len(factorised(z).indices.unique()) > len(plain(z).indices.unique())


def test_rotation_turns_gradients_and_keeps_values() -> None:
    torch.manual_seed(0)
    z, codes = torch.randn(2, 5, 3, 3, requires_grad=True), torch.randn(2, 5, 3, 3)
    out = rotated(z, codes)
    assert torch.allclose(out, codes, atol=1e-5)
    # A gradient along the code comes back along the feature, scaled as the lengths are.
    out.backward(codes)
    scale = codes.norm(dim=1, keepdim=True) ** 2 / z.detach().norm(dim=1, keepdim=True) ** 2
    assert torch.allclose(z.grad, scale * z.detach(), atol=1e-4)
    plain, turned = VectorQuantizer(4, 5), VectorQuantizer(4, 5, gradient="rotation")
    turned.load_state_dict(plain.state_dict())
    assert torch.equal(turned(z.detach()).z_q, plain(z.detach()).z_q)
    with pytest.raises(ValueError, match="unknown gradient"):
        VectorQuantizer(4, 5, gradient="none")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_a_tokenizer(kind: str) -> None:
    torch.manual_seed(0)
    entropy = UsageEntropy()
    model = conv_tokenizer(32, (1, 1), 1, codebook_size=16, z_dim=8, entropy=entropy, quantizer=kind)
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    out = model.train()(image)
    assert {"commit", "entropy"} <= out.losses.keys() and all(v.isfinite() for v in out.losses.values())
    (sum(out.losses.values()) + out.reconstruction.abs().mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() for g in gradients.values()) and gradients["encoder.conv_out.weight"].abs().max() > 0
    model.eval()
    made = model(image)
    assert torch.allclose(model.decode(model.encode(image)), made.reconstruction, atol=1e-5)
    before = model.fingerprint()
    model.decoder.conv_out.bias.data += 1
    assert model.fingerprint() == before
    model.quantizer.embedding.weight.data[0, 0] += 1
    assert model.fingerprint() != before
    with pytest.raises(ValueError, match="unknown quantizer"):
        quantizer_of_kind("fsq")


def test_the_log_tells_use_and_dead_codes() -> None:
    torch.manual_seed(0)
    trainer = TokenizerTrainer(conv_tokenizer(32, (1, 1), 1, codebook_size=16, z_dim=8))
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    logs = trainer.losses({"image": image})
    counts = trainer.network.encode(image).flatten().bincount(minlength=16)
    shares = counts[counts > 0] / counts.sum()
    assert logs["codes_in_batch"] == (counts > 0).sum() and logs["dead_codes"] == 0
    assert logs["perplexity"].item() == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-5)
    trainer._step = DEAD_AFTER
    assert trainer.losses({"image": image})["dead_codes"] == (counts == 0).sum()
