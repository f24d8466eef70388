"""`ParamInfo` and `Shard`: how optimizer, outer step and checkpoint describe what a rank holds.

Megatron cuts a parameter twice: over tensor-parallel ranks along one dimension, and, for the
optimizer, over data-parallel ranks into flat ranges that may start and end anywhere::

    linear_fc1.weight             [2*ffn, h]         the whole parameter
      |  tensor parallel: cut along partition_dim 0
    local tensor (ParamInfo)      [2*ffn/tp, h]      one tensor-parallel rank
      |  data parallel: a flat range of it
    master (Shard)                [start, end)       one rank

`ParameterNames` is the only place where names are parsed. `ParamInfo.from_name` asks it for the
kind and the layer of a parameter, and everything else (Muon's routes, fragments, exceptions of
compression, initialisation, checkpoints) asks the `ParamInfo`. An architecture with other names
needs another `ParameterNames` and nothing else.

This module does not import torch.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "GPT_NAMES",
    "MatrixKind",
    "ParamInfo",
    "ParamKind",
    "ParameterNames",
    "Shard",
    "coverage",
]

MatrixKind = Literal["qkv", "proj", "fc1", "fc2"]
"""Matrices of a decoder layer, by how Megatron stores them.

- ``qkv``: query, key and value projections, fused group by group, columns split over tensor ranks.
- ``proj``: output projection of attention.
- ``fc1``: gate and up projections, fused on each tensor rank as ``[gate; up]``.
- ``fc2``: down projection.
"""

ParamKind = Literal["embedding", "output", "norm"] | MatrixKind
"""What a parameter is."""


@dataclass(frozen=True, slots=True)
class ParameterNames:
    """How an architecture names its parameters.

    Attributes:
        layers: Path of the module list of decoder layers; the parameters of layer N are named
            ``{layers}.N.*``.
        embedding: Name of the token embedding, which a tied output head shares.
        output: Name of the untied output head.
        matrices: Kind of each matrix of a decoder layer, by its name inside the layer.
        norm: Part of a name that all norms have, and no other parameter.
    """

    layers: str
    embedding: str
    output: str
    matrices: Mapping[str, MatrixKind]
    norm: str = "norm"

    def layer_of(self, name: str) -> tuple[int, str] | None:
        """Return the number of a parameter's layer and its name inside the layer.

        ``None`` for a parameter that is in no layer.
        """
        number, _, inside = name.removeprefix(f"{self.layers}.").partition(".")
        if not name.startswith(f"{self.layers}.") or not number.isdecimal():
            return None
        return int(number), inside

    def in_layer(self, layer: int, inside: str) -> str:
        """Return the name of a layer's parameter; the inverse of `layer_of`."""
        return f"{self.layers}.{layer}.{inside}"

    def kind_of(self, name: str) -> ParamKind | None:
        """Return what a parameter is, or ``None`` for a name that this architecture lacks."""
        if name == self.embedding:
            return "embedding"
        if name == self.output:
            return "output"
        place = self.layer_of(name)
        if place is not None and place[1] in self.matrices:
            return self.matrices[place[1]]
        return "norm" if self.norm in name else None


GPT_NAMES = ParameterNames(
    layers="decoder.layers",
    embedding="embedding.word_embeddings.weight",
    output="output_layer.weight",
    matrices={
        "self_attention.linear_qkv.weight": "qkv",
        "self_attention.linear_proj.weight": "proj",
        "mlp.linear_fc1.weight": "fc1",
        "mlp.linear_fc2.weight": "fc2",
    },
)
"""Names of Megatron's ``GPTModel``."""


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """One trainable parameter as one rank's module holds it.

    Attributes:
        name: Model-wide name; layers are numbered over all pipeline stages.
        local_shape: Shape of this rank's tensor-parallel piece.
        partition_dim: Dimension split over tensor-parallel ranks; ``None`` when every one of them
            holds the same tensor (norms).
        is_primary: Whether this rank's copy takes part in the outer step. False where another rank
            of the replica holds the same values and synchronises them: replicated tensors on
            tensor-parallel ranks above 0, and the tied output embedding of the last pipeline stage.
        kind: What the parameter is; ``None`` where its architecture has no such name (a bias, a
            router), which is an error only for those who need to know.
        layer: Its decoder layer, counted from 0 over all pipeline stages; ``None`` outside of them.
    """

    name: str
    local_shape: tuple[int, ...]
    partition_dim: int | None
    is_primary: bool
    kind: ParamKind | None
    layer: int | None

    @classmethod
    def from_name(
        cls,
        name: str,
        local_shape: tuple[int, ...],
        partition_dim: int | None,
        *,
        is_primary: bool = True,
        names: ParameterNames = GPT_NAMES,
    ) -> "ParamInfo":
        """Return the parameter with the kind and the layer that its name says."""
        place = names.layer_of(name)
        layer = None if place is None else place[0]
        return cls(name, local_shape, partition_dim, is_primary, names.kind_of(name), layer)

    @property
    def numel(self) -> int:
        """Elements of the local tensor."""
        return math.prod(self.local_shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """The flat range ``[start, end)`` of a local tensor whose fp32 master lives on this rank."""

    param: ParamInfo
    start: int
    end: int

    def __post_init__(self) -> None:
        """Refuse a range that does not lie inside the local tensor."""
        if not 0 <= self.start <= self.end <= self.param.numel:
            raise ValueError(
                f"{self.param.name}: range [{self.start}, {self.end}) is not inside a tensor of "
                f"{self.param.numel} elements"
            )

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.param.name

    @property
    def numel(self) -> int:
        """Elements that this rank holds."""
        return self.end - self.start


def coverage(given: Iterable[str], wanted: Iterable[str]) -> tuple[list[str], list[str]]:
    """Compare names with those wanted, for every place that claims to be a partition.

    Returns:
        The names of ``wanted`` that ``given`` lacks, and those that it repeats or adds; sorted.
    """
    counts = Counter(iter(given))  # names, also those of a mapping, whose values are not counts
    expected = set(wanted)
    missing = sorted(expected - counts.keys())
    surplus = sorted(name for name, count in counts.items() if count > 1 or name not in expected)
    return missing, surplus
