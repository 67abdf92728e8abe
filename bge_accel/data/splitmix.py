"""Numbers that look random, each a function of integers alone, so the same on every machine."""

import numpy as np


def splitmix64(state: np.ndarray) -> np.ndarray:
    """A step of SplitMix64 from each of (n,) uint64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195)."""
    with np.errstate(over="ignore"):
        z = state + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
