"""How alike replicas' pseudogradients are, from a few numbers of each.

The cosine of two replicas needs a dot product of vectors that are never in one place. Each rank
sends a *sketch* of its share instead: every value, with a random sign, is added to one of ``width``
places. The signs are the same on all replicas, so equal values meet equal values, and all other
products cancel on average::

    values   x0  x1  x2  x3 | x4  x5  x6  x7 | x8  ...       width 4, one row after the other
    row 0   +x0 -x1 -x2 +x3                                  sign = row sign * column sign
    row 1   -x6 +x7 -x4 -x5                                  turned by a random number of places
    sketch   the sum of the rows

Dot products of sketches are dot products of the vectors, without bias; summed over the ranks of a
replica and divided by the sketches' own norms they are cosines. For vectors without structure the
standard error of a cosine c is ``(1 - c**2) / sqrt(values of the whole replica)``, that of a
correlation coefficient.

Source: Charikar, Chen and Farach-Colton, "Finding frequent items in data streams" (2002), with
rows turned as wholes, which is a sum in a fixed order on every device.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PseudogradientSketch", "cosines", "gram"]

_CHUNK_ELEMENTS = 2**22  # chosen: temporary memory of 16 MiB of values and 32 MiB of places


@dataclass(frozen=True, slots=True)
class PseudogradientSketch:
    """Sketches a rank's shards; the same function on the same position of every replica.

    Attributes:
        width: Numbers in a sketch; at least 1.
        interval: Rounds between two sketches.
    """

    width: int
    interval: int = 1

    def is_due(self, round_index: int) -> bool:
        """Whether the launches of a round carry sketches."""
        return round_index % self.interval == 0

    def __call__(self, shards: Mapping[str, Tensor]) -> Tensor:
        """Return the sketch of flat tensors, ``[width]``, fp32; ``[0]`` where there are none.

        It depends on names, sizes and values alone, not on the order of the mapping or on the rank.
        """
        parts = [self._sketch(name, shards[name]) for name in sorted(shards)]
        return torch.stack(parts).sum(0) if parts else torch.zeros(0)

    def _sketch(self, name: str, values: Tensor) -> Tensor:
        width, device = self.width, values.device
        rows = -(-values.numel() // width)
        generator = torch.Generator().manual_seed(_seed(name))
        column_signs = _signs(width, generator).to(device)
        row_signs = _signs(rows, generator).to(device)
        turns = torch.randint(width, (rows,), generator=generator).to(device)
        places = torch.arange(width, device=device)
        total = torch.zeros(width, dtype=torch.float32, device=device)
        step = max(1, _CHUNK_ELEMENTS // width)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            chunk = values[first * width : last * width]
            missing = (last - first) * width - chunk.numel()
            table = torch.nn.functional.pad(chunk, (0, missing)).view(-1, width) * column_signs
            turned = table.gather(1, (places + turns[first:last, None]) % width)
            total += (turned * row_signs[first:last, None]).sum(0)
        return total


def gram(sketches: Tensor) -> Tensor:
    """Return the dot products of every two rows, ``[K, K]``, fp64."""
    exact = sketches.double()
    return exact @ exact.T


def cosines(products: Tensor) -> Tensor:
    """Return the cosines of vectors from their dot products, ``[K, K]``; NaN beside a zero."""
    norms = products.diagonal().sqrt()
    return products / torch.outer(norms, norms)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=generator).mul_(2).sub_(1).float()
