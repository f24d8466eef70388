"""`MuonMatrix`: which parameters Muon updates, and the matrices that Megatron fuses in them.

Muon orthogonalises q, k, v, gate and up separately, though Megatron stores them fused. `route`
decides between Muon and AdamW, and `split` returns the matrices of a parameter. Rows of a
tensor-parallel rank's local tensor, top to bottom, with d channels a head::

    linear_qkv    | q q q q k v | q q q q k v | ...   a block for each query group, d rows a letter
    linear_fc1    | gate ...... | up ....... |        ffn/tp rows each
    linear_proj, linear_fc2                           one matrix, columns split over tensor ranks

The module also chooses how Newton-Schulz is computed for a shape and counts its FLOPs, because the
cost of a matrix decides which rank owns it. It does not import torch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from megatron_muloco.config.inner import MuonConfig, NSImplementation
from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.errors import RuntimeMismatch, TopologyError
from megatron_muloco.params import MatrixKind, ParamInfo, ParamKind

__all__ = [
    "ChooseImplementation",
    "LayerShape",
    "MuonMatrix",
    "Route",
    "always_plain",
    "automatic_implementation",
    "check_rows",
    "implementation_for",
    "is_vector",
    "newton_schulz_flops",
    "route",
    "split",
]


# ---- implementations of Newton-Schulz and their FLOPs ----------------------------------------

ChooseImplementation = Callable[[int, int], NSImplementation]
"""Maps rows and columns of a matrix to its implementation."""


# Measured on a CPU: docs/performance/newton_schulz.md. On fewer rows the many small products of
# `triangle` cost more time than they save. Pairs save FLOPs from a ratio of 1, time from about 1.5.
_SMALLEST_TRIANGLE_ROWS = 512
_SMALLEST_GRAM_RATIO = 1.5


def automatic_implementation(
    rows: int, columns: int, *, precise: bool, cpu: bool
) -> NSImplementation:
    """Return the fastest accurate implementation for a matrix of this shape.

    - ``plain`` in bf16, where a Gram matrix loses small singular values; on any device but the CPU,
      where bf16 is the default (docs/performance/h100.md has fp32 on a GPU); and below 512 rows on
      the smaller side.
    - ``gram`` where the longer side is at least 1.5 times the smaller.
    - ``triangle`` otherwise.

    The choice depends on nothing else, in particular not on the batch or the number of threads, so
    that a matrix gets the same arithmetic in every layout.

    Args:
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        precise: Whether the iteration runs in fp32 or fp64.
        cpu: Whether it runs on a CPU.
    """
    smaller, longer = sorted((rows, columns))
    if not precise or not cpu or smaller < _SMALLEST_TRIANGLE_ROWS:
        return "plain"
    return "gram" if longer >= _SMALLEST_GRAM_RATIO * smaller else "triangle"


def implementation_for(muon: MuonConfig, *, accelerator: bool) -> ChooseImplementation:
    """Return the choice that a configuration means.

    Args:
        muon: The configuration.
        accelerator: Whether matrices are on an accelerator; else they are on a CPU.
    """
    if muon.ns_impl != "auto":
        forced = muon.ns_impl
        return lambda rows, columns: forced
    precise = muon.compute_dtype(accelerator=accelerator) == "fp32"
    return partial(automatic_implementation, precise=precise, cpu=not accelerator)


def always_plain(rows: int, columns: int) -> NSImplementation:
    """Return ``plain`` for every shape."""
    return "plain"


def newton_schulz_flops(
    rows: int, columns: int, steps: int, ns_impl: NSImplementation = "plain"
) -> int:
    """Return the FLOPs of ``steps`` quintic steps on one matrix.

    m is the smaller side and n the longer one. An m x n product takes 2 m^2 n FLOPs and an m x m
    product 2 m^3; ``triangle`` and ``gram`` compute half of the symmetric ones.

    - ``plain``: two m x n products and one m x m product a step.
    - ``triangle``: one m x n product, half of another, and half of an m x m product a step.
    - ``gram``: the first step like ``triangle``; then pairs, each with the m x n products of one
      step and five halves of m x m products; a last step without a partner like ``triangle``.

    Sources: the products in `newton_schulz`, `_step_alone` and `_step_pair` of that module.
    """
    m, n = sorted((rows, columns))
    if ns_impl == "plain":
        return steps * (4 * m * m * n + 2 * m * m * m)
    # Half of X X^T, and all of B X: the second has no symmetry to use.
    alone = 3 * m * m * n + m * m * m
    if ns_impl == "triangle" or steps < 2:
        return steps * alone
    pairs, odd = divmod(steps - 1, 2)  # the first step is alone in any case
    return (1 + odd) * alone + pairs * (3 * m * m * n + 5 * m * m * m)


# ---- parameters and their matrices -----------------------------------------------------------

Route = Literal["matrix", "vector"]
"""``matrix`` parameters get Muon, ``vector`` parameters AdamW."""

Rows = tuple[int, int]

_MATRIX_KINDS = get_args(MatrixKind)
_TABLES = {"embedding": "token embedding", "output": "output layer"}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The sizes of a decoder layer that splitting needs.

    Attributes:
        num_attention_heads: Query heads over all tensor-parallel ranks.
        num_query_groups: Key/value heads; equal to ``num_attention_heads`` without grouping.
        kv_channels: Channels of a head.
        ffn_hidden_size: Width of gate and of up.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int

    def __post_init__(self) -> None:
        """Refuse heads that do not divide into query groups."""
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"{self.num_attention_heads} heads do not divide into {self.num_query_groups} "
                "query groups"
            )

    @classmethod
    def from_config(cls, model: ModelConfig) -> "LayerShape":
        """Return the sizes of a model's decoder layers."""
        return cls(
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.query_groups,
            kv_channels=model.kv_channels,
            ffn_hidden_size=model.ffn_hidden_size,
        )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups


