"""`MuonAdamW`: Muon for matrices and AdamW for vector parameters, on flat fp32 shards.

It replaces the Adam inside Megatron's DistributedOptimizer and works on the same flat fp32 masters.
`training/build_optimizer.py` builds it in these steps::

    DistributedOptimizer(model, any Adam)     creates this rank's flat fp32 shards
    MuonAdamW(param_groups)                   these shards, grouped by their multipliers
    optimizer.bind(shards, table, exchange)   what each shard is; step() works from here on
    distributed.optimizer = optimizer

It subclasses `torch.optim.AdamW` because Megatron's DistributedOptimizer accepts Adam types only.

Muon for one matrix, with gradient G, momentum buffer M and learning rate lr::

    M <- momentum M + G                           on the shards          `Muon.accumulate`
    O  = scale newton_schulz(M)                   on the matrix's owner  `Muon.update`
    W <- (1 - lr weight_decay) W - lr O           on the shards          `MuonAdamW.step`

Another rule for matrices is another `MatrixUpdate`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from typing_extensions import override

from megatron_muloco.config.inner import MuonConfig
from megatron_muloco.errors import CheckpointError, RuntimeMismatch
from megatron_muloco.optim.exchange import ShardExchange
from megatron_muloco.optim.matrices import MuonMatrix
from megatron_muloco.optim.newton_schulz import (
    newton_schulz,
    scale_factor,
)
from megatron_muloco.optim.parameter_table import Assignment, ParameterTable
from megatron_muloco.optim.phase_timer import PhaseTimer
from megatron_muloco.params import Shard, coverage

__all__ = [
    "DTYPES",
    "BoundShard",
    "MatrixUpdate",
    "Muon",
    "MuonAdamW",
    "Orthogonalise",
    "StepReport",
    "bind_shards",
    "check_exchange",
]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtypes by the names that configurations give them."""

Orthogonalise = Callable[[Tensor], Tensor]
"""Maps a batch of matrices ``[b, rows, columns]`` to the fp32 directions of their updates."""

_VECTOR_STATE = ("exp_avg", "exp_avg_sq")


