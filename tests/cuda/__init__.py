"""``python -m tests.cuda``: what only a machine with a GPU can check. A command, not a part of the suite."""
