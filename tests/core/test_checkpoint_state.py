"""State dicts into models: the whole difference is told, and a model is never half loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.checkpoint import StateDiff, StateMismatch, diff_state, load_state


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))


def _same(model: nn.Module, before: dict) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def _copy(model: nn.Module) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_a_fitting_state_is_loaded_and_gives_an_empty_difference():
    model, other = _model(), _model()
    diff = load_state(model, other.state_dict())
    assert not diff and str(diff) == "no difference"
    assert _same(model, other.state_dict())


def test_everything_that_differs_is_told_and_nothing_is_loaded():
    model = _model()
    before = _copy(model)
    state = _copy(_model())
    state["0.weigth"] = state.pop("0.weight")
    state["2.weight"] = torch.zeros(5, 3)
    state["1.num_batches_tracked"] = torch.tensor(1.0)
    state["2.bias"] = 3
    with pytest.raises(StateMismatch) as caught:
        load_state(model, state)
    diff = caught.value.diff
    assert diff.missing == {"0.weight": "(3, 2) float32"}
    assert diff.unexpected == {"0.weigth": "(3, 2) float32"}
    assert diff.mismatched == {
        "2.weight": ("(4, 3) float32", "(5, 3) float32"),
        "1.num_batches_tracked": ("() int64", "() float32"),
        "2.bias": ("(4,) float32", "int"),
    }
    text = str(caught.value)
    assert "perhaps '0.weigth'?" in text and "nothing was loaded" in text
    assert "2.weight: the model has (4, 3) float32, the state has (5, 3) float32" in text
    assert _same(model, before)


def test_half_precision_weights_fit():
    model = _model()
    state = {k: v.half() if v.is_floating_point() else v for k, v in _model().state_dict().items()}
    assert not load_state(model, state)
    assert torch.equal(model[0].weight, state["0.weight"].float())


def test_long_lists_are_shortened_in_the_message_only():
    state = {f"extra.{i}": torch.zeros(1) for i in range(500)}
    with pytest.raises(StateMismatch) as caught:
        load_state(nn.ModuleList(nn.Linear(1, 1) for _ in range(50)), state)
    text = str(caught.value)
    assert "missing from the state (100):" in text and "... and 88 more" in text
    assert "unknown to the model (500):" in text and len(text.splitlines()) < 40
    assert len(caught.value.diff.missing) == 100 and len(caught.value.diff.unexpected) == 500


def test_non_strict_loads_what_fits_and_returns_the_rest():
    model = _model()
    before = _copy(model)
    other = _copy(_model())
    state = {"0.weight": other["0.weight"], "2.weight": torch.zeros(5, 3), "more": torch.zeros(1)}
    diff = load_state(model, state, strict=False)
    assert torch.equal(model[0].weight, other["0.weight"]) and torch.equal(model[2].weight, before["2.weight"])
    assert set(diff.unexpected) == {"more"} and set(diff.mismatched) == {"2.weight"} and "2.bias" in diff.missing


def test_a_state_of_something_else_is_an_error_even_when_not_strict():
    with pytest.raises(StateMismatch, match="no key of the state fits Sequential"):
        load_state(_model(), {"model.0.weight": torch.zeros(3, 2)}, strict=False)


def test_ignored_keys_may_differ_and_the_others_may_not():
    model = _model()
    state = _copy(_model())
    state["2.weight"] = torch.zeros(9, 3)
    del state["2.bias"]
    state["head.extra"] = torch.zeros(1)
    diff = load_state(model, state, ignore=["2.*", "head.*"])
    assert torch.equal(model[0].weight, state["0.weight"]) and set(diff.mismatched) == {"2.weight"}
    with pytest.raises(StateMismatch) as caught:
        load_state(model, state, ignore=["2.*"])
    assert set(caught.value.diff.unexpected) == {"head.extra"} and not caught.value.diff.mismatched


def test_a_failure_in_a_modules_own_loading_puts_everything_back():
    class Late(nn.Module):
        def get_extra_state(self) -> dict:
            return {"version": 1}

        def set_extra_state(self, state: object) -> None:
            if state != {"version": 1}:
                raise RuntimeError("unknown version")

    model = nn.Sequential(nn.Linear(2, 2), Late())
    before = _copy_with_extra(model)
    state = {**before, "0.weight": torch.full((2, 2), 7.0), "1._extra_state": {"version": 2}}
    with pytest.raises(RuntimeError, match="unknown version"):
        load_state(model, state)
    assert torch.equal(model[0].weight, before["0.weight"])


def _copy_with_extra(model: nn.Module) -> dict:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in model.state_dict().items()}


def test_comparison_needs_no_memory_on_meta():
    with torch.device("meta"):
        model = _model()
    assert diff_state(model, _model().state_dict()) == StateDiff()
    assert set(diff_state(model.state_dict(), {}).missing) == set(model.state_dict())
