"""Hostile and broken weight files, and what reading each of them costs: see `python -m tests.hostile`."""
