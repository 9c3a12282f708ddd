"""Blocks of torch alone that two papers share; nothing here imports the rest of core, and models may import it."""
