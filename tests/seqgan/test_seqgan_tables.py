"""Costs that tables compute: tokenizers and transformers at full size, counted without memory."""

from __future__ import annotations

import pytest
import torch

from core.config import CONFIGS, compose
from core.config.fingerprint import fingerprint
from core.engine.launch import build_trainer
from core.profile.figures import Figures
from core.tables.ablation import declared
from seqgan.inference.sampling import ParallelSampler
from seqgan.models import UsageEntropy, ar_base, ar_large, conv_tokenizer, nar_base, nar_large
from seqgan.trainer import TokenizerTrainer, TransformerTrainer

# The decoder's four doublings with their convolutions take 24.2 GMACs as they stand and 10.8 as they are computed.
ENCODER, DECODER, PAIR = 64.3, 93.3 - 13.4, 17.0


def figures(trainer: torch.nn.Module):
    made = Figures(lambda cfg, device: trainer)
    return lambda name: made.of({"name": "x", "model": {}}, name)


@pytest.mark.parametrize(
    ("extra", "millions", "more"), [("none", 54.516, 0.0), ("attn1", 57.939, PAIR), ("attn2", 61.362, 2 * PAIR)]
)
def test_tokenizers(extra: str, millions: float, more: float) -> None:
    with torch.device("meta"):
        trainer = TokenizerTrainer(conv_tokenizer(extra=extra), input_shape=(3, 256, 256))
    of = figures(trainer)
    assert of("parameters") / 1e6 == pytest.approx(millions, abs=5e-4)
    assert of("macs/encoder") / 1e9 == pytest.approx(ENCODER, rel=0.01)
    assert of("macs/decoder") / 1e9 == pytest.approx(DECODER + more, rel=0.01)
    assert (of("codes"), of("codebook"), of("code_channels")) == (256, 1024, 256)


def test_kinds_of_codebooks() -> None:
    options = {"quantizer": "l2norm_factorized", "codebook_size": 8192, "quantizer_options": {"code_dim": 32}}
    with torch.device("meta"):
        of = figures(TokenizerTrainer(conv_tokenizer(**options)))
    assert (of("codebook"), of("code_channels")) == (8192, 32)


@pytest.mark.parametrize(
    ("build", "gigas", "steps", "paper"),
    [(ar_base, 46.1, 256, 229), (nar_base, 46.4, 12, 229), (ar_large, 80.8, 256, 364), (nar_large, 81.4, 12, 364)],
)
def test_transformers(build, gigas: float, steps: int, paper: int) -> None:
    with torch.device("meta"):
        of = figures(TransformerTrainer(build(), conv_tokenizer(extra="attn1")))
    assert of("macs") / 1e9 == pytest.approx(gigas, rel=0.01)
    assert of("steps") == steps
    # The paper's counts leave class tokens out.
    assert of("parameters_with_tokenizer") / 1e6 == pytest.approx(paper, rel=0.0125)


def test_steps_are_the_samplers() -> None:
    with torch.device("meta"):
        trainer = TransformerTrainer(nar_base(), sampler=ParallelSampler(8))
    assert figures(trainer)("steps") == 8


@pytest.mark.parametrize("name", ["shape_glyphs", "digits"])
def test_what_is_shown_of_a_run_does_not_make_it_another(name: str) -> None:
    """Stored results were made before the last stage had a request."""
    plain, stage = fingerprint(compose([f"experiment=seqgan/{name}"])), "stages.2.model"
    for words in (["request.count=4", "request.labels=[1]"], ["~request"]):
        overrides = [f"{word[0] * (word[0] == '~')}{stage}.{word.lstrip('~')}" for word in words]
        assert fingerprint(compose([f"experiment=seqgan/{name}", *overrides])) == plain
    assert fingerprint(compose([f"experiment=seqgan/{name}", f"{stage}.steps=8"])) != plain


def test_configs_say_the_counted_cost() -> None:
    with torch.device("meta"):
        tokenizer = conv_tokenizer(entropy=UsageEntropy())  # whose distances are computed beside those of the search
        macs = figures(TokenizerTrainer(tokenizer, input_shape=(3, 256, 256)))("macs") / 1e9
    files = sorted((CONFIGS / "experiment" / "seqgan").glob("*_tokenizer.yaml"))
    assert len(files) == 5 and all(f"# Costs: {macs:.1f} GMACs an image" in file.read_text() for file in files)


def test_what_the_tables_vary_is_declared_and_builds() -> None:
    """Size of transformers, guidance, terms and networks of the perceptual loss: one change at a time."""
    wanted = {
        "imagenet256_tokenizer": ["low_loss", "perceptual_network", "alpha", "semantic_layers", "perceptual_weight"],
        "imagenet256_ar_l": ["guidance", "size", "top_k", "temperature"],
        "lsun_cat_nar": ["guidance", "size", "label_drop"],
        "shape_glyphs": ["transformer_depth", "low_layers", "transformer_width"],
    }
    for name, components in wanted.items():
        cfg = compose([f"experiment=seqgan/{name}"])
        first, second, *_ = declared(cfg, components)
        for component in (first, second) if name == "imagenet256_tokenizer" else (first,):
            changed = compose([f"experiment=seqgan/{name}", *component.changes()[0].overrides])
            assert fingerprint(changed) != fingerprint(cfg), (name, component)
            build_trainer(changed, device="meta")


def test_guidance_of_ar_is_one_change() -> None:
    """A row for "no class", dropped labels and a weight go together; any of them alone is refused or does nothing."""
    (guidance,) = declared(compose(["experiment=seqgan/imagenet256_ar"]), ["guidance"])
    (change,) = guidance.changes()
    plain, guided = (
        build_trainer(compose(["experiment=seqgan/imagenet256_ar", *words]), device="meta")
        for words in ((), change.overrides)
    )
    assert (plain.network.null_label, plain.label_drop, plain.sampler.cfg) == (None, 0.0, 0.0)
    assert (guided.network.null_label, guided.label_drop, guided.sampler.cfg) == (1000, 0.1, 1.0)
