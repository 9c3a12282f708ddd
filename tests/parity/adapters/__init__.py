"""One module per paper: `run(case) -> {output name: tensor}` for any configuration of the pieces it knows.

A piece that an adapter does not know raises `tests.parity.cases.UnknownPiece`. An adapter may also have
`inventory(name, content)` for JSON files that are no cases (key lists, parameter counts): it returns None when ours
agrees, raises AssertionError where it does not and `UnknownPiece` when it does not know the file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Case, UnknownPiece

Outputs = dict[str, Tensor]


def run_from(*modules: str, eval_gradients: bool = True) -> Callable[[Case], Outputs]:
    """`run` of an adapter whose pieces are in the tables `PIECES` of these modules of this folder, the paper's first.

    A table maps a piece to the function that builds it, loads the case's weights and feeds its inputs. Without
    `eval_gradients` only cases in training mode are run with gradients, as in use.
    """

    def run(case: Case) -> Outputs:
        for module in modules:
            piece = importlib.import_module(f"{__name__}.{module}").PIECES.get(case.piece)
            if piece is not None:
                with torch.set_grad_enabled(eval_gradients or case.training):
                    return piece(case)
        raise UnknownPiece(f"the adapter of {modules[0]} knows no piece {case.piece!r}")

    return run