class MatrixUpdate(Protocol):
    """Update rule for matrices; `Muon` is one.

    A rule has two halves. `accumulate` runs on every rank and sees flat shards, so it is
    elementwise. `update` runs on the owner of a matrix and sees it whole. Between them the exchange
    moves one tensor per shard, and afterwards `MuonAdamW` applies::

        W <- (1 - lr weight_decay) W - lr update(accumulate(G))
    """

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the moments, each a fp32 tensor like its shard; they go into checkpoints."""

    def accumulate(
        self, gradients: list[Tensor], state: Mapping[str, list[Tensor]]
    ) -> list[Tensor]:
        """Update the moments of shards in place, and return what is sent to the owners.

        Args:
            gradients: Flat fp32 gradients, one for each shard; not modified.
            state: For each of `state_names` the moments, in the order of the gradients.

        Returns:
            Flat fp32 tensors in the order of the gradients; they are read once and not modified, so
            they may be the moments themselves.
        """

    def update(self, stacked: Tensor) -> Tensor:
        """Return the fp32 updates of whole matrices.

        Args:
            stacked: ``[b, rows, columns]`` in the exchange's dtype: what `accumulate` returned.
        """


class Muon:
    """The MuLoCo paper's update rule: momentum, Newton-Schulz, and a factor by shape.

    Args:
        config: Its constants.
        orthogonalise: Replaces Newton-Schulz.
        accelerator: Whether matrices are on an accelerator, which decides an ``ns_dtype`` of auto.

    Attributes:
        orthogonalise: Newton-Schulz or its replacement.
    """

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        config: MuonConfig,
        orthogonalise: Orthogonalise | None = None,
        *,
        accelerator: bool = False,
    ) -> None:
        self._config = config
        self.orthogonalise: Orthogonalise = orthogonalise or partial(
            newton_schulz,
            steps=config.num_ns_steps,
            coefficients=config.coefficient_type,
            dtype=DTYPES[config.compute_dtype(accelerator=accelerator)],
            eps=config.eps,
            impl=config.ns_impl,
        )

    def accumulate(
        self, gradients: list[Tensor], state: Mapping[str, list[Tensor]]
    ) -> list[Tensor]:
        """Update the momentum buffers; return them or, with Nesterov, one momentum step ahead.

        ``heavy_ball`` (the paper's) is ``M <- mu M + G``; ``ema`` (Megatron's) is
        ``M <- mu M + (1 - mu) G``. Without Nesterov both have the same direction up to rounding,
        because orthogonalisation removes the scale.
        """
        mu, M = self._config.momentum, state["momentum_buffer"]
        fresh = 1 - mu if self._config.accumulation == "ema" else 1.0
        # In fp32 on the shards and not on the owners: a bf16 wire then rounds what one step sends,
        # but never the momentum that the next steps build on.
        torch._foreach_mul_(M, mu)
        torch._foreach_add_(M, gradients, alpha=fresh)
        if not self._config.nesterov:
            return M
        # New tensors: M must stay, and the gradients may be views of Megatron's gradient buffer,
        # which its ``.float()`` does not copy if it is fp32.
        ahead = list(torch._foreach_mul(M, mu))
        torch._foreach_add_(ahead, gradients, alpha=fresh)
        return ahead

    def update(self, stacked: Tensor) -> Tensor:
        """Return the orthogonalised matrices, scaled by the factor of their shape."""
        # Where heads are split, this is the shape of one head. The factor belongs to what is
        # orthogonalised, not to the parameter.
        rows, columns = stacked.shape[-2:]
        factor = scale_factor(self._config.scale_mode, rows, columns)
        # A replacement of Newton-Schulz may return bf16, which would round the product again.
        return self.orthogonalise(stacked).float() * factor


@dataclass(frozen=True, slots=True)
class BoundShard:
    """One flat tensor that the optimizer updates.

    Attributes:
        name: Parameter of which it is a piece.
        tensor: The fp32 master.
        is_matrix: Whether Muon updates it; else AdamW.
    """

    name: str
    tensor: Tensor
    is_matrix: bool

    @property
    def exchanged(self) -> bool:
        """Whether it takes part in the exchange: a piece of a matrix that is not empty."""
        return self.is_matrix and self.tensor.numel() > 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """Work of the last step on this rank.

    Attributes:
        newton_schulz_calls: Number of matrices orthogonalised.
        bytes_sent: Bytes that the all-to-alls sent to other ranks.
    """

    newton_schulz_calls: int
    bytes_sent: int


class MuonAdamW(torch.optim.AdamW):
    """Updates this rank's shards: vectors locally by AdamW, matrices through a `ShardExchange`.

    Invariants: after `bind`, every tensor of every param group is one shard of the table, and every
    step orthogonalises exactly the matrices that the table assigns to this rank. Learning rate and
    weight decay are read from the param group in every step.

    Dtypes: masters, gradients and moments are fp32. Momentum is accumulated in fp32 and rounded to
    the exchange's wire dtype only on its way to the owner.

    Attributes:
        matrix_update: Update rule for matrices.
        table: The stage's parameters; empty before `bind`.
        timer: Milliseconds of the phases ``collect`` (momentum, packing, waiting for matrices),
            ``newton_schulz``, ``return`` (waiting for updates, unpacking, applying) and ``adamw``.
        last_step: Work of the last step.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        matrix_update: MatrixUpdate | None = None,
    ) -> None:
        """Set up the param groups.

        Args:
            params: Parameters or param groups, as for any torch optimizer.
            lr: Learning rate of matrices and of vector parameters.
            betas: AdamW's decay rates of first and second moment.
            eps: AdamW's term in the denominator.
            weight_decay: Decoupled weight decay; multiplied by the learning rate, not by Muon's
                scale factor.
            matrix_update: Update rule for matrices; Muon with the paper's constants if not given.
        """
        self.matrix_update: MatrixUpdate = matrix_update or Muon(MuonConfig())
        self._bound: list[list[BoundShard]] | None = None
        self._exchange: ShardExchange | None = None
        self._planned: tuple[str, ...] = ()
        self.table = ParameterTable((), Assignment((), (0,)))
        self.timer = PhaseTimer()
        self.last_step = StepReport(0, 0)
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True
        )
        # One count per group instead of torch's count per tensor: matrices need none, and the
        # state of a tensor then holds only fp32 moments of its size, all of them saved by name.
        for group in self.param_groups:
            group.setdefault("step", 0)

    def bind(
        self,
        shards: Iterable[tuple[Tensor, Shard]],
        table: ParameterTable,
        exchange: ShardExchange | None,
    ) -> None:
        """Bind each tensor of the param groups to its shard, and allocate the state.

        Args:
            shards: Each tensor of the param groups (the object itself) with its shard.
            table: The stage's parameters.
            exchange: Moves the table's matrices; ``None`` only for a table without matrices.

        Raises:
            RuntimeMismatch: Tensors and shards, or table and exchange, do not match.
        """
        bound = bind_shards([group["params"] for group in self.param_groups], shards, table)
        check_exchange(table, exchange, bound)
        self._bound, self._exchange = bound, exchange
        self.table = table
        self.timer = PhaseTimer(next((b.tensor.device for b in chain(*bound)), "cpu"))
        # From the table and not from the exchange, so that each step compares what the exchange did
        # with something that the exchange did not compute.
        self._planned = table.owned_by(exchange.rank) if exchange else ()
        # Allocated here and not in the first step, so that a checkpoint before the first step has
        # the same state names as a later one.
        for b in chain.from_iterable(bound):
            keys = self.matrix_update.state_names if b.is_matrix else _VECTOR_STATE
            self.state[b.tensor] = {key: torch.zeros_like(b.tensor) for key in keys}

    @override
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every shard once.

        Collectives: two all-to-alls per bucket over the stage group, if the stage has matrices.
        Every rank of the group must call, also one without shards.

        Raises:
            RuntimeMismatch: Not bound yet, a closure, a shard without gradient, or other matrices
                orthogonalised than planned.
        """
        if closure is not None:
            raise RuntimeMismatch("MuonAdamW.step takes no closure")
        groups = self._groups()
        # Before anything changes: an error here leaves masters, moments and step count at the end
        # of one and the same step.
        lost = [b.name for _, bound in groups for b in bound if b.tensor.grad is None]
        if lost:
            raise RuntimeMismatch(
                f"{len(lost)} shards have no gradient, the first is {lost[0]}; stepping would "
                "leave them behind. Freeze parameters before the optimizer is built."
            )
        with self.timer.phase("adamw"):
            for group, bound in groups:
                group["step"] += 1
                self._step_vectors(group, [b.tensor for b in bound if not b.is_matrix])
        if self._exchange is not None:
            self._step_matrices(self._exchange)

    def _step_vectors(self, group: dict[str, Any], tensors: list[Tensor]) -> None:
        """Update the vector shards of one group by torch's functional AdamW."""
        if not tensors:
            return
        beta1, beta2 = group["betas"]
        # The function increments the step count of every tensor itself. One count per group is
        # enough, since all tensors are updated in every step. The counts are on the CPU on purpose:
        # torch reads them on the host, and counts on an accelerator would make it wait for each.
        before = torch.full((len(tensors),), float(group["step"] - 1))
        adamw(
            tensors,
            [_gradient(tensor) for tensor in tensors],
            [self.state[tensor]["exp_avg"] for tensor in tensors],
            [self.state[tensor]["exp_avg_sq"] for tensor in tensors],
            [],
            list(before.unbind()),
            foreach=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_matrices(self, exchange: ShardExchange) -> None:
        """Accumulate momentum, orthogonalise on the owners, decay weights and apply the updates."""
        sent_before = exchange.bytes_sent
        masters = [(group, [b for b in bound if b.exchanged]) for group, bound in self._groups()]
        done: list[MuonMatrix] = []

        def update(matrices: tuple[MuonMatrix, ...], batch: Tensor) -> Tensor:
            done.extend(matrices)
            with self.timer.phase("newton_schulz"):
                # The rows of a block are adjacent and all matrices of a batch have the same blocks,
                # so a view turns each block into a matrix of the batch.
                blocks = batch.view(-1, *matrices[0].block_shape)
                return self.matrix_update.update(blocks).reshape(batch.shape)

        with self.timer.phase("collect"):
            directions = self._accumulate([b for _, chosen in masters for b in chosen])
        updates = exchange.transform(directions, update, self.timer)
        # Before the updates are applied: the update of a wrong set of matrices reaches no weight.
        self._check_done([matrix.name for matrix in done])
        with self.timer.phase("return"):
            for group, chosen in masters:
                if chosen:
                    tensors = [b.tensor for b in chosen]
                    # Decay before the update, as AdamW does: the update itself is not decayed. In
                    # place, because an fp32 model's masters are views of its parameters.
                    torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])
                    steps = [updates[b.name] for b in chosen]
                    torch._foreach_add_(tensors, steps, alpha=-group["lr"])
        self.last_step = StepReport(
            sum(matrix.blocks for matrix in done), exchange.bytes_sent - sent_before
        )

    def _accumulate(self, bound: list[BoundShard]) -> dict[str, Tensor]:
        """Update the moments of matrices; return what is sent to the owners, by parameter name."""
        if not bound:
            return {}  # the foreach functions refuse empty lists
        gradients = [_gradient(b.tensor) for b in bound]
        state = {
            key: [self.state[b.tensor][key] for b in bound]
            for key in self.matrix_update.state_names
        }
        sent = self.matrix_update.accumulate(gradients, state)
        return {b.name: tensor for b, tensor in zip(bound, sent, strict=True)}

    def _check_done(self, done: list[str]) -> None:
        """Raise unless exactly the planned matrices were orthogonalised."""
        missing, surplus = coverage(done, self._planned)
        if missing or surplus:
            raise RuntimeMismatch(
                f"this rank orthogonalised {len(done)} matrices, planned were "
                f"{len(self._planned)}: missing {missing}, not planned {surplus}"
            )

    def zero_moments(self) -> None:
        """Zero all moments and AdamW's step count; parameters are unchanged."""
        for group, bound in self._groups():
            group["step"] = 0
            for b in bound:
                for moment in self.state[b.tensor].values():
                    moment.zero_()

    @property
    def has_matrices(self) -> bool:
        """Whether some rank of this stage has matrices to orthogonalise."""
        return self._exchange is not None

    @property
    def planned_calls(self) -> int:
        """Number of matrices that this rank orthogonalises in every step."""
        return sum(matrix.blocks for matrix in self._exchange.owned) if self._exchange else 0

    @property
    def balance(self) -> float:
        """Largest divided by mean Newton-Schulz cost of the ranks of the stage; 1 is best."""
        return self.table.assignment.balance

    @property
    def step_count(self) -> int:
        """Steps since the moments were last zeroed, for AdamW's bias correction."""
        return int(self.param_groups[0]["step"]) if self.param_groups else 0

    def named_state(self) -> dict[str, dict[str, Tensor]]:
        """Return state name -> parameter name -> this rank's flat tensor (not copied)."""
        keys = (*self.matrix_update.state_names, *_VECTOR_STATE)
        named: dict[str, dict[str, Tensor]] = {key: {} for key in keys}
        for _, bound in self._groups():
            for b in bound:
                for key, moment in self.state[b.tensor].items():
                    named[key][b.name] = moment
        return named

    @torch.no_grad()
    def load_named_state(self, state: Mapping[str, Mapping[str, Tensor]], *, step: int) -> None:
        """Overwrite the moments with those of a checkpoint.

        Args:
            state: What `named_state` returned when it was saved.
            step: `step_count` when it was saved.

        Raises:
            CheckpointError: Names or sizes differ from what this rank holds.
        """
        own = self.named_state()
        # Check everything before the first copy, so that a state that does not fit changes nothing.
        for key, tensors in own.items():
            given = state.get(key, {})
            missing, surplus = coverage(list(given), tensors)
            resized = [n for n in tensors if n in given and given[n].numel() != tensors[n].numel()]
            if missing or surplus or resized:
                raise CheckpointError(
                    f"inner optimizer state {key} does not fit this rank: missing {missing}, "
                    f"unknown {surplus}, of another size {resized}"
                )
        for key, tensors in own.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[key][name].view_as(tensor))
        for group in self.param_groups:
            group["step"] = step

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state.

        Raises:
            RuntimeMismatch: Called after `bind`. Megatron would save Adam's moments only.
        """
        # Not refused before `bind`, because Megatron's DistributedOptimizer loads the state dict of
        # the optimizer that it is constructed with back into it, after replacing its param groups.
        self._refuse_after_bind("state_dict", "named_state")
        return super().state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load torch's state.

        Raises:
            RuntimeMismatch: Called after `bind`, as for `state_dict`.
        """
        self._refuse_after_bind("load_state_dict", "load_named_state")
        super().load_state_dict(state_dict)

    def _refuse_after_bind(self, method: str, instead: str) -> None:
        if self._bound is not None:
            raise RuntimeMismatch(
                f"MuonAdamW.{method} was called on bound shards. Megatron's optimizer checkpoints "
                "know only Adam's moments and would lose the momentum of matrices; use "
                f"{instead}() and the checkpoints of this package."
            )

    def _groups(self) -> list[tuple[dict[str, Any], list[BoundShard]]]:
        if self._bound is None:
            raise RuntimeMismatch(
                "MuonAdamW is not bound to its shards yet; call bind() after Megatron's "
                "DistributedOptimizer was constructed."
            )
        # Read anew in every call: the schedule writes learning rate and decay into these dicts.
        return list(zip(self.param_groups, self._bound, strict=True))


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "step() has checked every gradient"
    return tensor.grad


