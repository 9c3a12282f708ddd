"""Public names, one import each: the package loads them from here when they are first used."""

from .classification import ClassificationTrainer as ClassificationTrainer