@dataclass(frozen=True, slots=True)
class MuonMatrix:
    """One matrix that Muon updates as a whole, or head by head where heads are split.

    All tensor-parallel ranks hold pieces of the same shape r x c. The ``local_rows`` of rank t,
    stacked in order, are rows ``[t*r, (t+1)*r)`` of the matrix for ``partition_dim`` 0, and columns
    ``[t*c, (t+1)*c)`` for ``partition_dim`` 1.

    Attributes:
        name: Name of the parameter, ``::``, and the kind.
        param: Model-wide name of the parameter that contains it.
        kind: q, k, v, proj, gate, up or down.
        local_rows: Its row ranges in the local tensor, in order.
        local_columns: Columns of the local tensor.
        partition_dim: Dimension split over tensor-parallel ranks.
        tensor_size: Number of tensor-parallel ranks.
        cost: FLOPs of its Newton-Schulz iteration.
        ns_impl: Implementation of its Newton-Schulz iteration.
        blocks: Number of equal groups of rows that are orthogonalised separately: the heads of q, k
            or v where they are split, else 1.
    """

    name: str
    param: str
    kind: str
    local_rows: tuple[Rows, ...]
    local_columns: int
    partition_dim: int
    tensor_size: int
    cost: int
    ns_impl: NSImplementation = "plain"
    blocks: int = 1

    @property
    def local_shape(self) -> tuple[int, int]:
        """Shape of one tensor-parallel rank's piece."""
        return sum(end - start for start, end in self.local_rows), self.local_columns

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (fan_out) and columns (fan_in) of the whole matrix."""
        return _whole(self.local_shape, self.partition_dim, self.tensor_size)

    @property
    def block_shape(self) -> tuple[int, int]:
        """Rows and columns of one separately orthogonalised block."""
        rows, columns = self.shape
        return rows // self.blocks, columns

    @property
    def numel(self) -> int:
        """Elements of the whole matrix."""
        rows, columns = self.shape
        return rows * columns


def is_vector(param: ParamInfo) -> bool:
    """Return whether a parameter is a norm, a bias, the embedding or the output layer."""
    return len(param.local_shape) < 2 or param.kind in _TABLES


def route(param: ParamInfo) -> tuple[Route, str]:
    """Return whether Muon or AdamW updates a parameter, and the reason.

    The number of dimensions does not decide it alone: embedding and output layer are 2-D too.

    Raises:
        RuntimeMismatch: A tensor of two or more dimensions for which there is no rule.
    """
    if len(param.local_shape) < 2:
        return "vector", "norm or bias: not a matrix"
    if param.kind in _TABLES:
        return "vector", f"{_TABLES[param.kind]}: rows are tokens, not a linear map"
    if len(param.local_shape) == 2 and param.kind in _MATRIX_KINDS:
        return "matrix", "linear map inside a decoder layer"
    raise RuntimeMismatch(
        f"{param.name} of local shape {param.local_shape} is neither a known decoder matrix nor "
        "a known embedding. Giving it to AdamW might not be what is meant, so it is refused. "
        "Add it to the ParameterNames of the model, or use inner.kind: adamw."
    )


def split(
    param: ParamInfo,
    layer: LayerShape,
    *,
    tensor_size: int,
    steps: int = 5,
    choose_impl: ChooseImplementation = always_plain,
    split_heads: bool = False,
) -> tuple[MuonMatrix, ...]:
    """Return the matrices of a matrix parameter; together they contain each local row once.

    Args:
        param: A parameter that `route` calls a matrix.
        layer: Sizes over all tensor-parallel ranks.
        tensor_size: Number of tensor-parallel ranks.
        steps: Newton-Schulz steps, for the cost.
        choose_impl: Chooses the implementation of a matrix, for the cost.
        split_heads: Orthogonalise each head of q, k and v separately.

    Raises:
        TopologyError: Query groups or FFN width do not divide over the tensor-parallel ranks.
        RuntimeMismatch: The local tensor does not have the rows that ``layer`` implies.
    """
    rows = _SPLITTERS[param.kind](param, layer, tensor_size)
    check_rows(param, rows.values())
    dim = param.partition_dim
    if dim is None:
        if tensor_size > 1:
            raise RuntimeMismatch(
                f"{param.name} is the same on all {tensor_size} tensor-parallel ranks, but a "
                "matrix must be held once; its module is not one of Megatron's parallel layers."
            )
        dim = 0  # one tensor rank: the piece is the whole matrix in either dimension
    head = layer.kv_channels if split_heads and param.kind == "qkv" else None
    # From shapes over all tensor-parallel ranks: name, cost and implementation of a matrix must not
    # depend on the layout, or its update would.
    return tuple(
        _muon_matrix(param, kind, r, dim, tensor_size, steps, choose_impl, head)
        for kind, r in rows.items()
    )


def check_rows(param: ParamInfo, pieces: Iterable[tuple[Rows, ...]]) -> None:
    """Raise unless the row ranges of all pieces partition the rows of the local tensor.

    Raises:
        RuntimeMismatch: Rows are missing or claimed twice.
    """
    position = 0
    for start, end in sorted(rows for piece in pieces for rows in piece):
        if start != position or end < start:
            position = -1
            break
        position = end
    if position != param.local_shape[0]:
        raise RuntimeMismatch(
            f"{param.name} has {param.local_shape[0]} local rows, but its matrices do not contain "
            "each of them once; the layer's sizes differ from the module's."
        )


def _muon_matrix(
    param: ParamInfo,
    kind: str,
    rows: tuple[Rows, ...],
    dim: int,
    tensor_size: int,
    steps: int,
    choose_impl: ChooseImplementation,
    block_rows: int | None,
) -> MuonMatrix:
    local_rows = sum(end - start for start, end in rows)
    whole = _whole((local_rows, param.local_shape[1]), dim, tensor_size)
    # A tensor-parallel rank holds whole heads and the rows of a head are adjacent, so equal groups
    # of rows of the whole matrix are the heads.
    blocks = whole[0] // block_rows if block_rows else 1
    block = (whole[0] // blocks, whole[1])
    ns_impl = choose_impl(*block)
    return MuonMatrix(
        name=f"{param.name}::{kind}",
        param=param.name,
        kind=kind,
        local_rows=rows,
        local_columns=param.local_shape[1],
        partition_dim=dim,
        tensor_size=tensor_size,
        cost=blocks * newton_schulz_flops(*block, steps, ns_impl),
        ns_impl=ns_impl,
        blocks=blocks,
    )


def _whole(local_shape: tuple[int, int], dim: int, tensor_size: int) -> tuple[int, int]:
    rows, columns = local_shape
    return (rows * tensor_size, columns) if dim == 0 else (rows, columns * tensor_size)


def _split_qkv(
    param: ParamInfo, layer: LayerShape, tensor_size: int
) -> dict[str, tuple[Rows, ...]]:
    """Return the rows of q, k and v: Megatron has one block ``[q ... q k v]`` per query group."""
    # Megatron allows more tensor-parallel ranks than query groups. It then cuts through a block and
    # gathers q, k and v in the forward pass. Such a piece has no q, k and v rows of its own.
    groups = _divide(layer.num_query_groups, tensor_size, f"query groups of {param.name}")
    d = layer.kv_channels
    q = layer.heads_per_group * d
    starts = [group * (q + 2 * d) for group in range(groups)]
    return {
        "q": tuple((s, s + q) for s in starts),
        "k": tuple((s + q, s + q + d) for s in starts),
        "v": tuple((s + q + d, s + q + 2 * d) for s in starts),
    }


def _split_gate_up(
    param: ParamInfo, layer: LayerShape, tensor_size: int
) -> dict[str, tuple[Rows, ...]]:
    """Return the rows of gate and up: each tensor-parallel rank has ``[its gate; its up]``."""
    # Each rank's MLP splits its own activations in two halves. So gate and up alternate rank by
    # rank in the whole parameter, and neither is a contiguous half of it.
    ffn = _divide(layer.ffn_hidden_size, tensor_size, f"gate rows of {param.name}")
    return {"gate": ((0, ffn),), "up": ((ffn, 2 * ffn),)}


def _uncut(kind: str) -> Callable[[ParamInfo, LayerShape, int], dict[str, tuple[Rows, ...]]]:
    def all_rows(
        param: ParamInfo, layer: LayerShape, tensor_size: int
    ) -> dict[str, tuple[Rows, ...]]:
        return {kind: ((0, param.local_shape[0]),)}

    return all_rows


_SPLITTERS: Mapping[
    ParamKind | None, Callable[[ParamInfo, LayerShape, int], dict[str, tuple[Rows, ...]]]
] = {
    "qkv": _split_qkv,
    "fc1": _split_gate_up,
    "proj": _uncut("proj"),
    "fc2": _uncut("down"),
}


def _divide(count: int, tensor_size: int, what: str) -> int:
    if count % tensor_size:
        raise TopologyError(
            f"the {count} {what} do not divide over {tensor_size} tensor-parallel ranks; "
            f"use a tensor_model_parallel_size that divides {count}"
        )
    return count // tensor_size