# ---- binding -------------------------------------------------------------------------------------


def bind_shards(
    groups: Sequence[Sequence[Tensor]],
    shards: Iterable[tuple[Tensor, Shard]],
    table: ParameterTable,
) -> list[list[BoundShard]]:
    """Match the tensors of the param groups with their shards, from both sides.

    The param groups hold the masters of Megatron's DistributedOptimizer, while the table is built
    from names and shapes. A shard that only one of the two contains would silently not be updated.

    Args:
        groups: The tensors of the param groups.
        shards: The same tensor objects with their shards, in any order.
        table: The stage's parameters.

    Returns:
        The bound shards of each group, in the order of its tensors.

    Raises:
        RuntimeMismatch: A tensor without shard, a shard without tensor, or one of a wrong shape.
    """
    # By identity: masters have no names, and ``==`` of tensors compares their elements.
    by_id = {id(tensor): shard for tensor, shard in shards}
    bound = [[_bind(tensor, by_id, table) for tensor in group] for group in groups]
    flat = list(chain.from_iterable(bound))
    held = {id(b.tensor) for b in flat}
    missing = sorted(shard.name for key, shard in by_id.items() if key not in held)
    names = [b.name for b in flat]
    _, repeated = coverage(names, names)
    if missing or repeated:
        raise RuntimeMismatch(
            "the inner optimizer's param groups do not hold each shard of this rank once: missing "
            f"{missing}, more than once {repeated}"
        )
    return bound


