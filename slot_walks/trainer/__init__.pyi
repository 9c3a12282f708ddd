"""Public names, one import each: the package loads them from here when they are first used."""

from .slots import SlotTrainer as SlotTrainer
