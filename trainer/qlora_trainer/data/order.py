"""Shuffling that is the same on every machine and for every version of numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def permutation(count: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """Order the numbers 0 to ``count`` - 1 in a way that only ``count`` and ``seed`` decide.

    Sorts raw output of a bit generator, which numpy promises never to change; ``Generator.permutation`` may change
    between versions (NEP 19), and a resumed run may have another image. Ties are of no consequence: 64 bits, stable.
    """
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)
