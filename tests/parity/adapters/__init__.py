"""One module per paper: `run(case) -> {output name: tensor}` for any configuration of the pieces it knows.

A piece that an adapter does not know raises `tests.parity.cases.UnknownPiece`. An adapter may also have
`inventory(name, content)` for JSON files that are no cases (key lists, parameter counts): it returns None when ours
agrees, raises AssertionError where it does not and `UnknownPiece` when it does not know the file.
"""
