"""Compares Muon updates of a real replica across layouts, matrix by matrix.

Every rank fills its local tensors from whole Muon matrices that depend on a name alone, steps the
real optimizer, and returns its flat shards. The test assembles the whole matrices again.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.comm.collectives import AllToAll
from megatron_muloco.model.names import named_parameters
from megatron_muloco.optim.exchange import ShardExchange
from megatron_muloco.optim.matrices import MuonMatrix
from megatron_muloco.optim.parameter_table import Assignment
from megatron_muloco.optim.routing import RankShards
from tests.support.scattered import Pieces, scatter, whole
from tests.support.tiny_models import TinyRun

MakeMatrix = Callable[[MuonMatrix], Tensor]


@dataclass(frozen=True)
class Held:
    """The Muon matrices and the flat shards of one rank."""

    tensor_rank: int
    matrices: tuple[MuonMatrix, ...]
    local_shapes: dict[str, tuple[int, ...]]
    shards: dict[str, tuple[int, Tensor]]
    planned_calls: int

    def cuts_inside_a_row(self) -> bool:
        """Whether a shard of a matrix begins within one of its rows."""
        names = {matrix.param for matrix in self.matrices}
        return any(
            start % self.local_shapes[name][1]
            for name, (start, _) in self.shards.items()
            if name in names
        )


def named_matrix(matrix: MuonMatrix, seed: int) -> Tensor:
    """Return a random matrix that depends on the matrix's name and the seed alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{matrix.name} {seed}".encode()))
    return torch.randn(matrix.shape, generator=generator)


def named_integers(matrix: MuonMatrix, seed: int) -> Tensor:
    """Return whole numbers up to 8 that depend on the matrix's name and the seed alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{matrix.name} {seed}".encode()))
    return torch.randint(-8, 9, matrix.shape, generator=generator).float()


def local_pieces(run: TinyRun, make: MakeMatrix) -> dict[str, Tensor]:
    """Return this rank's local tensors of every matrix parameter of its stage."""
    matrices = run.optimizer.inner.table.matrices
    pieces = scatter({matrix.name: make(matrix) for matrix in matrices}, matrices)
    rank = run.groups.coords.tp
    return {name: piece for (name, t), piece in pieces.items() if t == rank}


@torch.no_grad()
def set_masters(run: TinyRun, make: MakeMatrix) -> None:
    """Overwrite this rank's masters of matrices."""
    _fill(run, run.optimizer.view.masters, make)


@torch.no_grad()
def set_momentum(run: TinyRun, make: MakeMatrix) -> None:
    """Overwrite this rank's momentum buffers."""
    _fill(run, run.optimizer.inner.named_state()["momentum_buffer"], make)


def _fill(run: TinyRun, tensors: Mapping[str, Tensor], make: MakeMatrix) -> None:
    pieces = local_pieces(run, make)
    for shard in run.optimizer.view.shards:
        if shard.name in pieces:
            flat = pieces[shard.name].reshape(-1)
            tensors[shard.name].copy_(flat[shard.start : shard.end])


@torch.no_grad()
def set_gradients(run: TinyRun, make: MakeMatrix) -> None:
    """Overwrite the gradients of matrices in Megatron's buffers; all other gradients are 0."""
    run.model.zero_grad_buffer()
    pieces = local_pieces(run, make)
    for name, parameter in named_parameters(run.model.module):
        if name in pieces:
            parameter.main_grad.copy_(pieces[name])


def assign_all_to_first(run: TinyRun) -> None:
    """Bind the inner optimizer again with the stage's first rank as owner of every matrix.

    There is one bucket, so the batches are those of a stage that has one rank.
    """
    inner, view, stage = run.optimizer.inner, run.optimizer.view, run.groups.stage
    everything = Assignment((0,) * len(inner.table.matrices), (1,) + (0,) * (stage.size() - 1))
    table = replace(inner.table, assignment=everything)
    ranges = {shard.name: (shard.start, shard.end) for shard in view.shards}
    layout: list[Any] = [None] * stage.size()
    torch.distributed.all_gather_object(
        layout, RankShards(run.groups.coords.tp, ranges), group=stage
    )
    exchange = ShardExchange(
        table.matrices,
        table.owners,
        layout,
        rank=stage.rank(),
        transport=AllToAll(stage) if stage.size() > 1 else None,
    )
    inner.bind([(view.raw_masters[s.name], s) for s in view.shards], table, exchange)


def held(run: TinyRun) -> Held:
    """Return the matrices and shards that this rank has now."""
    inner, view = run.optimizer.inner, run.optimizer.view
    return Held(
        run.groups.coords.tp,
        inner.table.matrices,
        {name: info.local_shape for name, info in view.infos.items()},
        run.masters(),
        inner.planned_calls,
    )


def whole_matrices(ranks: Iterable[Held]) -> dict[str, Tensor]:
    """Return every matrix of the model, put together from the shards of all ranks."""
    pieces: Pieces = {}
    matrices: dict[str, MuonMatrix] = {}
    for rank in ranks:
        matrices |= {matrix.name: matrix for matrix in rank.matrices}
        for name, (start, flat) in rank.shards.items():
            missing = torch.full(rank.local_shapes[name], torch.nan)
            piece = pieces.setdefault((name, rank.tensor_rank), missing)
            piece.view(-1)[start : start + flat.numel()] = flat
    return {name: whole(matrix, pieces) for name, matrix in matrices.items()}
