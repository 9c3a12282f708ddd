"""Steps of tokenizers in both phases, with and without a discriminator, and of transformers."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from core.data import ImageNet, StaleCacheError
from core.data.prepare import run_task
from core.engine.state import randomness
from core.optim.groups import OptimConstructor
from seqgan.data import TokenizerTransform
from seqgan.data.codes import CodeCache
from seqgan.losses.perceptual import SemanticPerceptualLoss, TappedNetwork
from seqgan.losses.terms import gradient_penalty
from seqgan.models import (
    ARTransformer,
    MaskedTransformer,
    PatchDiscriminator,
    StyleDiscriminator,
    UsageEntropy,
    conv_tokenizer,
    training_mask,
)
from seqgan.trainer import CODES, TokenizerTrainer, TransformerTrainer

ADAM = {"optimizer": {"type": "torch.optim.Adam", "lr": 2e-3}}


def images() -> dict[str, Tensor]:
    smooth = nn.functional.interpolate(
        torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)), scale_factor=4
    )
    return {"image": smooth * 2 - 1, "sample_id": list("abcd")}


def tokenizer(**options) -> nn.Module:
    torch.manual_seed(0)
    return conv_tokenizer(32, (1, 1), 1, codebook_size=16, z_dim=8, entropy=UsageEntropy(), **options)


def perceptual(alpha: float = 1.0) -> SemanticPerceptualLoss:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    tapped = TappedNetwork(network, {"low": "1", "logit": ""})
    return SemanticPerceptualLoss(tapped, alpha, low=("low",), semantic=("logit",))


def wrapper(trainer: nn.Module, *names: str) -> object:
    trainer.freeze()
    return OptimConstructor({name: ADAM for name in names} if names else ADAM)(trainer.train())


def test_first_phase_learns_to_reconstruct() -> None:
    trainer = TokenizerTrainer(tokenizer(), perceptual())
    optim = wrapper(trainer)
    logs = [trainer.train_step(images(), optim) for _ in range(12)]
    assert logs[-1]["loss_l1"] < logs[0]["loss_l1"]
    terms = {"loss_l1", "loss_perceptual", "loss_codebook", "loss_commit", "loss_entropy", "layer_semantic"}
    assert terms <= logs[0].keys() and trainer.steps == 12
    out = trainer.val_step(images())
    assert out["reconstruction"].shape == (4, 3, 16, 16) and out["indices"].shape == (4, 8, 8)


def test_second_phase_trains_the_decoder_alone() -> None:
    first = tokenizer()
    network = tokenizer(extra="attn1")
    network.load_state_dict({**network.state_dict(), **first.state_dict()})
    trainer = TokenizerTrainer(network, perceptual(0.0), frozen=CODES)
    optim = wrapper(trainer)
    before = copy.deepcopy(network.state_dict())
    logs = trainer.train_step(images(), optim)
    assert not logs.keys() & {"loss_codebook", "loss_commit", "loss_entropy"}
    for _ in range(2):
        trainer.train_step(images(), optim)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    assert any(".extra." in name for name in changed)
    assert network.fingerprint() == first.fingerprint()


@pytest.mark.parametrize("kind", ["stylegan", "patchgan"])
def test_both_players_take_their_own_steps(kind: str) -> None:
    options = {"adversarial": "hinge", "adaptive": True, "discriminator_factor": 0.5, "penalty": 0.0}
    critic = PatchDiscriminator(ndf=4, n_layers=1)
    if kind == "stylegan":
        critic, options = StyleDiscriminator(16, channels={4: 8, 8: 4, 16: 4}), {"penalty_every": 2}
    trainer = TokenizerTrainer(tokenizer(), perceptual(), discriminator=critic, **options)
    optim = wrapper(trainer, "network", "discriminator")
    before = copy.deepcopy(trainer.state_dict())
    logs = [trainer.train_step(images(), optim) for _ in range(2)]
    assert ("loss_penalty" in logs[0]) == (kind == "stylegan") and "loss_penalty" not in logs[1]
    assert {"loss_adversarial", "loss_discriminator", "adversarial_weight"} <= logs[0].keys()
    moved = {name.split(".")[0] for name, p in trainer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"network", "discriminator"}
    assert all(p.requires_grad for p in trainer.discriminator.parameters())


def test_the_adversarial_loss_waits_but_the_discriminator_does_not() -> None:
    critic = StyleDiscriminator(16, channels={4: 8, 8: 4, 16: 4})
    trainer = TokenizerTrainer(tokenizer(), discriminator=critic, adversarial_start=1, adversarial_ramp=1, penalty=0.0)
    optim = wrapper(trainer, "network", "discriminator")
    start = copy.deepcopy(critic.state_dict())
    logs = [trainer.train_step(images(), optim) for _ in range(3)]
    shares = [(log["loss_adversarial"] / (log["adversarial_weight"])).item() for log in logs]
    assert shares[0] == 0 and 0 < shares[1] < shares[2]
    assert not torch.equal(critic.stem.weight, start["stem.weight"])


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_transformers_learn_codes(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 1, "num_heads": 2}
    network = (
        ARTransformer(8, 2, 16, **sizes, null_class=True) if kind == "ar" else MaskedTransformer(8, 2, 16, **sizes)
    )
    trainer = TransformerTrainer(network, label_drop=0.1)
    batch = {"codes": (torch.arange(16) % 4).view(1, 4, 4).expand(8, 4, 4), "label": torch.arange(8) % 2}
    optim = wrapper(trainer)
    logs = [trainer.train_step(batch, optim) for _ in range(40)]
    assert logs[-1]["loss_codes"] < logs[0]["loss_codes"] - 0.2
    first, second = trainer.eval().val_step(batch), trainer.val_step(batch)
    assert torch.equal(first["nll"], second["nll"]) and first["nll"].shape == (8, 16)
    assert first["mask"].all() == (kind == "ar")


def test_hidden_labels_and_smoothing_reach_the_loss() -> None:
    torch.manual_seed(0)
    network = ARTransformer(8, 2, 16, dim=16, depth=1, num_heads=2, null_class=True)
    nn.init.normal_(network.tokens.weight)
    batch = {"codes": torch.randint(8, (4, 4, 4)), "label": torch.arange(4) % 2}
    without = {**batch, "label": torch.full((4,), network.null_label)}
    plain = TransformerTrainer(network).eval()
    hidden = TransformerTrainer(network, label_drop=1.0).eval()
    values = [t.losses(b)["loss_codes"].item() for t, b in ((hidden, batch), (plain, without), (plain, batch))]
    assert values[0] == values[1] != values[2]
    masked = MaskedTransformer(8, 2, 16, dim=16, depth=1, num_heads=2)
    nn.init.normal_(masked.tokens.weight)
    found = []
    for smoothing in (0.0, 0.3):
        torch.manual_seed(1)
        found.append(TransformerTrainer(masked, smoothing=smoothing).eval().losses(batch)["loss_codes"].item())
    assert found[0] != pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("loss", ["l1", "l1 and perceptual"])
def test_the_adaptive_weight_compares_with_all_of_the_reconstruction_loss(loss: str) -> None:
    """Of the last layer's gradients: those of L1, and of the perceptual term where there is one."""
    torch.manual_seed(0)
    taps = perceptual() if loss != "l1" else None
    critic = StyleDiscriminator(16, channels={4: 8, 8: 4, 16: 4})
    options = {"discriminator": critic, "adversarial_weight": 0.3, "adaptive": True, "penalty": 0.0}
    trainer = TokenizerTrainer(tokenizer(), taps, perceptual_weight=2.0, **options).train()
    found = trainer.losses(images())
    image, last = images()["image"], trainer.network.decoder.last_layer
    made = trainer.network(image).reconstruction
    terms = [(made - image).abs().mean()] + ([2.0 * taps(made, image)[0]] if taps else [])
    towards, against = (
        torch.autograd.grad(value, last, retain_graph=True)[0].norm()
        for value in (sum(terms), nn.functional.softplus(-critic(made)).mean())
    )
    assert found["adversarial_weight"].item() == pytest.approx(0.3 * (towards / (against + 1e-4)).item(), rel=1e-4)


