"""A record of a model takes the input that it was made of; `tests/test_model_contract.py` has the other exports."""

from __future__ import annotations

import pytest

from tests.exported import check
from tests.stvit.subjects import SUBJECTS


@pytest.mark.parametrize(("made", "asked"), [(2, 2), (2, 1), (1, 3)])
def test_a_record_takes_the_input_that_it_was_made_of(made: int, asked: int, tmp_path) -> None:
    """And batches of one, from which and to which a record is often made."""
    subject = SUBJECTS["stvit_swin"]
    check("trace", subject.made().eval(), subject.inputs, tmp_path, made=made, asked=asked)
