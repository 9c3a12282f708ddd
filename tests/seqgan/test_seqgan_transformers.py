"""Transformers and sampling: counts, causality, the cache, parallel decoding, guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqgan.inference import sampling
from seqgan.inference.sampling import ARSampler, ParallelSampler, decoding_steps, guide, gumbel, keep_likely
from seqgan.models import ARTransformer, MaskedTransformer, ar_base, ar_large, mask_ratio, nar_base, nar_large
from seqgan.models import training_mask as draw_mask
from seqgan.models.masking import mask_count

COUNTS = [
    (ar_base, 1000, 173_415_936),
    (ar_base, 1, 171_881_472),
    (ar_large, 1000, 306_718_720),
    (nar_base, 1000, 172_457_193),
    (nar_base, 1, 171_688_962),
    (nar_large, 1000, 305_701_865),
]
K, N, CLASSES = 12, 16, 3


@pytest.mark.parametrize(("build", "classes", "count"), COUNTS)
def test_parameter_counts(build, classes: int, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(num_classes=classes).parameters()) == count


def spread(model):
    """Weights far from their start, so that positions and classes matter."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            parameter.data *= 4 if "positions" in name else 1
    return model.eval()


def ar(**options) -> ARTransformer:
    return spread(ARTransformer(K, CLASSES, N, dim=16, depth=2, num_heads=2, **options))


def nar(**options) -> MaskedTransformer:
    return spread(MaskedTransformer(K, CLASSES, N, dim=16, depth=2, num_heads=2, **options))


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def labels() -> Tensor:
    return torch.tensor([0, 2, 2, 1])


def some_codes(batch: int = 4) -> Tensor:
    return torch.randint(K, (batch, N), generator=seed(5))


# ------------------------------------------------------------------ autoregressive


def test_a_code_is_predicted_from_those_before_it() -> None:
    model, codes = ar(), some_codes()
    other = codes.clone()
    other[:, 6] = (other[:, 6] + 1) % K
    a, b = model(codes, labels()), model(other, labels())
    assert a.shape == (4, N, K)
    assert torch.allclose(a[:, :7], b[:, :7], atol=1e-5) and not torch.allclose(a[:, 7:], b[:, 7:], atol=1e-3)
    assert not torch.allclose(a, model(codes, labels().flip(0)), atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0}, {"cfg": 1.5}, {"temperature": 0.5}]
)
def test_the_cache_gives_the_same_codes(options: dict) -> None:
    model = ar(null_class=True)
    cached = ARSampler(**options)(model, labels(), generator=seed())
    anew = ARSampler(**options, cached=False)(model, labels(), generator=seed())
    assert cached.shape == (4, N) and torch.equal(cached, anew)
    assert len(cached.unique()) > 1


def test_cached_logits_are_those_of_the_whole_sequence() -> None:
    model, codes = ar(), some_codes()
    whole = model(codes, labels())
    cache, token = model.allocate(4), model.start(labels(), 4, codes.device)
    for position in range(N):
        logits = model.step(token, position, cache)
        assert torch.allclose(logits[:, :K], whole[:, position], atol=1e-4)
        token = codes[:, position]


def test_samples_follow_the_model() -> None:
    model = ar()
    first = torch.cat([ARSampler()(model, torch.zeros(500, dtype=torch.long), generator=seed(s)) for s in (1, 2)])[:, 0]
    expected = model(some_codes(1), torch.tensor([0]))[0, 0].softmax(-1)
    assert torch.allclose(first.bincount(minlength=K) / 1000, expected, atol=0.05)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_temperature_sharpens_and_flattens(kind: str) -> None:
    model, label = (ar() if kind == "ar" else nar()), torch.zeros(64, dtype=torch.long)
    options = {} if kind == "ar" else {"steps": 1}

    def codes(temperature: float) -> Tensor:
        sampler = (ARSampler if kind == "ar" else ParallelSampler)(temperature=temperature, **options)
        return sampler(model, label, generator=seed())

    assert torch.equal(codes(1e-4), codes(0.0)) and len(codes(0.0).unique(dim=0)) == 1
    # At a high temperature all codes are about as likely: 1024 draws of 12, 85 of each.
    assert codes(1e4).flatten().bincount(minlength=K).min() > 50
    assert codes(1.0).flatten().bincount(minlength=K).min() < 50


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_an_image_with_its_own_generator_is_drawn_alike_in_every_batch(kind: str) -> None:
    model, sampler = (ar(), ARSampler()) if kind == "ar" else (nar(), ParallelSampler(3))
    whole = sampler(model, labels(), generator=[seed(i) for i in range(4)])
    for i in range(4):
        assert torch.equal(sampler(model, labels()[i : i + 1], generator=[seed(i)])[0], whole[i])
    assert not torch.equal(whole[1], whole[2]), "one class, other noise"
    with pytest.raises(ValueError, match="shorter"):
        sampler(model, labels(), generator=[seed(0)])