def test_the_low_layers_have_their_own_weight() -> None:
    """`alpha` of the loss is of the semantic group, 1 - alpha of the low one, perceptual_weight of both."""
    for alpha in (0.25, 0.0):
        trainer = TokenizerTrainer(tokenizer(), perceptual(alpha), perceptual_weight=3.0).eval()
        found = trainer.losses(images())
        expected = 3 * (alpha * found["layer_semantic"] + (1 - alpha) * found["layer_low"])
        assert found["loss_perceptual"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert found["layer_low"] > 0 and found["layer_low"] != found["layer_semantic"]


def test_masks_of_evaluation_are_drawn_from_their_seed() -> None:
    torch.manual_seed(0)
    network = MaskedTransformer(8, 2, 16, dim=16, depth=1, num_heads=2)
    batch = {"codes": torch.randint(8, (4, 4, 4)), "label": torch.arange(4) % 2}
    masks = []
    for seed in (0, 0, 5):
        masks.append(TransformerTrainer(network, mask_seed=seed).eval().val_step(batch)["mask"])
        torch.rand(3)  # not torch's own numbers, which go on
    generator = torch.Generator().manual_seed(5)
    ratio, score = torch.rand(4, generator=generator), torch.rand(4, 16, generator=generator)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(masks[2], training_mask(ratio, score))


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_processes_draw_the_rows_of_the_samples_that_they_hold(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process r of W holds samples r, r + W, ...: masks and dropped labels of these, as one process would draw them."""
    sizes = {"dim": 16, "depth": 1, "num_heads": 2}
    network = (
        ARTransformer(8, 2, 16, **sizes, null_class=True) if kind == "ar" else MaskedTransformer(8, 2, 16, **sizes)
    )
    trainer = TransformerTrainer(network, label_drop=0.5)
    batch = {"codes": torch.randint(8, (6, 4, 4)), "label": torch.arange(6) % 2}

    def given(rank: int, processes: int) -> list[Tensor]:
        """What the network is asked, besides codes."""
        seen: list[Tensor] = []
        monkeypatch.setattr(randomness, "get_dist_info", lambda: (rank, processes))
        hook = network.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[1:]))
        torch.manual_seed(7)
        trainer.losses({name: value[rank::processes] for name, value in batch.items()})
        hook.remove()
        return seen

    whole, parts = given(0, 1), [given(rank, 3) for rank in range(3)]
    for place, value in enumerate(whole):
        for rank in range(3):
            assert torch.equal(parts[rank][place], value[rank::3])
    assert (whole[-1] == network.null_label).any() and (whole[-1] != network.null_label).any()


def test_a_lazy_penalty_costs_as_much_on_average() -> None:
    critic = StyleDiscriminator(16, channels={4: 8, 8: 4, 16: 4})
    costs = []
    for every in (1, 4):
        trainer = TokenizerTrainer(tokenizer(), discriminator=critic, penalty=3.0, penalty_every=every)
        costs.append(trainer.discriminator_losses(images())["loss_penalty"].item())
    expected = 3.0 * gradient_penalty(critic, images()["image"]).item()
    assert costs == pytest.approx([expected, 4 * expected], rel=1e-4)


def test_codes_come_from_the_batch_or_a_tokenizer() -> None:
    network = ARTransformer(16, 1, 64, 8, 1, 1)
    with pytest.raises(KeyError, match="no 'codes'"):
        TransformerTrainer(network).losses(images())
    trainer = TransformerTrainer(network, tokenizer())
    trainer.freeze()
    assert torch.equal(trainer.codes(images()), trainer.tokenizer.encode(images()["image"]).flatten(1))
    trainer.train().losses(images())["loss_codes"].backward()
    assert all(p.grad is None for p in trainer.tokenizer.parameters()) and not trainer.tokenizer.training
    with pytest.raises(ValueError, match="null_class=True"):
        TransformerTrainer(network, label_drop=0.1)


class Pictures(torch.utils.data.Dataset):
    """Four pictures with noise as augmentation; counts how often one is read."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.reads = noise, []

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        self.reads.append(index)
        image = images()["image"][index]
        return {"image": image + self.noise * torch.randn_like(image), "label": index % 2}


def spread_tokenizer() -> nn.Module:
    """Codes that lie among the features, so that more than one is in use."""
    model = tokenizer()
    nn.init.normal_(model.quantizer.embedding.weight, 0.0, 1.0)
    return model


def test_cached_codes_are_those_of_the_images(tmp_path) -> None:
    model, data = spread_tokenizer(), Pictures()
    trainer = TransformerTrainer(ARTransformer(16, 2, 64, 8, 1, 1), model, CodeCache(tmp_path / "codes", batch_size=3))
    before = torch.get_rng_state()
    cached = trainer.training_data(data)
    assert torch.equal(torch.get_rng_state(), before)
    read = len(data.reads)
    expected = model.encode(images()["image"])
    assert len(expected.unique()) > 2
    for index in range(4):
        assert torch.equal(cached[index]["codes"], expected[index]) and cached[index]["label"] == index % 2
    assert len(data.reads) == read and len(cached) == 4
    trainer.training_data(data)
    assert len(data.reads) == read + 1, "a filled cache reads the first image only, to compare"
    batch = torch.utils.data.default_collate([cached[i] for i in range(4)])
    assert trainer.losses(batch)["loss_codes"].isfinite()


def test_codes_of_another_tokenizer_or_data_set_are_refused(tmp_path) -> None:
    cache, model = CodeCache(tmp_path / "codes"), spread_tokenizer()
    cache.fill(Pictures(), model)
    model.decoder.stem.weight.data += 1
    cache.fill(Pictures(), model)
    with pytest.raises(StaleCacheError, match="noise"):
        cache.fill(Pictures(noise=0.5), model)
    model.encoder.stem.weight.data += 1
    with pytest.raises(StaleCacheError, match="tokenizer"):
        cache.fill(Pictures(), model)


class Turned:
    """A transform that the first picture does not show."""

    def __repr__(self) -> str:
        return "Turned()"


def test_another_transform_is_refused(tmp_path) -> None:
    cache, model, data = CodeCache(tmp_path / "codes"), spread_tokenizer(), Pictures()
    cache.fill(data, model)
    data.transform = Turned()
    with pytest.raises(StaleCacheError, match="transform"):
        cache.fill(data, model)


def test_codes_are_kept_as_evaluation_has_them_and_in_full(tmp_path) -> None:
    torch.manual_seed(0)
    model = conv_tokenizer(32, (1, 1), 1, codebook_size=300, z_dim=8)
    nn.init.normal_(model.quantizer.embedding.weight)
    model.quant_conv = nn.Dropout(0.5)
    cached = CodeCache(tmp_path / "codes").fill(Pictures(), model.train())
    expected = model.eval().encode(images()["image"])
    assert expected.max() > 255
    assert all(torch.equal(cached[i]["codes"], expected[i]) for i in range(4))


def test_codes_beyond_two_bytes_are_kept(tmp_path) -> None:
    torch.manual_seed(0)
    model = conv_tokenizer(32, (1, 1), 1, codebook_size=40000, z_dim=8)
    nn.init.normal_(model.quantizer.embedding.weight)
    cached = CodeCache(tmp_path / "codes").fill(Pictures(), model)
    expected = model.encode(images()["image"])
    assert expected.max() >= 1 << 15
    assert all(torch.equal(cached[i]["codes"], expected[i]) for i in range(4))


class Noise(Pictures):
    """Nothing but augmentation: images differ as far as their draws do."""

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.randn(3, 16, 16), "label": 0}


def test_images_are_augmented_by_draws_of_their_own(tmp_path) -> None:
    cached = CodeCache(tmp_path / "codes").fill(Noise(), spread_tokenizer())
    assert len({tuple(cached[i]["codes"].flatten().tolist()) for i in range(4)}) == 4


def test_every_tokenizer_may_have_a_folder_of_its_own(tmp_path) -> None:
    cache, model = CodeCache(tmp_path / "codes", per_tokenizer=True), spread_tokenizer()
    cache.fill(Pictures(), model)
    model.quantizer.embedding.weight.data = model.quantizer.embedding.weight.data.flip(0)
    cached = cache.fill(Pictures(), model)
    assert torch.equal(cached[0]["codes"], model.encode(images()["image"])[0])
    assert len(list((tmp_path / "codes").iterdir())) == 2


class Files(Pictures):
    """Pictures of files, of which the cache remembers the list."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def describe(self, index: int) -> str:
        return self.names[index]


def test_other_files_of_one_look_are_refused(tmp_path) -> None:
    for name in "abcde":
        (tmp_path / name).write_text(name)
    cache, model = CodeCache(tmp_path / "codes"), spread_tokenizer()
    cache.fill(Files([str(tmp_path / name) for name in "abcd"]), model)
    with pytest.raises(StaleCacheError, match="files"):
        cache.fill(Files([str(tmp_path / name) for name in "abce"]), model)


@pytest.mark.parametrize("storage", ["zip", "shards"])
def test_codes_of_packed_images_remember_archive_and_transform(storage, tmp_path) -> None:
    """ImageNet reads through one of three readers: its transform and the packed file count like those of folders."""
    root, pixels = tmp_path / "data", np.full((16, 16, 3), 90, np.uint8)
    for name in ("n01440764/a.png", "n01440764/b.png"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "train" / name)
    run_task(None, {"zip": "image_zip", "shards": "image_shards"}[storage], [f"root={root}", f"output={root}"])

    def data(flip: float) -> ImageNet:
        return ImageNet(root, "train", TokenizerTransform(16, "centre", flip=flip), storage, num_classes=1)

    cache, model = CodeCache(tmp_path / "codes"), spread_tokenizer()
    cached = cache.fill(data(0.5), model)
    assert len(cached) == 2 and cached[1]["codes"].shape == cached[0]["codes"].shape
    with pytest.raises(StaleCacheError, match="transform"):  # images of one colour look the same turned around
        cache.fill(data(0.0), model)
    packed = next(root.glob("train*.zip" if storage == "zip" else "train*.tar"))
    os.utime(packed, ns=(1, 1))
    with pytest.raises(StaleCacheError, match="files"):
        cache.fill(data(0.5), model)


def test_views_are_augmented_apart_and_drawn(tmp_path) -> None:
    cached = CodeCache(tmp_path / "codes", views=3).fill(Pictures(noise=1.0), spread_tokenizer())
    torch.manual_seed(0)
    seen = {tuple(cached[0]["codes"].flatten().tolist()) for _ in range(30)}
    assert len(seen) == 3
    again = CodeCache(tmp_path / "again", views=3).fill(Pictures(noise=1.0), spread_tokenizer())
    assert tuple(again[0]["codes"].flatten().tolist()) in seen
    with pytest.raises(ValueError, match="at least one view"):
        CodeCache(tmp_path, views=0)
