"""Tables of short vectors, the same for every network: what a digit stands for beside a grid of even steps.

Trained weights crowd at zero and reach far, a few neighbours alike. A table of K vectors of d numbers takes
log2(K) / d bits a number; between 1.7 and 4 bits it loses a quarter to a third less than even steps do. The
tables are made of numbers drawn like trained weights, never of a network's own (tools/tables.py).

References
----------
van Baalen et al. 2024 (GPTVQ); method.md 4.4.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onnxdp.records import Array, Params


class Alphabet(NamedTuple):
    """What digits may stand for: ``levels`` of them, each ``dim`` numbers; even steps where ``dim`` is 1."""

    levels: int
    dim: int = 1

    @classmethod
    def of(cls, params: Params) -> Alphabet:
        """Read what a candidate's parameters name."""
        return cls(int(params["levels"]), int(params.get("dim", 1)))

    @property
    def params(self) -> Params:
        """The parameters that name it."""
        return {"levels": self.levels} if self.dim == 1 else {"levels": self.levels, "dim": self.dim}

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.levels * self.dim

    @property
    def bits(self) -> float:
        """Bits of one number, packed ideally."""
        return math.log2(self.levels) / self.dim


TABLES = (
    Alphabet(23, 2),
    Alphabet(40, 2),
    Alphabet(84, 2),
    Alphabet(255, 2),
    Alphabet(23, 3),
    Alphabet(40, 3),
    Alphabet(84, 3),
    Alphabet(255, 3),
    Alphabet(84, 4),
    Alphabet(255, 4),
)
"""Those there are: numbers of levels that fill words."""


def table(alphabet: Alphabet) -> Array:
    """Return the vectors, (levels, dim) int8."""
    return _stored()[f"{alphabet.levels}x{alphabet.dim}"]


def coarseness(alphabet: Alphabet) -> float:
    """Return the relative squared error on numbers like those it was made of: how tables compare."""
    return float(_stored()[f"{alphabet.levels}x{alphabet.dim} error"])


def table_of(params: Params) -> Alphabet | None:
    """Return the table that a candidate's parameters name, if they name one."""
    return Alphabet.of(params) if "dim" in params else None


@cache
def _stored() -> dict[str, Array]:
    with np.load(Path(__file__).with_suffix(".npz"), allow_pickle=False) as held:
        return dict(held)
