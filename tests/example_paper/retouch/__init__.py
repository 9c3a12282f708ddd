"""Retouch: a network that fills a hole in an image, trained against a critic; the example paper of CONTRIBUTING.md."""

from retouch.data import Images
from retouch.models import Critic, Restorer
from retouch.trainer import RetouchTrainer

__all__ = ["Critic", "Images", "Restorer", "RetouchTrainer"]