def test_given_codes_stay_and_are_read() -> None:
    known = torch.zeros(4, N, dtype=torch.bool)
    known[:, :5] = True
    for sampler, model in ((ARSampler(), ar()), (ParallelSampler(4), nar())):
        codes = sampler(model, labels(), generator=seed(), codes=some_codes(), known=known)
        assert torch.equal(codes[:, :5], some_codes()[:, :5])
        assert not torch.equal(codes[:, 5:], sampler(model, labels(), generator=seed())[:, 5:])
        with pytest.raises(ValueError, match="both codes and known"):
            sampler(model, labels(), codes=some_codes())


def test_published_models_read_classes_from_the_rows_of_codes() -> None:
    model = ar(class_rows="shared")
    assert model.tokens.num_embeddings == K and model.start(labels(), 4, torch.device("cpu")).tolist() == [0, 2, 2, 1]
    with pytest.raises(ValueError, match="no row for 'no class'"):
        ARTransformer(K, CLASSES, N, 16, 1, 2, class_rows="shared", null_class=True)


@pytest.mark.parametrize("build", ["ar", "ar_null", "ar_shared", "nar"])
def test_labels_outside_of_the_classes_are_refused(build: str) -> None:
    """Rows of the table that lie around the classes' are codes, the mask, and what the model lacks."""
    models = {
        "ar": ar,
        "ar_null": lambda: ar(null_class=True),
        "ar_shared": lambda: ar(class_rows="shared"),
        "nar": nar,
    }
    model = models[build]()
    mask = () if build != "nar" else (torch.ones(4, N, dtype=torch.bool),)
    allowed = [0, 2] if model.null_label is None else [0, 2, model.null_label]
    for value in allowed:
        assert model(some_codes(), *mask, torch.full((4,), value)).shape == (4, N, K)
    for value in {-1, CLASSES, CLASSES + 1, K} - set(allowed):
        label = labels().index_fill(0, torch.tensor([1]), value)
        with pytest.raises(ValueError, match=rf"label {value}: the model knows 0 to {CLASSES - 1}"):
            model(some_codes(), *mask, label)
        with pytest.raises(ValueError, match=rf"label {value}:"):
            (ARSampler() if build != "nar" else ParallelSampler(2))(model, label)


def test_labels_and_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match="give a label"):
        ar()(some_codes())
    with pytest.raises(ValueError, match="give a label"):
        nar()(some_codes(), some_codes() > 3)
    with pytest.raises(ValueError, match="positions for"):
        ar().token_logits(torch.zeros(1, N + 1, dtype=torch.long))
    with pytest.raises(ValueError, match="null_class=True"):
        ARSampler(cfg=1.0)(ar(), labels())
    unconditional = spread(ARTransformer(K, 1, N, dim=16, depth=1, num_heads=2))
    assert ARSampler()(unconditional, batch=3, generator=seed()).shape == (3, N)


