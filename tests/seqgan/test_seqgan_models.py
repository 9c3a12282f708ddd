"""Tokenizers, quantiser, discriminators: counts of the paper, shapes, phases, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seqgan.models import (
    ConvDecoder,
    MaskGITEntropy,
    PatchDiscriminator,
    RegionalDilatedAttention,
    StyleDiscriminator,
    Tokenizer,
    UpsampleConv,
    UsageEntropy,
    VectorQuantizer,
    conv_tokenizer,
    second_phase,
    vqgan_tokenizer,
)
from seqgan.models.attention import SpatialAttention, partition, unpartition
from seqgan.models.entropy import code_usage, entropy
from tests import forked
from tests.gradients import unreached

COUNTS = [
    (conv_tokenizer, {}, 54_515_587),
    (conv_tokenizer, {"shortcut": "input"}, 54_433_667),
    (conv_tokenizer, {"extra": "attn1"}, 57_938_819),
    (conv_tokenizer, {"extra": "attn2"}, 61_362_051),
    (conv_tokenizer, {"extra": "conv2"}, 69_861_251),
    (vqgan_tokenizer, {}, 72_141_699),
    (PatchDiscriminator, {"n_layers": 3}, 2_765_633),
    (PatchDiscriminator, {"n_layers": 2}, 663_361),
    (StyleDiscriminator, {}, 23_998_017),
]


@pytest.mark.parametrize(("build", "options", "count"), COUNTS)
def test_parameter_counts(build, options: dict, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(**options).parameters()) == count


def tiny(**options) -> Tokenizer:
    torch.manual_seed(0)
    return conv_tokenizer(32, (1, 2), 1, codebook_size=16, z_dim=8, **options)


def images(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("extra", ["none", "conv2", "attn1", "attn2"])
def test_codes_decode_to_the_reconstruction(extra: str) -> None:
    model = tiny(extra=extra).eval()
    out = model(images())
    codes = model.encode(images())
    assert out.reconstruction.shape == (2, 3, 16, 16) and codes.shape == (2, 8, 8)
    assert torch.equal(codes, out.indices)
    assert torch.equal(model.decode(codes), out.reconstruction)
    assert torch.equal(model.decode(codes.flatten(1)), out.reconstruction)
    with pytest.raises(ValueError, match="no square"):
        model.decode(codes.flatten(1)[:, :-1])


def test_vqgan_runs_at_other_sizes() -> None:
    model = vqgan_tokenizer(32, (1, 2), 1, (8,), 16, 16, codebook_size=16, embed_dim=8).eval()
    for size in (16, 24):
        assert model(images(1, size)).reconstruction.shape == (1, 3, size, size)


def test_images_that_levels_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        tiny()(images(1, 15))


def test_the_second_phase_starts_from_the_first_and_leaves_codes_alone() -> None:
    first = tiny()
    second = second_phase(first)
    picture = images()
    assert torch.allclose(second(picture).reconstruction, first(picture).reconstruction, atol=1e-6)
    before, print_before = first.encode(picture), second.fingerprint()
    assert print_before == first.fingerprint()
    trained = {name for name, p in second.named_parameters() if p.requires_grad}
    assert trained == {f"decoder.{name}" for name, _ in second.decoder.named_parameters()}
    optimizer = torch.optim.Adam([p for p in second.parameters() if p.requires_grad], 1e-3)
    start = copy.deepcopy(second.decoder.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        (second(picture).reconstruction - picture).abs().mean().backward()
        assert {n for n, p in second.named_parameters() if p.grad is not None} == trained
        optimizer.step()
    assert unreached(second) == []  # the first step has opened what begins closed
    after = second.decoder.state_dict()
    assert not any(torch.equal(after[n], start[n]) for n in ("conv_out.weight", "levels.0.extra.0.regional.qkv.weight"))
    assert torch.equal(second.encode(picture), before) and second.fingerprint() == print_before


@pytest.mark.parametrize("kind", ["vq", "ema", "kmeans_restart", "l2norm_factorized"])
def test_frozen_codes_stay_in_training_mode(kind: str) -> None:
    """Averages, restarts and dropout of the encoder need no gradients to change codes."""
    torch.manual_seed(0)
    options = {"quantizer_options": {"patience": 1}} if kind == "kmeans_restart" else {}
    first = tiny(quantizer=kind, **options)
    first.encoder.dropout = nn.Dropout(0.5)
    first.encoder.register_forward_hook(lambda module, _, out: module.dropout(out))
    second = second_phase(first)
    before, codes = second.fingerprint(), second.encode(images())
    for model in (second.train(), first.train(), second):
        assert torch.equal(model(images()).indices, codes) and torch.equal(model.encode(images()), codes)
        assert model.fingerprint() == before
    assert second.decoder.training and second.quantizer.train()
    second(images())
    assert second.fingerprint() == before, "the quantiser alone was put into training mode"
    whole = tiny(quantizer=kind, **options).requires_grad_(False).train()
    before = whole.fingerprint()
    whole(images())
    assert whole.fingerprint() == before
    if kind == "ema":  # and thawed they move again, still without gradients
        whole.requires_grad_(True)(images())
        assert whole.fingerprint() != before and not whole.quantizer.embedding.weight.requires_grad


def test_the_second_phase_asks_for_what_it_needs() -> None:
    with pytest.raises(ValueError, match="extra='none'"):
        second_phase(tiny(extra="attn1"))
    with pytest.raises(ValueError, match="attn1 or attn2"):
        second_phase(tiny(), extra="conv2")
    with pytest.raises(ValueError, match="unknown decoder extra"):
        ConvDecoder(extra="attn3")


def test_the_fingerprint_follows_encoder_and_codebook() -> None:
    model = tiny()
    prints = {model.fingerprint()}
    for parameter in (model.encoder.stem.weight, model.quantizer.embedding.weight):
        parameter.data.flatten()[0] += 1e-3
        prints.add(model.fingerprint())
    model.decoder.stem.weight.data += 1
    prints.add(model.fingerprint())
    assert len(prints) == 3
    other = vqgan_tokenizer(32, (1, 2), 1, (4,), 8, z_channels=8, codebook_size=16, embed_dim=4)
    before = other.fingerprint()
    other.post_quant_conv.weight.data += 1
    assert other.fingerprint() == before
    other.quant_conv.bias.data += 1e-3
    assert other.fingerprint() != before


def test_upsampling_equals_nearest_and_convolution() -> None:
    torch.manual_seed(0)
    up, x = UpsampleConv(5).double(), torch.randn(2, 5, 3, 4).double()
    plain = F.conv2d(F.interpolate(x, scale_factor=2), up.conv.weight, up.conv.bias, padding=1)
    assert torch.allclose(up(x), plain, atol=1e-12)


@pytest.mark.parametrize("span", ["all", "regional", "dilated"])
def test_partition_is_undone(span: str) -> None:
    x = torch.arange(2 * 8 * 12 * 3).view(2, 8, 12, 3)
    assert torch.equal(unpartition(partition(x, span, 4), span, 4, (8, 12)), x)


def test_spans_decide_who_sees_whom() -> None:
    torch.manual_seed(0)
    pixel = torch.zeros(1, 32, 8, 8)
    reach = {}
    for span in ("all", "regional", "dilated"):
        layer = SpatialAttention(32, 2, span, window=4)
        layer.norm = nn.Identity()  # the norm itself reads the whole map
        x = torch.randn_like(pixel).requires_grad_()
        layer(x)[0, :, 0, 0].sum().backward()
        reach[span] = (x.grad[0].abs().sum(0) > 0).nonzero().tolist()
    assert len(reach["all"]) == 64
    assert reach["regional"] == [[i, j] for i in range(4) for j in range(4)]
    assert reach["dilated"] == [[i, j] for i in range(0, 8, 2) for j in range(0, 8, 2)]


def test_attention_pair_starts_as_the_identity() -> None:
    x = torch.randn(1, 32, 8, 8)
    assert torch.equal(RegionalDilatedAttention(32, 4)(x), x)
    assert not torch.equal(RegionalDilatedAttention(32, 4, zero_init=False)(x), x)
    with pytest.raises(ValueError, match="does not divide"):
        RegionalDilatedAttention(32, 3)(x)


# ------------------------------------------------------------------ quantiser and entropy


def test_the_nearest_code_is_found_in_blocks() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, block=5)
    z = torch.randn(2, 4, 3, 3)
    brute = torch.cdist(z.movedim(1, -1).reshape(-1, 4), quantizer.embedding.weight).argmin(1)
    assert torch.equal(quantizer(z).indices.flatten(), brute)
    with pytest.raises(ValueError, match="channels"):
        quantizer(torch.randn(1, 5, 2, 2))


@pytest.mark.parametrize("legacy", [False, True])
def test_beta_weighs_commitment_and_legacy_the_codebook(legacy: bool) -> None:
    quantizer = VectorQuantizer(8, 4, beta=0.25, legacy_beta=legacy)
    losses = quantizer(torch.randn(1, 4, 2, 2)).losses
    ratio = losses["commit"] / losses["codebook"]
    assert ratio.item() == pytest.approx(4.0 if legacy else 0.25)


def test_gradients_stop_where_the_equation_says() -> None:
    """Features get the gradient at their codes and that of the commitment alone; codes get the codebook's alone."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 4, beta=0.25)
    weight = quantizer.embedding.weight
    z = torch.randn(2, 4, 3, 3, requires_grad=True)

    def gradients(value: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(value, (z, weight), allow_unused=True))

    out = quantizer(z)
    codes = quantizer.lookup(out.indices).detach()
    assert torch.equal(out.z_q, codes)
    given = torch.randn_like(codes)
    at_features, at_codes = gradients((out.z_q * given).sum())
    assert torch.equal(at_features, given) and at_codes is None
    at_features, at_codes = gradients(quantizer(z).losses["codebook"])
    assert at_features is None and at_codes.abs().sum() > 0
    at_features, at_codes = gradients(quantizer(z).losses["commit"])
    assert torch.allclose(at_features, 0.25 * 2 * (z - codes) / z.numel(), atol=1e-6) and at_codes is None


