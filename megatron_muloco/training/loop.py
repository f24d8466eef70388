"""The training loop, in the words of the papers.

::

    every inner step t:   theta_k <- inner optimizer(theta_k, gradients of replica k's samples)
    every round:          D_k = theta - theta_k;  theta <- outer optimizer(theta, mean_k D_k)
"""

import time
from enum import Enum

import torch

from megatron_muloco.checkpoint.io import digests_of
from megatron_muloco.checkpoint.layout import checkpoint_path
from megatron_muloco.checkpoint.state import ANCHOR
from megatron_muloco.config import RunConfig
from megatron_muloco.errors import CheckpointError
from megatron_muloco.monitor.monitor import Value
from megatron_muloco.optim.muon import MuonAdamW
from megatron_muloco.outer.diagnostics import OuterReport
from megatron_muloco.runtime.distributed import shutdown
from megatron_muloco.training.build import Trainer, build_trainer, scalars_of
from megatron_muloco.training.forward import anchor_in_place, evaluate, generate
from megatron_muloco.training.replica_optimizer import InnerReport
from megatron_muloco.training.stopping import StopRequest

__all__ = ["Outcome", "inner_step", "outer_step", "run", "train"]

# Chosen: below 1, so that a small model keeps to what it knows best.
_SAMPLE_TEMPERATURE = 0.8


class Outcome(Enum):
    """How a run ended."""

    DONE = "done"
    STOPPED = "stopped on request; state saved"
    UNSAVED = "stopped on request; checkpoint.dir is not set, so nothing was saved"
    SAVE_FAILED = "ended without its last save; the checkpoint before it is whole"


def run(config: RunConfig, stop: StopRequest) -> Outcome:
    """Build a trainer, train to the end or to a stop request, and leave the job."""
    trainer = build_trainer(config)
    outcome = train(trainer, stop)
    trainer.monitor.close(outcome.value)
    shutdown()
    return outcome


def train(trainer: Trainer, stop: StopRequest) -> Outcome:
    """Make all inner and outer steps that are left."""
    last_step, stop_after = trainer.derived.train_iters, None
    if trainer.first_step == 1 and trainer.config.training.eval_interval:
        _evaluate(trainer, 0)
    for step in range(trainer.first_step, last_step + 1):
        stop_after = inner_step(trainer, step, stop, stop_after)
        outer_step(trainer, step)
        if _is_due(step, trainer.config.training.eval_interval) and step < last_step:
            _evaluate(trainer, step)
        if step == stop_after and step < last_step:
            return _stop(trainer, step)
        if _is_due(step, trainer.config.checkpoint.save_interval) and step < last_step:
            _announce(trainer, step)
            _save(trainer, step)
        stop_after = stop_after or _stop_decision(trainer, step)
    return _finish(trainer, last_step)


def inner_step(
    trainer: Trainer, step: int, stop: StopRequest, stop_after: int | None
) -> int | None:
    """Forward, backward and inner optimizer of this replica; return the agreed last step, if any.

    Collectives: inside the replica only.
    """
    data, count = trainer.train_data, trainer.derived.num_microbatches
    trainer.model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    loss = trainer.forward((data.microbatch(step, index) for index in range(count)), count)
    started = time.perf_counter()
    report = trainer.optimizer.inner_step()
    elapsed_ms = (time.perf_counter() - started) * 1e3
    loss, stop_wanted, stop_after = _share(trainer, loss / count, stop.requested, stop_after)
    if stop_wanted and trainer.groups.is_leader:
        trainer.agreement.request()
    trainer.monitor.record(step, _metrics(trainer, step, report, loss, elapsed_ms))
    return stop_after


def _share(
    trainer: Trainer, loss: torch.Tensor, stop_requested: bool, stop_after: int | None
) -> tuple[torch.Tensor, bool, int | None]:
    """Sum over the replica: its mean loss, whether a rank shall stop, the leader's last step.

    Collectives: one all-reduce of three fp64 numbers over the replica.
    """
    groups = trainer.groups
    speaks = groups.on_last_stage and groups.coords.tp == 0 and groups.coords.cp == 0
    leads = groups.is_leader and stop_after is not None
    shared = torch.zeros(3, dtype=torch.float64, device=loss.device)
    if speaks:
        shared[0] = loss / groups.topology.data
    shared[1] = float(stop_requested)
    shared[2] = float(stop_after or 0) if leads else 0.0
    if groups.topology.replica_size > 1:
        torch.distributed.all_reduce(shared, group=groups.replica)
    _, requests, agreed = shared.tolist()
    return shared[0], requests > 0, int(agreed) or None


def outer_step(trainer: Trainer, step: int) -> OuterReport | None:
    """Make the outer steps due after inner step ``step``.

    Collectives: over outer groups and replicas when something is due, none otherwise.
    """
    riders = trainer.monitor.riders(step)
    if trainer.optimizer.waits_after(step):
        _announce(trainer, step)
    report = trainer.optimizer.outer_step(riders)
    if report is not None:
        trainer.monitor.outer_step(report)
        _tell_left_out(trainer, report)
    return report


def _tell_left_out(trainer: Trainer, report: OuterReport) -> None:
    """Say which replicas have no part in a mean; the weights are the same on all of them."""
    for part in report.applied:
        left_out = [replica for replica, weight in enumerate(part.weights.tolist()) if not weight]
        if left_out:
            consequence = "; NO REPLICA IS LEFT, the anchor did not move" if report.alarm else ""
            trainer.monitor.say(
                f"outer step after iteration {report.step}: replicas {left_out} have weight 0 in "
                f"fragment {part.fragment} (left out by the guard, or nothing trained)"
                f"{consequence}"
            )


