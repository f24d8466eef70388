"""Branches of a run: K replicas train from the same weights on the same global batches.

::

                          .- 1 replica,  global batch B       -> D of K = 1
    warm-up, one replica -+- 2 replicas, B/2 samples each     -> D_1, D_2
                          '- 16 replicas, B/16 samples each   -> D_1 ... D_16

A branch inherits weights and inner optimizer state, as replicas do after an outer step. The outer
optimizer has no part in it. All replicas run in this process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megatron_muloco.comm.groups import Groups
from megatron_muloco.config import RunConfig
from megatron_muloco.config.inner import learning_rate
from megatron_muloco.data.checks import check_run_data
from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.pseudogradients import whole_matrices
from megatron_muloco.optim.matrices import LayerShape
from megatron_muloco.training.build import RunContext, RunData, build_context, load_data
from megatron_muloco.training.one_process import run_replicas

__all__ = ["Branch", "Start", "branch", "rates_of", "warm_up"]

Matrices = dict[str, Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Start:
    """State that branches start from.

    Attributes:
        step: Inner steps made so far.
        masters: fp32 parameters, flat, by name.
        moments: Inner optimizer state, by kind and name.
    """

    step: int
    masters: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Branch:
    """What the replicas of a branch trained, at several lengths of the round.

    Attributes:
        pseudogradients: H -> of each replica, its pseudogradient by matrix.
        steps: Of each replica, what every inner step subtracted by matrix; empty if not kept.
    """

    pseudogradients: Mapping[int, Sequence[Matrices]]
    steps: Sequence[Sequence[Matrices]]


def warm_up(config: RunConfig, steps: int) -> Start | None:
    """Train one replica for ``steps`` inner steps; ``None`` for no steps, the initial weights."""
    if not steps:
        return None

    def body(groups: Groups, data: RunData) -> Start:
        context = build_context(config, groups, data, writes=False)
        for step in range(1, steps + 1):
            _inner_step(context, step)
        moments = context.optimizer.inner.named_state()
        return Start(
            step=steps,
            masters=_copies(context.optimizer.view.masters),
            moments={kind: _copies(tensors) for kind, tensors in moments.items()},
        )

    return _run(config, body)[0]


def branch(
    config: RunConfig, start: Start | None, lengths: Sequence[int], *, keep_steps: bool = False
) -> Branch:
    """Train the config's replicas from ``start``, and return their pseudogradients.

    Args:
        config: The configuration, with the number of replicas of this branch.
        start: Where the branch begins; the initial weights if ``None``.
        lengths: Values of H. The branch makes the largest number of steps and looks at its
            parameters after each of these.
        keep_steps: Keep what every inner step subtracted.
    """
    wanted = sorted(set(lengths))

    def body(groups: Groups, data: RunData) -> tuple[dict[int, Matrices], list[Matrices]]:
        context = build_context(config, groups, data, writes=False)
        first = _load(context, start)
        masters = context.optimizer.view.masters
        anchor, before = _copies(masters), _copies(masters)
        seen: dict[int, Matrices] = {}
        steps: list[Matrices] = []
        for made in range(1, wanted[-1] + 1):
            _inner_step(context, first + made)
            if keep_steps:
                after = _copies(masters)
                steps.append(_matrices(context, before, after))
                before = after
            if made in wanted:
                seen[made] = _matrices(context, anchor, masters)
        return seen, steps

    found = _run(config, body)
    return Branch(
        {length: [seen[length] for seen, _ in found] for length in wanted},
        [steps for _, steps in found] if keep_steps else [],
    )


def rates_of(config: RunConfig, first: int, count: int) -> list[float]:
    """Return the learning rates of ``count`` inner steps after step ``first``."""
    iters = config.training.train_iters
    if iters is None:
        raise ConfigError("training.train_iters is not set. Branches need a length in steps.")
    return [learning_rate(config.inner, iters, first + made) for made in range(1, count + 1)]


def _run(config: RunConfig, body: Callable[[Groups, RunData], Result]) -> list[Result]:
    """Run ``body(groups, data)`` for every replica; the data is loaded once."""
    if problems := check_run_data(config):
        raise ConfigError(problems)
    data: RunData | None = None

    def replica(groups: Groups) -> Result:
        nonlocal data
        if data is None:
            data = load_data(config, groups.topology)
        return body(groups, data)

    return run_replicas(config, replica)


def _inner_step(context: RunContext, step: int) -> None:
    """Make one inner step without an outer step."""
    count = context.derived.num_microbatches
    context.model.zero_grad_buffer()
    context.optimizer.zero_grad()
    batches = (context.train_data.microbatch(step, index) for index in range(count))
    context.forward(batches, count)
    report = context.optimizer.inner_step()
    if report.skipped:
        raise ConfigError(
            f"the gradient norm of inner step {step} is not finite, so its pseudogradient has no "
            "meaning. Use a smaller inner.lr."
        )


def _load(context: RunContext, start: Start | None) -> int:
    """Put the start into a newly built run; return the inner steps made so far."""
    if start is None:
        return 0
    optimizer = context.optimizer
    with torch.no_grad():
        for name, master in optimizer.view.masters.items():
            master.copy_(start.masters[name])
    optimizer.inner.load_named_state(start.moments, step=start.step)
    optimizer.view.publish()
    optimizer.steps = start.step
    return start.step


def _matrices(
    context: RunContext, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Matrices:
    """Return ``before - after`` of every matrix that Muon would update."""
    pieces = {}
    for name, info in context.optimizer.view.infos.items():
        difference = (before[name] - after[name].detach()).reshape(info.local_shape)
        pieces[name, 0] = (info, difference)
    return whole_matrices(pieces, LayerShape.from_config(context.config.model))[0]


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
