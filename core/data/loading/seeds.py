"""Seeds that are pure functions of what they belong to."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order.

    Sums such as ``seed + epoch`` give run 0, epoch 1 the order of run 1, epoch 0; a hash does not.
    """
    packed = b"".join(int(part).to_bytes(16, "little", signed=True) for part in parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_sample(seed: int) -> None:
    """Seed the three global generators that transforms draw from: ``random``, numpy and torch's CPU generator.

    numpy and torch run the same Mersenne twister, so they get different seeds. Device generators are left alone:
    dropout on the device must not depend on where samples are made.
    """
    random.seed(seed)
    np.random.seed(derive_seed(seed) & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Give back the state of ``random``, numpy and torch's CPU generator on the way out."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