def test_likely_codes_are_kept() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = lambda **options: keep_likely(logits, **options).isfinite().tolist()  # noqa: E731
    assert kept(top_k=2) == [True, True, False, False] and kept(top_k=9) == [True] * 4
    assert kept(top_p=0.8) == [True, True, False, False] and kept(top_p=0.81) == [True, True, True, False]
    assert kept(top_p=1e-6) == [True, False, False, False]
    assert keep_likely(torch.zeros(4), top_k=1).isfinite().all()  # ties stay
    # Logits need not be normalised, and the fewest are kept where they reach the share exactly.
    assert keep_likely(logits + 3, top_p=0.8).isfinite().tolist() == [True, True, False, False]
    assert keep_likely(torch.zeros(2), top_p=0.5).isfinite().sum() == 1
    with pytest.raises(ValueError, match="top_p"):
        keep_likely(logits, top_p=0.0)


# ------------------------------------------------------------------ masked


def test_masked_codes_are_not_read() -> None:
    model, codes = nar(), some_codes()
    mask = torch.rand(4, N, generator=seed()) < 0.5
    logits = model(codes, mask, labels())
    assert logits.shape == (4, N, K)
    assert torch.equal(logits, model(torch.where(mask, (codes + 1) % K, codes), mask, labels()))
    assert not torch.allclose(logits, model(torch.where(mask, codes, (codes + 1) % K), mask, labels()), atol=1e-3)
    none = torch.full((4,), model.null_label)
    assert not torch.allclose(logits, model(codes, mask, none), atol=1e-3)


def test_schedule_in_float32() -> None:
    counts = lambda steps: [  # noqa: E731
        mask_count("cosine", t, steps, torch.tensor([256]), torch.tensor([256])).item() for t in range(steps)
    ]
    assert counts(12) == [253, 247, 236, 221, 203, 181, 155, 127, 97, 66, 33, 1]
    assert counts(8) == [251, 236, 212, 181, 142, 97, 49, 1]
    with pytest.raises(ValueError, match="unknown mask schedule"):
        mask_ratio("sine", torch.ones(1), 4)


def test_at_least_one_code_becomes_known_in_a_step() -> None:
    few = mask_count("cosine", 0, 12, masked=torch.tensor([3, 16, 1]), unknown=torch.tensor([16, 16, 16]))
    assert few.tolist() == [2, 15, 1]


def test_every_step_keeps_more_codes() -> None:
    seen = []

    def predict(step: int, codes: Tensor, masked: Tensor) -> Tensor:
        seen.append(masked.clone())
        return torch.randn(2, N, K, generator=seed(step))

    zeros = torch.zeros(2, N, dtype=torch.long)
    known = zeros.bool()
    known[1, :10] = True
    states = list(decoding_steps(predict, zeros + 7, known, lambda shape: torch.rand(shape, generator=seed()), 5))
    for before, after, codes in zip(seen, seen[1:], states, strict=False):
        assert (after <= before).all() and (after.sum(1) < before.sum(1)).all()
        assert torch.equal(torch.where(after, codes, states[-1])[after], codes[after])
    for step in range(4):
        kept = ~seen[step + 1]
        assert torch.equal(states[step][kept], states[-1][kept])
    assert (states[-1][1, :10] == 7).all()


def test_known_codes_come_back_unchanged() -> None:
    everything = torch.ones(4, N, dtype=torch.bool)
    assert torch.equal(ParallelSampler(3)(nar(), labels(), codes=some_codes(), known=everything), some_codes())


def test_the_first_step_is_shared_by_a_class() -> None:
    model, batches = nar(), []
    hook = model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    shared = ParallelSampler(3, cfg=0.0)(model, labels(), generator=seed())
    assert batches == [3, 4, 4]
    hook.remove()
    masks = torch.zeros(4, N, dtype=torch.bool)

    def predict(step: int, codes: Tensor, masked: Tensor) -> Tensor:
        return model(codes, masked, labels())

    noise = seed()
    draw = lambda shape: gumbel(shape, torch.device("cpu"), noise)  # noqa: E731
    with torch.no_grad():
        plain = list(decoding_steps(predict, some_codes(), masks, draw, 3))[-1]
    assert torch.equal(shared, plain)


