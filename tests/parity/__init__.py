"""Golden cases of the papers' reference implementations, and the runner that holds our code against them.

    python -m tests.parity DIR [DIR ...]

`cases.py` reads a case, `adapters/<paper>.py` builds our piece for it, `runner.py` compares.
"""
