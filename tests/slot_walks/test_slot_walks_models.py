"""Backbones, slots and decoders: published sizes and costs, shapes of any kind, and where gradients and noise go."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from core.profile.measure import count_macs
from slot_walks import SlotTrainer, WalkLoss
from slot_walks.models import (
    BroadcastDecoder,
    DinoViT,
    FilterBank,
    MLPDecoder,
    SlotAttention,
    SlotEncoder,
    SlotInit,
    SlotWalker,
    TimmBackbone,
    TransformerDecoder,
    build_decoder,
    dino_vits8,
    position_affinity,
    position_table,
    resize_positions,
)

SIGNALS = ("walk", "mlp", "broadcast", "transformer", "walk+mlp")


def tiny_vit(**options: object) -> DinoViT:
    return DinoViT(**(dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3) | options))


def tiny(signal: str = "walk", **options: object) -> SlotWalker:
    encoder = {key: options.pop(key) for key in ("init", "num_slots", "dim", "truncate") if key in options}
    decoder = {} if signal == "walk" else dict(decoder_width=16, decoder_depth=2)
    return SlotWalker(
        tiny_vit(), SlotEncoder(**(dict(in_dim=24, dim=24, num_slots=4) | encoder)), signal, **decoder | options
    )


def parameters(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


# ------------------------------------------------------------------ published sizes


def published(slots: int, size: int) -> SlotTrainer:
    with torch.device("meta"):
        network = SlotWalker(dino_vits8(), SlotEncoder(384, 384, slots), feature_grid=size // 8)
    return SlotTrainer(network)


def test_the_published_model_has_its_parameters() -> None:
    network = published(7, 224).network
    assert parameters(network, trained=True) == 1_924_608
    assert parameters(network.backbone) == 21_670_272
    assert parameters(network) == 23_594_880
    assert parameters(network.encoder.project) == 296_448
    assert parameters(network.encoder.init) == 768
    assert parameters(network.encoder.attention) == 1_627_392


@pytest.mark.parametrize(
    ("size", "slots", "backbone", "encoder", "walk", "total"),
    [
        (128, 2, 6.085, 0.160, 0.025, 6.270),
        (224, 2, 22.405, 0.474, 0.238, 23.117),
        (224, 4, 22.405, 0.486, 0.240, 23.131),
        (224, 7, 22.405, 0.503, 0.242, 23.151),
        (224, 11, 22.405, 0.526, 0.246, 23.178),
        (320, 4, 57.736, 0.974, 0.996, 59.706),
        (320, 7, 57.736, 0.997, 1.005, 59.738),
    ],
)
def test_the_published_model_has_its_cost(
    size: int, slots: int, backbone: float, encoder: float, walk: float, total: float
) -> None:
    figures = published(slots, size).table_figures(None)
    expected = {"backbone": backbone, "slots": encoder, "walk": walk, "training": total}
    for part, giga in expected.items():
        # figures are published with three decimals
        assert figures[f"macs_{part}"] / 1e9 == pytest.approx(giga, rel=0.01, abs=5e-4), part


def test_decoders_cost_what_walks_save() -> None:
    def cost(kind: str, width: int | None, depth: int | None) -> tuple[int, float]:
        with torch.device("meta"):
            decoder = build_decoder(kind, 384, 384, 28, width, depth)
            slots, features = torch.empty(1, 7, 384), torch.empty(1, 784, 384)
        return parameters(decoder), count_macs(decoder, (slots, (28, 28), features)).total / 1e9

    count, macs = cost("mlp", 1024, 3)
    assert macs == pytest.approx(15.8, rel=0.01)
    assert count - 784 * 384 == pytest.approx(2.887e6, rel=0.01), "the position table is the rest of 3.19 M"
    assert cost("mlp", 2048, 3)[1] == pytest.approx(54.7, rel=0.01)
    assert cost("transformer", 384, 4)[1] == pytest.approx(8.4 + 2 * 384**2 * 784 / 1e9, rel=0.01)
    assert macs / (published(7, 224).table_figures(None)["macs_walk"] / 1e9) == pytest.approx(65, rel=0.02)


# ------------------------------------------------------------------ backbones


def test_positions_are_resized_as_dino_does() -> None:
    table = torch.randn(1, 17, 8)
    assert resize_positions(table, (4, 4)) is table
    for grid in ((6, 6), (3, 3), (4, 6), (2, 8)):
        resized = resize_positions(table, grid)
        maps = table[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
        factors = ((grid[0] + 0.1) / 4, (grid[1] + 0.1) / 4)
        wanted = nn.functional.interpolate(maps, scale_factor=factors, mode="bicubic", align_corners=False)
        assert wanted.shape[-2:] == grid
        assert torch.equal(resized[:, 1:], wanted.permute(0, 2, 3, 1).flatten(1, 2))
        by_size = nn.functional.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
        assert not torch.allclose(wanted, by_size, atol=1e-4), "the nudge moves the sampling points"
    with pytest.raises(ValueError, match="no square grid"):
        resize_positions(torch.zeros(1, 13, 8), (3, 4))


def test_the_table_is_resized_once_per_grid_and_again_when_weights_change() -> None:
    vit = tiny_vit().requires_grad_(False)
    first = vit.positions((6, 5))
    assert vit.positions((6, 5)) is first
    vit.load_state_dict({name: value + 1 for name, value in vit.state_dict().items()})
    assert torch.allclose(vit.positions((6, 5)), first + 1, atol=1e-5)
    assert vit.double().positions((6, 5)).dtype == torch.float64


def test_pictures_of_any_shape_keep_rows_and_columns_apart() -> None:
    vit = tiny_vit(depth=1)
    image = torch.randn(2, 3, 40, 64)
    assert vit.grid(image) == (5, 8)
    assert vit(image).shape == (2, 40, 24)
    # Without attention between tokens a patch's feature depends on its pixels and place alone.
    nn.init.zeros_(vit.blocks[0].attn.proj.weight)
    changed = image.clone()
    changed[..., 8:16, 24:32] += 1
    differs = (vit(image) != vit(changed)).any(dim=2)[0].reshape(5, 8)
    assert differs.nonzero().tolist() == [[1, 3]]


def test_layers_facets_and_the_final_norm() -> None:
    vit, image = tiny_vit().eval(), torch.randn(1, 3, 32, 32)
    state = vit.state_dict()

    def variant(**options: object) -> Tensor:
        other = tiny_vit(**options).eval()
        other.load_state_dict(state)
        return other(image)

    with torch.no_grad():
        tokens = vit.tokens(image)
        assert torch.equal(vit(image), tokens[:, 1:])
        assert torch.equal(variant(final_norm=True), vit.norm(tokens)[:, 1:])
        first = vit.blocks[0](vit.embed(image))
        assert torch.equal(variant(layer=1), first[:, 1:])
        packed = vit.blocks[1].attn.qkv(vit.blocks[1].norm1(first))[:, 1:]
        for index, facet in enumerate(("query", "key", "value")):
            assert torch.equal(variant(facet=facet), packed[..., 24 * index : 24 * (index + 1)])
    for options, message in (
        (dict(layer=3), "layers 1 to 2"),
        (dict(facet="keys"), "unknown facet"),
        (dict(facet="key", final_norm=True), "final_norm belongs to tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_vit(**options)


def test_dinos_vit_equals_timms() -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    ours = DinoViT(patch_size=16, embed_dim=192, num_heads=3, final_norm=True).eval()
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith(("head", "fc_norm"))}
    ours.load_state_dict(state)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = theirs.forward_features(image)
        assert torch.allclose(ours.tokens(image), wanted, atol=1e-5)
        wrapped = TimmBackbone("vit_tiny_patch16_224", final_norm=True).eval()
        wrapped.model.load_state_dict(theirs.state_dict())
        assert torch.allclose(wrapped(image), wanted[:, 1:], atol=1e-5)


def test_any_vit_of_timm_gives_features_on_a_rectangle() -> None:
    image = torch.randn(1, 3, 32, 48)
    for name, width in (("test_vit2", 64), ("vit_tiny_patch16_dinov3_qkvb", 192)):
        for options in (dict(layer=2), dict(final_norm=True), dict(facet="key")):
            backbone = TimmBackbone(name, **options).eval()
            assert backbone.grid(image) == (2, 3) and backbone.dim == width, "class token and registers are left out"
            with torch.no_grad():
                assert backbone(image).shape == (1, 6, width)
    with torch.no_grad():
        assert not backbone.model.blocks[-1].attn._forward_pre_hooks, "looking at keys leaves nothing behind"
        before = TimmBackbone("test_vit2", layer=7).eval()
        key = TimmBackbone("test_vit2", layer=8, facet="key").eval()
        before.load_state_dict(key.state_dict())
        last = key.model.blocks[7]
        assert torch.allclose(key(image), last.attn.qkv(last.norm1(before(image)))[..., 64:128], atol=1e-5)
    with pytest.raises(ValueError, match="no ViT"):
        TimmBackbone("resnet18")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_local_dino_file_is_loaded(tmp_path: object, suffix: str) -> None:
    source, file = tiny_vit(), tmp_path / f"dino{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(source.state_dict(), file)
    else:  # DINO's full checkpoint
        state = {f"module.backbone.{name}": value for name, value in source.state_dict().items()}
        torch.save({"teacher": state | {"module.head.mlp.0.weight": torch.zeros(2)}, "epoch": 100}, file)
    loaded = tiny_vit(weights=file)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in source.state_dict().items())
    with torch.device("meta"):
        tiny_vit(weights=file)  # counting needs no file
    with pytest.raises(ValueError, match=r"does not fit DinoViT: missing \['blocks.2"):
        tiny_vit(weights=file, depth=3)
    with pytest.raises(FileNotFoundError, match=r"set backbone.weights"):
        tiny_vit(weights=tmp_path / "nothing.pth")


def test_filter_bank_answers_colour_brightness_and_texture() -> None:
    bank = FilterBank()
    flat = torch.full((1, 3, 16, 16), 0.5)
    grey = bank.filters(flat)[0, :, 8, 8]
    assert torch.allclose(grey, torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0.4]), atol=1e-6)
    red = flat.clone()
    red[:, 0] = 1.0
    answer = bank.filters(red)[0, :, 8, 8]
    assert torch.allclose(answer[:4], torch.tensor([0.5, 0, 0.5, 0]), atol=1e-5)
    stripes = flat + 0.3 * torch.sin(torch.arange(16.0) * 1.5)  # along the rows
    along, down, both = bank.filters(stripes)[0, 5:8, 8, 8]
    assert along > 0.05 and abs(down) < 1e-6 and abs(both) < 1e-6

    assert bank(torch.rand(2, 3, 24, 40)).shape == (2, 60, 32) and bank.grid(torch.rand(2, 3, 24, 40)) == (6, 10)
    assert torch.allclose(bank.basis.T @ bank.basis, torch.eye(9), atol=1e-6), "lengths and angles are kept"
    assert torch.equal(FilterBank().basis, bank.basis) and not bank.state_dict()
    assert torch.allclose(FilterBank(scale=0.96)(red), bank(red) / 2)
    assert torch.allclose(bank(flat).norm(dim=-1), torch.tensor(0.4 / 0.48)), "the map keeps lengths"


# ------------------------------------------------------------------ positions


def test_position_table_encodes_columns_first() -> None:
    table = position_table(8, 3, 5)
    assert torch.equal(table[:4, 0], table[:4, 2]) and torch.equal(table[4:, :, 0], table[4:, :, 4])
    assert torch.allclose(table[:4, 0, 2], torch.tensor([np.sin(2.0), np.cos(2.0), np.sin(0.02), np.cos(0.02)]).float())
    near = position_affinity(8, (3, 5), 0.1)
    assert torch.allclose(near.sum(dim=1), torch.ones(15)) and near.argmax(dim=1).tolist() == list(range(15))
    with pytest.raises(ValueError, match="divisible by 4"):
        position_table(10, 3, 3)


# ------------------------------------------------------------------ slots


def test_noise_repeats_from_a_generator_and_scales_with_sigma() -> None:
    start = SlotInit(3, 8)
    draws = [start(2, noise=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws) and not torch.equal(draws[0], start(2, noise=torch.Generator().manual_seed(6)))
    noise = torch.randn(2, 3, 8)
    assert torch.allclose(start(2, noise=noise), start.mu + start.log_sigma.exp() * noise)
    assert start.eval()(2).ne(start(2)).any(), "the released model samples in evaluation, too"
    bound = (6 / 16) ** 0.5
    assert start.mu.abs().max() <= bound and start.log_sigma.abs().max() <= bound
    with pytest.raises(ValueError, match="wanted \\(2, 4, 8\\)"):
        start(2, 4, noise)


@pytest.mark.parametrize("kind", ["learned", "gaussian_mean"])
def test_starts_that_are_not_sampled(kind: str) -> None:
    start = SlotInit(5, 8, kind)
    assert torch.equal(start(2), start(2)) and not start.samples
    assert torch.equal(start(2, 3), start(2)[:, :3])
    with pytest.raises(ValueError, match="has 5 vectors"):
        start(2, 6)


@pytest.mark.parametrize("heads", [1, 4])
def test_slots_compete_and_any_number_works(heads: int) -> None:
    attention = SlotAttention(16, in_dim=12, num_heads=heads, num_iterations=2)
    for slots in (1, 2, 7):
        output = attention(torch.randn(2, 9, 12), torch.randn(2, slots, 16))
        assert output.slots.shape == (2, slots, 16)
        assert torch.allclose(output.attention.sum(dim=2), torch.ones(2, slots))
        assert torch.allclose(output.assignment.sum(dim=2), torch.ones(2, 9)), "one softmax over heads and slots"


def test_slots_are_equivariant_and_tokens_are_a_set() -> None:
    attention, inputs, start = SlotAttention(16), torch.randn(1, 9, 16), torch.randn(1, 4, 16)
    slots = attention(inputs, start).slots
    turn, shuffle = torch.randperm(4), torch.randperm(9)
    assert torch.allclose(attention(inputs, start[:, turn]).slots, slots[:, turn], atol=1e-5)
    assert torch.allclose(attention(inputs[:, shuffle], start).slots, slots, atol=1e-5)


def test_the_recurrent_cell_is_torchs() -> None:
    cell = SlotAttention(16).gru
    update, state = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    wanted = nn.GRUCell.forward(cell, update.reshape(10, 16), state.reshape(10, 16)).reshape(2, 5, 16)
    assert torch.allclose(cell(update, state), wanted, atol=1e-6)


def test_where_truncation_stops_gradients() -> None:
    def gradients(truncate: str) -> tuple[Tensor | None, Tensor]:
        torch.manual_seed(0)
        attention = SlotAttention(8, truncate=truncate)
        start = torch.randn(1, 3, 8, requires_grad=True)
        slots = attention(torch.randn(1, 6, 8), start).slots
        slots.square().sum().backward()
        return start.grad, slots

    (full, same), (bi_level, also), (fixed, too) = (gradients(t) for t in ("none", "bi_level", "fixed_point"))
    assert torch.equal(same, too) and torch.allclose(same, also, atol=1e-6), "values do not change"
    assert fixed is None
    assert bi_level.abs().sum() > 0 and not torch.allclose(bi_level, full)
    encoder = SlotEncoder(8, 8, 3, truncate="fixed_point")
    assert not any(p.requires_grad for p in encoder.init.parameters()), "what gets no gradient waits for none"


def test_start_values_follow_the_released_code() -> None:
    attention = SlotAttention(32, mlp_hidden=48)
    recurrence = attention.gru.weight_hh
    assert torch.allclose(recurrence.T @ recurrence, torch.eye(32), atol=1e-5)
    bound = (6 / 64) ** 0.5  # not that of the joined matrix
    assert bound * 0.9 < attention.to_kv.weight.abs().max() <= bound
    assert (6 / 32) ** 0.5 * 0.9 < attention.mlp[0].weight.abs().max() <= (6 / 32) ** 0.5
    assert all((b == 0).all() for b in (attention.mlp[0].bias, attention.gru.bias_ih, attention.gru.bias_hh))


# ------------------------------------------------------------------ decoders and the whole


@pytest.mark.parametrize("kind", ["mlp", "broadcast", "transformer"])
def test_decoders_share_out_the_features(kind: str) -> None:
    decoder = build_decoder(kind, 12, 24, (4, 6), 16, 2)
    for grid in ((4, 6), (5, 3)):
        count = grid[0] * grid[1]
        decoded = decoder(torch.randn(2, 3, 12), grid, torch.randn(2, count, 24))
        assert decoded.features.shape == (2, count, 24) and decoded.masks.shape == (2, 3, count)
        assert torch.allclose(decoded.masks.sum(dim=1), torch.ones(2, count), atol=1e-6)
    with pytest.raises(ValueError, match="unknown decoder"):
        build_decoder("linear", 12, 24, 4)
    with pytest.raises(ValueError, match="no attention heads"):
        build_decoder("mlp", 12, 24, 4, heads=2)


@pytest.mark.parametrize("decoder", [MLPDecoder(8, 6, (3, 4), 16, 2), BroadcastDecoder(8, 6, 16, 2)])
def test_slots_are_mixed_by_their_shares_whatever_their_order(decoder: nn.Module) -> None:
    slots = torch.randn(1, 3, 8)
    features, masks = decoder(slots, (3, 4))
    turned, shares = decoder(slots[:, [2, 0, 1]], (3, 4))
    assert torch.allclose(turned, features, atol=1e-5) and torch.allclose(shares, masks[:, [2, 0, 1]], atol=1e-6)
    single = torch.stack([decoder(slots[:, k : k + 1], (3, 4)).features for k in range(3)], dim=1)
    assert torch.allclose((single * masks.unsqueeze(-1)).sum(dim=1), features, atol=1e-5)


def test_the_transformer_decoder_sees_earlier_patches_only() -> None:
    decoder = TransformerDecoder(8, 12, (3, 3), 16, 2).eval()
    slots, features = torch.randn(1, 2, 8), torch.randn(1, 9, 12)
    changed = features.clone()
    changed[:, 4] += 1
    before, after = (decoder(slots, (3, 3), f).features for f in (features, changed))
    differs = ~torch.isclose(before, after, atol=1e-6).all(dim=2)[0]
    assert differs.tolist() == [False] * 5 + [True] * 4
    features.requires_grad_()
    decoder(slots, (3, 3), features).features.sum().backward()
    assert features.grad is None, "the target is not moved towards its reconstruction"
    with pytest.raises(ValueError, match="teacher forced"):
        decoder(slots, (3, 3))


@pytest.mark.parametrize("signal", SIGNALS)
def test_one_key_swaps_the_signal_and_trains_every_parameter(signal: str) -> None:
    trainer = SlotTrainer(tiny(signal), WalkLoss()).train()
    terms = trainer.losses({"image": torch.randn(2, 3, 32, 48)})
    names = {name for name in terms if "loss" in name}
    walks = {"loss_wpw", "loss_pwp"} if "walk" in signal else set()
    assert names == walks | (set() if signal == "walk" else {"loss_reconstruction"})
    sum(terms[name] for name in names).backward()
    for name, parameter in trainer.named_parameters():
        if name.startswith("network.backbone."):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_the_backbone_stays_as_it_is() -> None:
    model = tiny().train()
    assert model.training and not any(module.training for module in model.backbone.modules())
    output = model(torch.randn(1, 3, 32, 32))
    assert not output.features.requires_grad and output.slots.requires_grad


def test_cached_features_give_what_pictures_give() -> None:
    model, noise = tiny("walk+transformer").eval(), torch.randn(2, 4, 24)
    image = torch.randn(2, 3, 32, 48)
    live = model(image, noise=noise)
    assert live.grid == (4, 6) and live.features.shape == (2, 24, 24)
    maps = live.features.reshape(2, 4, 6, 24)
    for cached in (model(features=maps, noise=noise), model(features=live.features, grid=(4, 6), noise=noise)):
        for name in ("slots", "attention", "assignment", "reconstruction"):
            assert torch.equal(getattr(cached, name), getattr(live, name)), name
    half = model(features=maps.bfloat16(), noise=noise)
    assert half.features.dtype == torch.float32 and torch.allclose(half.slots, live.slots, atol=0.1)
    with pytest.raises(ValueError, match="do not fill a grid"):
        model(features=live.features)
    with pytest.raises(ValueError, match="pictures or features"):
        model()
    without = SlotWalker(None, model.encoder)
    assert without(features=maps, num_slots=6).slots.shape == (2, 6, 24)
    with pytest.raises(ValueError, match="no backbone"):
        without(image)


def test_widths_that_do_not_fit_are_refused_or_projected() -> None:
    with pytest.raises(ValueError, match="slot_to_feature=linear"):
        tiny(dim=16)
    projected = tiny(dim=16, slot_to_feature="linear")
    output = projected(torch.randn(1, 3, 32, 32))
    assert output.slots.shape == (1, 4, 16) and output.whole.shape == (1, 4, 24)
    assert tiny("mlp", dim=16)(torch.randn(1, 3, 32, 32)).whole is None
    with pytest.raises(ValueError, match="encoder's in_dim=24"):
        SlotWalker(tiny_vit(), SlotEncoder(32, 24))
    for signal in ("walks", "mlp+broadcast", "walk+walk", ""):
        with pytest.raises(ValueError, match="use walk"):
            tiny(signal)


def test_bf16_stays_finite() -> None:
    model, image = tiny("walk+mlp"), 1e3 * torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(image, noise=torch.randn(2, 4, 24))
    assert all(torch.isfinite(value).all() for value in output if isinstance(value, Tensor))
    assert output.slots.dtype == torch.float32, "the recurrent state keeps its precision"
    output.slots.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.encoder.parameters())