def use_after_training(term: nn.Module | None) -> float:
    """Perplexity of the codes of fixed features after the codebook was trained."""
    torch.manual_seed(0)
    features = torch.randn(1, 4, 8, 8)
    quantizer = VectorQuantizer(32, 4, entropy=term)
    nn.init.normal_(quantizer.embedding.weight, 3.0, 1.0)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        sum(quantizer(features).losses.values()).backward()
        optimizer.step()
    counts = quantizer(features).indices.flatten().bincount(minlength=32).double()
    return entropy(counts / counts.sum()).exp().item()


def test_the_entropy_term_spreads_use_and_the_printed_sign_does_not() -> None:
    none = use_after_training(None)
    assert use_after_training(UsageEntropy(0.5)) > none + 3
    assert use_after_training(UsageEntropy(0.5, sign="paper")) <= none


def test_scopes_and_distances_of_entropy() -> None:
    near = torch.tensor([[[0.0, 9.0]], [[9.0, 0.0]]])  # every image sure of another code
    assert code_usage(near, "batch").tolist()[0] == pytest.approx([0.5, 0.5])
    assert code_usage(near, "image")[:, 0].tolist() == pytest.approx([0.99988, 0.00012], abs=1e-5)
    values = {d: UsageEntropy(1.0, distance=d, scope="image")(near).item() for d in ("l2", "l2_squared")}
    assert values["l2"] < values["l2_squared"] < 0
    assert UsageEntropy(1.0)(near).item() == pytest.approx(-UsageEntropy(1.0, sign="paper")(near).item())
    uneven = torch.tensor([[[0.0, 2.0]]])
    assert UsageEntropy(1.0, temperature=2.0)(uneven).item() == pytest.approx(UsageEntropy(1.0)(uneven / 2).item())
    assert UsageEntropy(1.0, temperature=2.0)(uneven) < UsageEntropy(1.0)(uneven) - 0.1
    with pytest.raises(ValueError, match="unknown scope"):
        UsageEntropy(scope="pixel")


