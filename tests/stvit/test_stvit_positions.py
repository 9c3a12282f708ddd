"""Positions of semantic tokens."""

from __future__ import annotations

import pytest
import torch
from timm.models import group_parameters
from tiny_vit import tiny
from torch import nn

from stvit.models import SemanticTokenGenerator

POSITIONS = {
    "learned": {"reducer.position"},
    "conv": {"reducer.conv_pos.weight", "reducer.conv_pos.bias"},
    "relative": {"tail.0.attn.relative_position_bias_table"},
}


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_are_added_to_the_model_without(position: str) -> None:
    plain, model = tiny(token_grid=(2, 3)).eval(), tiny(token_grid=(2, 3), token_position=position).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == POSITIONS[position] and not unexpected
    images = torch.randn(2, 3, 32, 32)
    expected = plain(images)
    assert (model(images) - expected).abs().max() > 1e-5
    for name in POSITIONS[position]:
        nn.init.zeros_(model.get_parameter(name))
    torch.testing.assert_close(model(images), expected)


def test_learned_positions_are_one_vector_per_centre() -> None:
    generator = SemanticTokenGenerator(4, 2, grid=(2, 3), pool="avg", position="learned")
    flat = torch.ones(1, 24, 4)  # all centres are alike but for their position
    torch.testing.assert_close(generator.centres(flat, (4, 6)), 1 + generator.position)
    assert generator.position.shape == (1, 6, 4) and generator.position.unique(dim=1).shape[1] == 6


def test_convolutional_positions_look_around_on_the_grid_of_centres() -> None:
    generator = SemanticTokenGenerator(1, 1, grid=(2, 3), pool="avg", position="conv")
    nn.init.zeros_(generator.conv_pos.weight)
    nn.init.zeros_(generator.conv_pos.bias)
    generator.conv_pos.weight.data[0, 0, 1, 0] = 1  # the left neighbour, nothing beyond the edge
    x = torch.tensor([1.0, 2, 3, 10, 20, 30]).reshape(1, 6, 1)
    assert generator.centres(x, (2, 3)).flatten().tolist() == [1, 3, 5, 10, 30, 50]


def test_relative_positions_make_the_order_of_tokens_matter() -> None:
    tokens, order = torch.randn(1, 4, 32), torch.tensor([1, 0, 2, 3])
    for position, alike in (("learned", True), ("relative", False)):
        layer = tiny(token_position=position).eval().tail[0]
        if position == "relative":
            nn.init.normal_(layer.attn.relative_position_bias_table)
        assert torch.allclose(layer(tokens[:, order]), layer(tokens)[:, order], atol=1e-6) is alike


def test_positions_are_not_decayed_and_learn_with_the_first_generation_layer() -> None:
    for position, kept in (("none", set()), ("learned", {"reducer.position"}), ("relative", POSITIONS["relative"])):
        model = tiny(token_position=position)
        matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
        assert matrices & model.no_weight_decay() == {"pos_embed"} | kept
    for position in ("learned", "conv"):
        model = tiny(token_position=position)
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        assert {groups[name] for name in POSITIONS[position]} == {groups["reducer.layers.0.norm1.weight"]}


def test_the_generator_knows_positions_of_centres_only() -> None:
    with pytest.raises(ValueError, match="'none', 'learned' or 'conv'"):
        SemanticTokenGenerator(8, 2, position="relative")
