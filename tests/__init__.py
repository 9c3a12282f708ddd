"""The test suite. A package, so that `python -m tests.parity` finds it before any installed package called `tests`."""
