"""What networks are given: half precision runs, and what does not fit is named before anything is read or cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seqgan.inference.sampling import ARSampler, ParallelSampler, keep_likely
from seqgan.models import ARTransformer, MaskedTransformer, UsageEntropy, conv_tokenizer, vqgan_tokenizer
from seqgan.standin.networks import SmallEncoder

KINDS = ("vq", "ema", "l2norm_factorized", "kmeans_restart")
TOKENIZERS = {kind: {"quantizer": kind} for kind in KINDS} | {
    "attention": {"extra": "attn1", "window": 4, "head_dim": 16},
    "rotation": {"quantizer_options": {"gradient": "rotation"}},
}
MODEL = {"codebook_size": 12, "num_classes": 3, "length": 16, "dim": 16, "depth": 1, "num_heads": 2}
HALVES = (torch.float16, torch.bfloat16, torch.float64)


def tokenizer(kind: str = "vq") -> nn.Module:
    torch.manual_seed(0)
    if kind == "vqgan":
        return vqgan_tokenizer(32, (1, 2), 1, (8,), 16, 8, 16, 8, entropy=UsageEntropy())
    return conv_tokenizer(32, (1, 2), 1, 16, 8, entropy=UsageEntropy(), **TOKENIZERS[kind])


def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [*TOKENIZERS, "vqgan"])
def test_tokenizers_run_in_the_precision_of_their_weights(kind: str, dtype: torch.dtype) -> None:
    whole, half = tokenizer(kind).eval(), tokenizer(kind).eval().to(dtype)
    image = images().to(dtype)
    with torch.no_grad():
        made = half(image)
        expected = whole.decode(made.indices)
    # float16 has 11 bits, bfloat16 8: some roundings of these add up to a few hundredths of values near one.
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.2, torch.float64: 1e-4}[dtype]
    assert made.reconstruction.dtype == dtype
    assert torch.allclose(made.reconstruction.float(), expected.float(), atol=tolerance)
    assert torch.equal(half.decode(made.indices), made.reconstruction)
    assert torch.equal(half.encode(image), made.indices) and torch.equal(half.encode(image.float()), made.indices)
    assert len(half.fingerprint()) == 64
    # A step of training moves what it moves in float32.
    half.train()
    optimizer = torch.optim.SGD((p for p in half.parameters() if p.requires_grad), lr=0.1)
    before = {name: value.clone() for name, value in half.state_dict().items()}
    made = half(image)
    ((made.reconstruction - image).abs().mean() + sum(made.losses.values())).backward()
    optimizer.step()
    moved = {name for name, value in half.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} >= {"encoder", "quantizer", "decoder"}
    assert all(torch.isfinite(value).all() for value in half.state_dict().values())


def test_moving_averages_stay_exact_in_half_precision() -> None:
    """A step of a hundredth is lost where numbers have eight bits."""
    quantizer = tokenizer("ema").to(torch.bfloat16).quantizer
    assert quantizer.embedding.weight.dtype == torch.bfloat16 and quantizer.cluster_size.dtype == torch.float32
    size = quantizer.cluster_size.clone()
    with torch.enable_grad():
        quantizer.train()(torch.randn(2, 8, 4, 4))
    counts = (quantizer.cluster_size - 0.99 * size) / 0.01
    assert torch.allclose(counts, counts.round(), atol=1e-3) and counts.sum() == pytest.approx(32, abs=1e-2)


@pytest.mark.parametrize("dtype", HALVES[:2])
def test_transformers_sample_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for model, sampler in ((ARTransformer(**MODEL), ARSampler()), (MaskedTransformer(**MODEL), ParallelSampler(3))):
        codes = sampler(model.eval().to(dtype), torch.tensor([0, 2]))
        assert codes.shape == (2, 16) and 0 <= codes.min() <= codes.max() < 12


@pytest.mark.parametrize("kind", ["vq", "vqgan"])
def test_images_that_do_not_fit_are_named(kind: str) -> None:
    model = tokenizer(kind).eval()
    wrong = {
        r"float32 \(3, 16, 16\): give floats \(B, 3, H, W\)": images()[0],
        r"float32 \(2, 1, 16, 16\): give": images()[:, :1],
        r"\(16, 15\) pixels: the sides must be multiples of 2": images()[..., :15],
        r"images are uint8: give floats": images().byte(),
    }
    for says, image in wrong.items():
        for call in (model, model.encode):
            with pytest.raises(ValueError, match=says):
                call(image)
    with pytest.raises(ValueError, match="multiples of 4"):
        SmallEncoder()(images()[..., :14])


def test_codes_that_do_not_fit_are_named() -> None:
    model = tokenizer().eval()
    codes = torch.zeros(1, 8, 8, dtype=torch.long)
    for value in (-1, 16):
        with pytest.raises(ValueError, match=rf"code {value}: there are 0 to 15 \(place \[0, 2, 3\]\)"):
            model.decode(codes.index_put((torch.tensor(0), torch.tensor(2), torch.tensor(3)), torch.tensor(value)))
    for wrong, says in ((codes.float(), "float32"), (codes[0, 0], r"\(8,\)"), (codes[None], r"\(1, 1, 8, 8\)")):
        with pytest.raises(ValueError, match=rf"codes are \w+ .*{says.removeprefix('float32')}: give integers"):
            model.decode(wrong)
    with pytest.raises(ValueError, match="no square"):
        model.decode(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="codes have 8 channels"):
        model.quantizer(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_transformers_name_codes_masks_and_labels_that_do_not_fit(kind: str) -> None:
    torch.manual_seed(0)
    model = (ARTransformer if kind == "ar" else MaskedTransformer)(**MODEL).eval()
    codes, label = torch.zeros(2, 16, dtype=torch.long), torch.tensor([0, 1])

    def call(codes: torch.Tensor, label: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.zeros(2, 16, dtype=torch.bool) if mask is None else mask
        return model(codes, label) if kind == "ar" else model(codes, hidden, label)

    place = (torch.tensor(1), torch.tensor(3))
    for value in (-1, 12, 14):  # beyond the codes lie the rows of classes
        with pytest.raises(ValueError, match=rf"code {value}: there are 0 to 11 \(place \[1, 3\]\)"):
            call(codes.index_put(place, torch.tensor(value)), label)
    for wrong in (codes[0], codes.float()):
        with pytest.raises(ValueError, match=r"codes are|mask is"):
            call(wrong, label)
    for wrong in (label[:1], label.float(), torch.zeros(2, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"labels are \w+ \(.*: give one integer for each of 2 images"):
            call(codes, wrong)
    with pytest.raises(ValueError, match="code 99: there are 0 to"):
        model.token_logits(codes.fill_(99))
    if kind == "ar":
        with pytest.raises(ValueError, match="position 16: the model has 0 to 15"):
            model.step(label, 16, model.allocate(2))
    else:
        hidden = torch.ones(2, 16, dtype=torch.bool)
        assert call(codes, label, hidden).shape == (2, 16, 12), "what stands at masked positions is not read"
        for wrong in (hidden[:1], hidden.long()):
            with pytest.raises(ValueError, match=r"mask is .*truth values of the codes' shape \(2, 16\)"):
                call(codes, label, wrong)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_samplers_name_what_does_not_fit(kind: str) -> None:
    sampler = ARSampler if kind == "ar" else ParallelSampler
    wrong = {"temperature": [-0.1, float("nan"), float("inf")], "cfg": [-1.0]}
    if kind == "ar":
        wrong |= {"top_k": [0, -3], "top_p": [0.0, -0.5, 1.1, float("nan")]}
    else:
        wrong |= {"choice_temperature": [-1.0], "steps": [0], "schedule": ["cosin"], "cfg_schedule": ["linea"]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name}={value}|schedule '{value}'|top_k=None and top_p={value}"):
                sampler(**{name: value})
    model = (ARTransformer if kind == "ar" else MaskedTransformer)(**MODEL).eval()
    codes, known, label = torch.zeros(2, 16).long(), torch.ones(2, 16, dtype=torch.bool), torch.tensor([0, 1])
    for given, says in (
        ({"codes": codes + 12, "known": known}, "code 12: there are 0 to 11"),
        ({"codes": codes[:1], "known": known[:1]}, r"both must be \(2, 16\)"),
        ({"codes": codes[:, :9], "known": known[:, :9]}, r"both must be \(2, 16\)"),
        ({"codes": codes, "known": known.long()}, "known is int64"),
        ({"codes": codes}, "both codes and known"),
    ):
        with pytest.raises(ValueError, match=says):
            sampler()(model, label, **given)
    for other, says in (
        (label - 1, "label -1: the model knows 0 to 2"),
        (None, "give a label"),
        (label[:0], "nothing"),
    ):
        with pytest.raises(ValueError, match=says):
            sampler()(model, other, batch=2)
    drawn = sampler()(model, label, codes=codes + 12, known=~known)
    assert drawn.max() < 12, "what is not kept is not read"
    with pytest.raises(ValueError, match=r"top_k=0 and top_p=1\.0"):
        keep_likely(torch.zeros(4), 0)