@pytest.mark.parametrize("scope", ["batch", "image"])
@pytest.mark.parametrize("distance", ["l2_squared", "l2"])
def test_entropy_has_the_right_gradient_where_a_share_underflows(scope: str, distance: str) -> None:
    """A code at a squared distance of 40,000 has a share of exactly zero in float32, and in float64, too."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 4, entropy=UsageEntropy(1.0, distance, scope=scope, temperature=0.01))
    quantizer.embedding.weight.data[0] = 100
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    term = quantizer(z).losses["entropy"]
    at_z, at_codes = torch.autograd.grad(term, (z, quantizer.embedding.weight))
    squared = torch.cdist(
        z.detach().movedim(1, -1).flatten(1, 2).double(), quantizer.embedding.weight.detach().double()
    )
    assert code_usage(squared**2 / 0.01)[0, 0] == 0 and at_codes[0].eq(0).all()
    # Without that code, nothing changes: in float64, where the shares of the others do not underflow.
    others = quantizer.embedding.weight.detach()[1:].double().requires_grad_()
    own = z.detach().double().requires_grad_()
    distances = torch.cdist(own.movedim(1, -1).flatten(1, 2), others.expand(2, -1, -1)) / 0.01
    shares = (-(distances if distance == "l2" else distances**2 * 0.01)).softmax(-1)
    shares = shares.mean((0, 1))[None] if scope == "batch" else shares.mean(1)
    value = (shares * shares.log()).sum(-1).mean()
    expected = torch.autograd.grad(value, (own, others))
    assert term.item() == pytest.approx(value.item(), rel=1e-4)
    for found, right in zip((at_z, at_codes[1:]), expected, strict=True):
        assert right.abs().max() > 1e-3
        torch.testing.assert_close(found.double(), right, rtol=1e-3, atol=1e-3 * right.abs().max().item())


def test_maskgit_entropy_wants_sure_positions_and_even_use() -> None:
    term = MaskGITEntropy(1.0, temperature=1.0)
    good, unsure = torch.tensor([[[0.0, 9.0], [9.0, 0.0]]]), torch.zeros(1, 2, 2)
    collapsed = torch.tensor([[[0.0, 9.0], [0.0, 9.0]]])
    assert term(good) < term(unsure) - 0.5 and term(good) < term(collapsed) - 0.5


def _joint(rank: int, folder: str, distances: Tensor) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    own = distances[rank : rank + 1].clone().requires_grad_()
    UsageEntropy(1.0)(own).backward()
    torch.save(own.grad / 2, f"{folder}/{rank}.pt")  # as averaging over processes does
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.processes
def test_entropy_over_processes_is_that_of_the_joint_batch(tmp_path) -> None:
    distances = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 4
    distances[..., 1] += 200  # a code whose share underflows
    whole = distances.clone().requires_grad_()
    UsageEntropy(1.0)(whole).backward()
    forked.pair(_joint, str(tmp_path), distances)
    parts = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)])
    assert whole.grad.isfinite().all() and whole.grad.abs().max() > 1e-3
    assert torch.allclose(parts, whole.grad, atol=1e-7)


# ------------------------------------------------------------------ discriminators


def test_discriminators_give_logits() -> None:
    assert PatchDiscriminator(ndf=8, n_layers=2)(images(2, 32)).shape == (2, 1, 6, 6)
    assert StyleDiscriminator(16, channels={4: 8, 8: 8, 16: 4})(images()).shape == (2, 1)
    with pytest.raises(ValueError, match="power of two"):
        StyleDiscriminator(24)
    with pytest.raises(ValueError, match="no width for maps"):
        StyleDiscriminator(16, channels={8: 4, 16: 4})


# ------------------------------------------------------------------ compilation and precision


def test_codes_do_not_depend_on_autocast() -> None:
    model = tiny(entropy=UsageEntropy())
    with torch.autocast("cpu", torch.bfloat16):
        codes = model.encode(images())
        losses = model(images()).losses
    assert torch.equal(codes, model.encode(images()))
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
