"""A tiny decoder layer, sharded over tensor and data ranks as Megatron shards it.

`Mailbox` replaces the all-to-all by threads of one process.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.optim.exchange import ShardExchange, Transport
from megatron_muloco.optim.matrices import LayerShape, MuonMatrix
from megatron_muloco.optim.muon import MuonAdamW, StepReport
from megatron_muloco.optim.parameter_table import (
    Assignment,
    InnerKind,
    ParameterTable,
    build_parameter_table,
)
from megatron_muloco.optim.routing import RankShards
from megatron_muloco.params import ParamInfo, Shard

Pieces = dict[tuple[str, int], Tensor]  # (parameter, tensor rank) -> local tensor
Run = tuple[dict[str, Tensor], StepReport]

PREFIX = "decoder.layers.0."
VECTOR = PREFIX + "input_layernorm.weight"


class Mailbox:
    """All-to-all between threads, with one `transport` a rank."""

    def __init__(self, size: int) -> None:
        self._barrier = Barrier(size, timeout=20)
        self._sent: dict[int, tuple[Tensor, ...]] = {}

    def transport(self, rank: int) -> "MailboxTransport":
        return MailboxTransport(self, rank)

    def deliver(self, rank: int, received: Sequence[Tensor], sent: tuple[Tensor, ...]) -> None:
        self._sent[rank] = sent
        self._barrier.wait()
        for other, place in enumerate(received):
            place.copy_(self._sent[other][rank])
        self._barrier.wait()

    def run(self, fn: Callable[[int], Any], size: int) -> list[Any]:
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(fn, range(size)))


@dataclass(frozen=True)
class MailboxTransport:
    """One rank's side of a mailbox. Nothing is copied before `wait`, the latest point allowed."""

    mailbox: Mailbox
    rank: int

    def start(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> "Delivery":
        places = received.split(list(receive_splits))
        return Delivery(self.mailbox, self.rank, places, sent.split(list(send_splits)))


@dataclass(frozen=True)
class Delivery:
    mailbox: Mailbox
    rank: int
    received: Sequence[Tensor]
    sent: tuple[Tensor, ...]

    def wait(self) -> None:
        self.mailbox.deliver(self.rank, self.received, self.sent)


class NoTransport:
    """Transport of exchanges that are only planned: it refuses to start."""

    def start(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("planned only")


def matrix_params(layer: LayerShape, hidden: int, tensor_size: int) -> list[ParamInfo]:
    d, ffn = layer.kv_channels, layer.ffn_hidden_size // tensor_size
    heads = layer.num_attention_heads // tensor_size
    groups = layer.num_query_groups // tensor_size
    shapes = {
        "self_attention.linear_qkv.weight": ((heads + 2 * groups) * d, hidden, 0),
        "self_attention.linear_proj.weight": (hidden, heads * d, 1),
        "mlp.linear_fc1.weight": (2 * ffn, hidden, 0),
        "mlp.linear_fc2.weight": (hidden, ffn, 1),
    }
    return [ParamInfo.from_name(PREFIX + n, (r, c), dim) for n, (r, c, dim) in shapes.items()]


def norm_param() -> ParamInfo:
    return ParamInfo.from_name(VECTOR, (5,), None)


def cut(params: Sequence[ParamInfo], tensor_size: int, cuts: list[list[float]]) -> list[RankShards]:
    """Cut the concatenated local tensors of each tensor rank at fractions, as dp cuts a buffer."""
    total = sum(param.numel for param in params)
    layout = []
    for dp in range(len(cuts[0]) + 1):
        for tensor_rank in range(tensor_size):
            bounds = [0, *(round(f * total) for f in sorted(cuts[tensor_rank])), total]
            ranges, position = {}, 0
            for param in params:
                start = max(bounds[dp] - position, 0)
                end = min(bounds[dp + 1] - position, param.numel)
                if start < end:
                    ranges[param.name] = (start, end)
                position += param.numel
            layout.append(RankShards(tensor_rank, ranges))
    return layout


def cut_evenly(params: Sequence[ParamInfo], tensor_size: int, dp: int) -> list[RankShards]:
    return cut(params, tensor_size, [[i / dp for i in range(1, dp)]] * tensor_size)


def shards_of(pieces: Pieces, shards: RankShards) -> dict[str, Tensor]:
    """Return a rank's flat shards of the parameters that ``pieces`` has."""
    return {
        name: pieces[name, shards.tensor_rank].reshape(-1)[start:end].clone()
        for name, (start, end) in shards.ranges.items()
        if (name, shards.tensor_rank) in pieces
    }


def whole(matrix: MuonMatrix, pieces: Pieces) -> Tensor:
    """Assemble a matrix the obvious way: rows of each tensor rank's piece, then concatenated."""
    return torch.cat(
        [
            torch.cat([pieces[matrix.param, t][a:b] for a, b in matrix.local_rows])
            for t in range(matrix.tensor_size)
        ],
        dim=matrix.partition_dim,
    )


def scatter(values: dict[str, Tensor], matrices: Sequence[MuonMatrix]) -> Pieces:
    """Return the tensor ranks' pieces of whole matrices; undoes `whole`."""
    pieces: Pieces = {}
    for param in {matrix.param: None for matrix in matrices}:
        mine = [matrix for matrix in matrices if matrix.param == param]
        rows = sum(matrix.local_shape[0] for matrix in mine)
        for t in range(mine[0].tensor_size):
            piece = torch.empty(rows, mine[0].local_columns)
            for matrix in mine:
                local = values[matrix.name].chunk(matrix.tensor_size, dim=matrix.partition_dim)[t]
                sizes = [b - a for a, b in matrix.local_rows]
                for (a, b), part in zip(matrix.local_rows, local.split(sizes), strict=True):
                    piece[a:b] = part
            pieces[param, t] = piece
    return pieces


def gather(layout: Sequence[RankShards], held: Sequence[dict[str, Tensor]], like: Pieces) -> Pieces:
    """Return whole local tensors from every rank's flat shards."""
    pieces = {key: torch.full_like(piece, torch.nan) for key, piece in like.items()}
    for shards, tensors in zip(layout, held, strict=True):
        for name, (start, end) in shards.ranges.items():
            pieces[name, shards.tensor_rank].view(-1)[start:end] = tensors[name]
    return pieces


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: a decoder layer and a norm, sharded over a layout."""

    layer: LayerShape
    hidden: int
    tensor_size: int
    layout: list[RankShards]
    table: ParameterTable

    @classmethod
    def even(
        cls,
        layer: LayerShape,
        hidden: int,
        tensor_size: int,
        dp: int,
        kind: InnerKind = "muon",
        *,
        split_heads: bool = False,
    ) -> "Stage":
        params = [*matrix_params(layer, hidden, tensor_size), norm_param()]
        layout = cut_evenly(params, tensor_size, dp)
        table = build_parameter_table(
            params,
            layer,
            kind=kind,
            tensor_size=tensor_size,
            group_size=len(layout),
            split_heads=split_heads,
        )
        return cls(layer, hidden, tensor_size, layout, table)

    def owned_by_one(self) -> "Stage":
        """The same with every matrix on rank 0, so that batches are the same for every layout."""
        matrices = self.table.matrices
        everything = Assignment((0,) * len(matrices), (1,) + (0,) * (len(self.layout) - 1))
        return replace(self, table=replace(self.table, assignment=everything))

    @property
    def params(self) -> dict[str, ParamInfo]:
        params = [*matrix_params(self.layer, self.hidden, self.tensor_size), norm_param()]
        return {param.name: param for param in params}

    def random(self, seed: int) -> Pieces:
        """Return pieces whose whole matrices and norm depend on the seed, not on the layout."""
        generator = torch.Generator().manual_seed(seed)
        matrices = {u.name: torch.randn(u.shape, generator=generator) for u in self.table.matrices}
        norm = torch.randn(5, generator=generator)
        norms = {(VECTOR, t): norm.clone() for t in range(self.tensor_size)}
        return scatter(matrices, self.table.matrices) | norms

    def optimizer(
        self,
        rank: int,
        masters: dict[str, Tensor],
        transport: Transport | None,
        *,
        exchange_chunks: int = 1,
        **options: Any,
    ) -> MuonAdamW:
        """Return a bound optimizer, built in the same steps as Megatron builds it."""
        model = [torch.nn.Parameter(torch.zeros(p.local_shape)) for p in self.params.values()]
        optimizer = MuonAdamW([{"params": model}], **options)
        optimizer.param_groups = [optimizer.param_groups[0] | {"params": list(masters.values())}]
        optimizer.load_state_dict(optimizer.state_dict())
        exchange = None
        if self.table.matrices:
            exchange = ShardExchange(
                self.table.matrices,
                self.table.owners,
                self.layout,
                rank=rank,
                transport=transport,
                buckets=exchange_chunks,
            )
        shards = [
            (tensor, Shard(self.params[name], *self.layout[rank].ranges[name]))
            for name, tensor in masters.items()
        ]
        optimizer.bind(shards, self.table, exchange)
        return optimizer


def train(stage: Stage, rank: int, transport: Transport | None, steps: int, **options: Any) -> Run:
    """Make ``steps`` steps on one rank with gradients that depend on the step alone."""
    masters = shards_of(stage.random(0), stage.layout[rank])
    optimizer = stage.optimizer(rank, masters, transport, **options)
    for step in range(1, steps + 1):
        gradients = shards_of(stage.random(step), stage.layout[rank])
        for name, master in masters.items():
            master.grad = gradients[name]
        optimizer.step()
    return masters, optimizer.last_step


def train_in_threads(stage: Stage, steps: int, **options: Any) -> Pieces:
    """Run every rank of a stage and return the trained pieces."""
    size = len(stage.layout)
    mailbox = Mailbox(size)
    runs = mailbox.run(
        lambda rank: train(stage, rank, mailbox.transport(rank), steps, **options), size
    )
    return gather(stage.layout, [masters for masters, _ in runs], stage.random(0))