def test_images_of_one_class_keep_their_own_given_codes() -> None:
    model, label = nar(), torch.zeros(2, dtype=torch.long)
    known = torch.zeros(2, N, dtype=torch.bool)
    known[:, : N // 2] = True
    greedy = ParallelSampler(1, choice_temperature=0.0, temperature=0.0)
    given = some_codes(2)
    both = greedy(model, label, codes=given, known=known)
    for i in range(2):
        one = slice(i, i + 1)
        assert torch.equal(greedy(model, label[one], codes=given[one], known=known[one])[0], both[i])


def test_the_noise_of_the_choice_falls_to_zero() -> None:
    """Of two steps the first has half of the temperature: a noise of 4 does not make up for 3 nats."""
    logits = torch.tensor([[[8.0, 0.0], [0.0, 0.0]]])
    logits[0, 1] = torch.tensor([3.0, 3.0])  # log-probabilities 0 and -0.7
    noise = {2: torch.tensor([[0.0, 1.2]])}
    masks = []

    def predict(step: int, codes: Tensor, masked: Tensor) -> Tensor:
        masks.append(masked.clone())
        return logits

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape) if len(shape) == 3 else noise[2]

    start = torch.zeros(1, 2, dtype=torch.long)
    list(decoding_steps(predict, start, start.bool(), draw, 2, choice_temperature=1.0))
    assert masks[1].tolist() == [[False, True]]


def test_guidance_of_masked_models_is_that_of_their_logits() -> None:
    model = nar()
    sampler = ParallelSampler(1, temperature=0.0, cfg=3.0)
    hidden = torch.ones(4, N, dtype=torch.bool)
    with torch.no_grad():
        cond = model(some_codes(), hidden, labels())
        uncond = model(some_codes(), hidden, torch.full((4,), model.null_label))
    assert torch.equal(sampler(model, labels()), (4 * cond - 3 * uncond).argmax(dim=-1))
    assert not torch.equal(sampler(model, labels()), cond.argmax(dim=-1))


def test_linear_guidance_reaches_its_weight_at_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = sampling.guide
    monkeypatch.setattr(sampling, "guide", lambda *given: (seen.append(given[2:]), plain(*given))[1])
    ParallelSampler(3, cfg=2.0, cfg_schedule="linear")(nar(), labels(), generator=seed())
    assert seen == [(2.0, "linear", 0.0), (2.0, "linear", 0.5), (2.0, "linear", 1.0)]


def test_guidance() -> None:
    cond, uncond = torch.tensor([1.0]), torch.tensor([0.5])
    assert guide(cond, uncond, 2.0).item() == 2.0
    assert [guide(cond, uncond, 2.0, "linear", p).item() for p in (0.0, 0.5)] == [1.0, 1.5]
    model = nar()
    greedy = {"temperature": 0.0, "choice_temperature": 0.0, "steps": 2}
    plain, guided = (ParallelSampler(**greedy, cfg=w)(model, labels(), generator=seed()) for w in (0.0, 4.0))
    assert not torch.equal(plain, guided)
    assert torch.equal(plain, ParallelSampler(**greedy)(model, labels(), generator=seed(1)))
    with pytest.raises(ValueError, match="unknown guidance schedule"):
        guide(cond, uncond, 1.0, "cosine")


def test_training_masks_hide_a_cosine_share() -> None:
    score = torch.rand(3, 100, generator=seed())
    mask = draw_mask(torch.tensor([0.0, 0.5, 1.0]), score)
    assert mask.sum(1).tolist() == [100, 70, 1]
    assert score[1][mask[1]].max() < score[1][~mask[1]].min()
    assert draw_mask(torch.tensor([1.0]), score[:1], 0.5).sum() == 50


@pytest.mark.compile
def test_steps_with_a_cache_compile_in_one_piece() -> None:
    torch._dynamo.reset()
    codes, model = some_codes(), ar()
    step, cache = torch.compile(model.step, fullgraph=True, backend="eager"), model.allocate(4)
    first = step(model.start(labels(), 4, codes.device), 0, cache)
    second = step(codes[:, 0], 1, cache)
    assert torch.allclose(torch.stack([first, second], 1)[..., :K], model(codes, labels())[:, :2], atol=1e-4)
