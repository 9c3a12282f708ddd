"""A text-to-image model small enough for two CPU cores, the world that it draws, and exact readings of its videos.

    world       words and looks, pictures, clips, edits
    networks    picture tower, judge, tiny CLIP, tokenizer
    vae         an autoencoder that is the identity
    training    of all of them
    folder      a Stable Diffusion folder with what evaluates it
    measures    path, words, agreement, joint score, jitter

Names are loaded when they are first used.
"""

from core.config.packages import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