def _announce(trainer: Trainer, step: int) -> None:
    """Tell the other replicas that this one waits for them next, after inner step ``step``."""
    if trainer.groups.is_leader:
        trainer.agreement.announce(step)


def _stop_decision(trainer: Trainer, step: int) -> int | None:
    """Return the agreed last step, on a leader only; its ranks learn it with the next loss."""
    return trainer.agreement.decide(step) if trainer.groups.is_leader else None


def _metrics(
    trainer: Trainer, step: int, report: InnerReport, loss: torch.Tensor, elapsed_ms: float
) -> dict[str, Value]:
    """Return what the monitor records of an inner step; costly numbers only when a line is due."""
    inner = trainer.optimizer.inner
    metrics: dict[str, Value] = {
        "lm loss": loss,
        "learning-rate": report.lr,
        "grad-norm": report.grad_norm,
        "perf/inner_optimizer_ms": elapsed_ms,
    }
    if trainer.probe is not None:
        metrics["muon/ns_calls"] = inner.last_step.newton_schulz_calls
        metrics["muon/balance"] = inner.balance
        if trainer.monitor.due(step):
            metrics |= trainer.probe.take()
    if trainer.monitor.due(step):
        metrics |= _phase_times(inner, trainer.config.monitor.log_interval)
    return metrics


def _phase_times(inner: MuonAdamW, steps: int) -> dict[str, Value]:
    """Return the mean time of each phase of the inner optimizer over the last ``steps`` steps."""
    phases = ("adamw", "collect", "newton_schulz", "return") if inner.has_matrices else ("adamw",)
    taken = inner.timer.take()
    return {f"perf/{phase}_ms": taken.get(phase, 0.0) / steps for phase in phases}


def _evaluate(trainer: Trainer, step: int) -> None:
    """Write the held-out loss of the anchor, where the run has held-out data."""
    if trainer.valid_data is None:
        return
    with trainer.monitor.paused():
        loss = evaluate(
            trainer.forward,
            trainer.optimizer,
            trainer.valid_data,
            trainer.groups,
            steps=trainer.config.training.eval_iters,
        )
        trainer.monitor.evaluation(step, loss)


def _stop(trainer: Trainer, step: int) -> Outcome:
    """End a run that was asked to stop."""
    if trainer.store is None:
        return Outcome.UNSAVED
    return Outcome.STOPPED if _save(trainer, step) else Outcome.SAVE_FAILED


def _save(trainer: Trainer, step: int) -> bool:
    """Publish a checkpoint of ``step``, where checkpoints are kept; return whether none is missing.

    A full disk does not end a run that can train on: it is reported, and tried again when the next
    checkpoint is due.

    Collectives: of the whole job.
    """
    if trainer.store is None:
        return True
    with trainer.monitor.paused():
        trainer.state.scalars.update(scalars_of(step, trainer.config))
        try:
            path = trainer.store.save(step, trainer.state)
        except CheckpointError as error:  # the same on all ranks
            trainer.monitor.say(f"NOT SAVED: {error}")
            return False
        trainer.monitor.say(f"saved {path}")
    return True


def _finish(trainer: Trainer, last_step: int) -> Outcome:
    """Save, flush, store the flushed anchor beside the checkpoint, and evaluate it."""
    _announce(trainer, last_step + 1)
    saved = trainer.first_step > last_step or _save(trainer, last_step)
    report = trainer.optimizer.flush()
    if report is not None:
        trainer.monitor.outer_step(report)
    saved = saved and _save_final_anchor(trainer, last_step)
    _evaluate(trainer, last_step)
    _sample(trainer)
    state = trainer.state
    digests = digests_of(state.groups, state.view.shards, {ANCHOR: state.anchors()})
    trainer.monitor.say(f"final anchor digest: {digests[ANCHOR]}")
    return Outcome.DONE if saved else Outcome.SAVE_FAILED


def _save_final_anchor(trainer: Trainer, last_step: int) -> bool:
    """Store the flushed anchor, also when only this was missing; return whether nothing failed."""
    if trainer.store is None:
        return True
    if not trainer.store.has(last_step):  # resumed from a finished run elsewhere
        return True
    path = checkpoint_path(trainer.store.directory, last_step)
    try:
        trainer.store.save_final_anchor(path, trainer.state)
    except CheckpointError as error:
        trainer.monitor.say(f"NOT SAVED: {error}")
        return False
    return True


def _sample(trainer: Trainer) -> None:
    """Print what the anchor writes, where the configuration asks for it."""
    monitor = trainer.config.monitor
    if not monitor.sample_tokens or trainer.groups.topology.pipeline > 1:
        return
    prompt = trainer.tokenizer.tokenize(monitor.sample_prompt)
    with trainer.monitor.paused(), anchor_in_place(trainer.optimizer):
        tokens = generate(
            trainer.model.module,
            prompt,
            length=monitor.sample_tokens,
            window=trainer.config.model.seq_length,
            vocab_size=trainer.tokenizer.vocab_size,
            temperature=_SAMPLE_TEMPERATURE,
            seed=trainer.config.training.seed,
        )
    trainer.monitor.sample(trainer.tokenizer.detokenize(prompt + tokens))


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