def _bind(tensor: Tensor, by_id: Mapping[int, Shard], table: ParameterTable) -> BoundShard:
    """Return the bound shard of one tensor.

    Raises:
        RuntimeMismatch: The tensor has no shard, or does not match it.
    """
    if id(tensor) not in by_id:
        raise RuntimeMismatch(
            f"a tensor of shape {tuple(tensor.shape)} in the inner optimizer's param groups has no "
            "shard; every tensor must be bound."
        )
    shard = by_id[id(tensor)]
    if shard.name not in table.routes:
        raise RuntimeMismatch(f"{shard.name} is not in the parameter table of this stage")
    if tensor.shape != (shard.numel,) or tensor.dtype != torch.float32:
        raise RuntimeMismatch(
            f"{shard.name}: the master must be a flat float32 tensor of {shard.numel} elements, "
            f"not {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return BoundShard(shard.name, tensor, table.routes[shard.name] == "matrix")


def check_exchange(
    table: ParameterTable, exchange: ShardExchange | None, bound: Iterable[Sequence[BoundShard]]
) -> None:
    """Raise unless the exchange moves the matrices of the table and the shards that are bound.

    Raises:
        RuntimeMismatch: Matrices or shards are missing or unknown, or matrices are owned by another
            rank than planned.
    """
    moved = [matrix.name for matrix in exchange.matrices] if exchange else []
    missing, surplus = coverage(moved, [matrix.name for matrix in table.matrices])
    owned = [matrix.name for matrix in exchange.owned] if exchange else []
    planned = table.owned_by(exchange.rank) if exchange else ()
    absent, foreign = coverage(owned, planned)
    if missing or surplus or absent or foreign:
        raise RuntimeMismatch(
            "exchange and parameter table disagree, so a matrix would be left without Muon: "
            f"missing {missing}, not planned {surplus}; owned by this rank in the table alone "
            f"{absent}, in the exchange alone {foreign}"
        )
    held = exchange.shard_names if exchange else ()
    lost, unknown = coverage((b.name for b in chain.from_iterable(bound) if b.exchanged), held)
    if lost or unknown:
        raise RuntimeMismatch(
            "param groups and exchange disagree about the matrix shards of this rank: in the "
            f"exchange alone {lost}, in the param groups alone {unknown}"
        )
