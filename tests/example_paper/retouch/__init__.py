"""Retouch: a network that fills a hole in a picture, trained against a critic; the example paper of CONTRIBUTING.md."""

from retouch.data import Pictures
from retouch.models import Critic, Restorer
from retouch.trainer import RetouchTrainer

__all__ = ["Critic", "Pictures", "Restorer", "RetouchTrainer"]
