"""`run` and `train`: the training loop of one rank.

::

    every inner step t:   theta_k <- inner optimizer(theta_k, gradients of replica k's samples)
    every round:          D_k = theta - theta_k;  theta <- outer optimizer(theta, mean_k D_k)

After each inner step the order is: outer step, evaluation, stop or checkpoint, stop decision for
the next step. Between two outer steps a replica waits for others only to evaluate and to save.

A run that trains nothing any more, because steps or rounds have no usable gradients, stops by
itself with its state saved (`ReplicaOptimizer.stalled`).
"""

import sys
import time
from enum import Enum

import torch
from torch.profiler import record_function

from megatron_muloco.checkpoint.io import digests_of, require_finite
from megatron_muloco.checkpoint.layout import checkpoint_path
from megatron_muloco.checkpoint.state import ANCHOR
from megatron_muloco.comm.collectives import sum_over
from megatron_muloco.config import RunConfig
from megatron_muloco.data.batches import BatchSource
from megatron_muloco.errors import CheckpointError
from megatron_muloco.monitor.monitor import Value
from megatron_muloco.monitor.profiler import profiled
from megatron_muloco.optim.muon import MuonAdamW
from megatron_muloco.outer.diagnostics import OuterReport
from megatron_muloco.outer.schedule import Launch
from megatron_muloco.runtime.accelerator import training_device
from megatron_muloco.runtime.distributed import shutdown
from megatron_muloco.training.build import RunContext, StoppedEarlyError, build_run, scalars_of
from megatron_muloco.training.forward import anchor_in_place, evaluate, generate
from megatron_muloco.training.replica_optimizer import InnerReport
from megatron_muloco.training.stopping import StopRequest
from megatron_muloco.training.watch import Watch

__all__ = ["Outcome", "inner_step", "outer_step", "run", "train"]

# Chosen: below 1, because text of a small model is poor at temperature 1.
_SAMPLE_TEMPERATURE = 0.8


class Outcome(Enum):
    """How a run ended."""

    DONE = "done"
    STOPPED = "stopped on request; state saved"
    UNSAVED = "stopped on request; checkpoint.dir is not set, so nothing was saved"
    SAVE_FAILED = "ended because the last save failed"
    STALLED = "stopped because nothing was trained any more; the cause is above"
    NOT_FINITE = "ended with weights that are not finite; earlier checkpoints are unchanged"


def run(config: RunConfig, stop: StopRequest, watch: Watch | None = None) -> Outcome:
    """Build the run, train to the end or to a stop request, and leave the job.

    Collectives: every rank of the job calls it.
    """
    try:
        context = build_run(config, watch, stop)
    except StoppedEarlyError as stopped:
        if torch.distributed.get_rank() == 0:
            sys.stdout.write(f" > outcome:     {stopped}\n")
        return Outcome.STOPPED
    try:
        outcome = train(context, stop)
    finally:
        if context.store is not None:
            context.store.close()
    if context.profiler is not None:
        context.profiler.close()
    context.monitor.close(outcome.value)
    context.watch.enter("the end of the run", patient=True)
    shutdown(context.groups.control)
    context.watch.close()
    return outcome


def train(context: RunContext, stop: StopRequest) -> Outcome:
    """Make the remaining inner and outer steps, with evaluations and checkpoints.

    Collectives: those of `inner_step` and `outer_step`; every rank of the job calls it.
    """
    last_step, stop_after = context.derived.train_iters, None
    if context.first_step == 1 and context.config.training.eval_interval:
        _evaluate(context, 0)
    for step in range(context.first_step, last_step + 1):
        with profiled(context.profiler, step):
            stop_after = inner_step(context, step, stop, stop_after)
            outer_step(context, step)
            # Before anything is evaluated or saved as if the run went on.
            if reason := context.optimizer.stalled():
                return _stalled(context, step, reason)
            _tell_of_saves(context)
            # After the outer step, so that the loss of step t belongs to the anchor of step t. The
            # last step is left to `_finish`, which evaluates and saves around the flush.
            if _is_due(step, context.config.training.eval_interval) and step < last_step:
                _announce(context, step)
                _evaluate(context, step)
            # Before the periodic save, because stopping saves the same step.
            if step == stop_after and step < last_step:
                return _stop(context, step)
            if _is_due(step, context.config.checkpoint.save_interval) and step < last_step:
                _announce(context, step)
                _save(context, step)
            # Last: it may wait for other replicas, so nothing may be left here that they wait for.
            stop_after = stop_after or _stop_decision(context, step)
    return _finish(context, last_step)


def inner_step(
    context: RunContext, step: int, stop: StopRequest, stop_after: int | None
) -> int | None:
    """Make one inner step of this replica; return the agreed last step, or ``None``.

    Collectives: inside the replica only; every rank of the replica calls it.
    """
    context.watch.enter(f"inner step {step}")
    data = context.train_data
    count = data.layout.at(step).num_microbatches
    began = time.perf_counter()
    context.model.zero_grad_buffer()
    context.optimizer.zero_grad()
    with record_function("muloco/forward_backward"):
        loss = context.forward((data.microbatch(step, index) for index in range(count)), count)
    started = time.perf_counter()
    with record_function("muloco/inner_step"):
        report = context.optimizer.inner_step()
    elapsed_ms = (time.perf_counter() - started) * 1e3
    asked = stop.requested or context.stop_file.found()
    loss, stop_wanted, stop_after = _share(context, loss / count, asked, stop_after)
    rolled_back = _watch(context, step, loss) if context.optimizer.spikes.watches_losses else None
    if stop_wanted and context.groups.is_leader:
        context.agreement.request()
    metrics = _metrics(context, step, report, loss, elapsed_ms)
    if rolled_back is not None:
        metrics["rolled-back"] = float(rolled_back)
    # Of the whole replica, and of the device too: `_share` has waited for both.
    metrics["perf/replica_step_ms"] = (time.perf_counter() - began) * 1e3
    context.monitor.record(step, metrics)
    return stop_after


def _watch(context: RunContext, step: int, loss: torch.Tensor) -> bool:
    """Set this replica back to the anchor if its loss has been high for too long.

    The replica says so itself: no other one, and not the writing rank, learns of it.

    Collectives: inside the replica, if it goes back; every rank of the replica calls it.
    """
    with record_function("muloco/watch_loss"):
        rolled_back = context.optimizer.watch_loss(float(loss))
    if rolled_back and context.groups.is_leader:
        spikes = context.config.training.spikes
        sys.stderr.write(
            f"replica {context.groups.coords.replica}: after iteration {step} set back to the "
            f"anchor, with inner moments of zero: its loss ({float(loss):.4g}) was above "
            f"{spikes.max_loss_ratio:g} times the median of {spikes.window} steps for "
            f"{spikes.patience} steps\n"
        )
    return rolled_back


def _share(
    context: RunContext, loss: torch.Tensor, stop_requested: bool, stop_after: int | None
) -> tuple[torch.Tensor, bool, int | None]:
    """Share three numbers within the replica: mean loss, stop request, agreed last step.

    A stop signal may reach any rank, but all ranks of a replica must act on it after the same step,
    or the rest would hang in the next collective. So both the request and the leader's decision
    travel with the loss.

    Collectives: one all-reduce of 24 bytes (three fp64 numbers) over the replica.
    """
    groups = context.groups
    is_primary = groups.on_last_stage and groups.coords.tp == 0
    leads = groups.is_leader and stop_after is not None
    shared = torch.zeros(3, dtype=torch.float64, device=loss.device)
    if is_primary:
        shared[0] = loss / groups.topology.data
    shared[1] = float(stop_requested)
    shared[2] = float(stop_after or 0) if leads else 0.0
    if groups.topology.replica_size > 1:
        shared = sum_over(groups.replica, shared)
    _, requests, agreed = shared.tolist()
    return shared[0], requests > 0, int(agreed) or None


def outer_step(context: RunContext, step: int) -> OuterReport | None:
    """Make the outer steps that are due after inner step ``step``.

    Collectives: over outer groups and replicas when an outer step is due, none otherwise.
    """
    line_values = context.monitor.line_values(step)
    if context.optimizer.waits_after(step):
        context.watch.enter(_outer_work(context, step))
        _announce(context, step)
    report = context.optimizer.outer_step(line_values)
    if report is not None:
        context.monitor.outer_step(report)
        _report_excluded(context, report)
    return report


def _outer_work(context: RunContext, step: int) -> str:
    """Return what the outer step after inner step ``step`` waits for, for the watch."""
    schedule = context.optimizer.schedule
    events = () if schedule is None else schedule.events(step)
    parts = [
        f"{'launch' if isinstance(event, Launch) else 'apply'} of fragment {event.fragment} of "
        f"round {schedule.round(getattr(event, 'launched_at', step))}"
        for event in events
        if schedule is not None
    ]
    what = ", ".join(parts) or "a reduction in flight"
    return f"the outer step after inner step {step} ({what})"


def _report_excluded(context: RunContext, report: OuterReport) -> None:
    """Print which replicas were excluded from a mean; all replicas know the same weights."""
    for part in report.applied:
        excluded = [replica for replica, weight in enumerate(part.weights.tolist()) if not weight]
        if excluded:
            consequence = "; NO REPLICA IS LEFT, the anchor did not change" if report.alarm else ""
            context.monitor.say(
                f"outer step after iteration {report.step}: replicas {excluded} have weight 0 in "
                f"fragment {part.fragment} (excluded by the guard, or trained on no step)"
                f"{consequence}"
            )


def _announce(context: RunContext, step: int) -> None:
    """Announce that this replica will wait for the others next, after inner step ``step``.

    A leader that waits for posts must know of it.
    """
    if context.groups.is_leader:
        context.agreement.announce(step)


def _stop_decision(context: RunContext, step: int) -> int | None:
    """Return the agreed last step on a leader; the other ranks get it with the next loss."""
    if not context.groups.is_leader:
        return None
    context.watch.enter(f"the agreement on a stop after inner step {step}")
    return context.agreement.decide(step)


def _metrics(
    context: RunContext, step: int, report: InnerReport, loss: torch.Tensor, elapsed_ms: float
) -> dict[str, Value]:
    """Return the metrics of an inner step; expensive ones only when a console line is due."""
    inner = context.optimizer.inner
    metrics: dict[str, Value] = {
        "lm loss": loss,
        "learning-rate": report.lr,
        "grad-norm": report.grad_norm,
        "skipped": float(report.skipped),
        "perf/inner_optimizer_ms": elapsed_ms,
    }
    if context.probe is not None:
        metrics["muon/ns_calls"] = inner.last_step.newton_schulz_calls
        metrics["muon/balance"] = inner.balance
        if context.monitor.due(step):
            metrics |= context.probe.take()
    if context.monitor.due(step):
        metrics |= _phase_times(inner, context.config.monitor.log_interval)
    return metrics


def _phase_times(inner: MuonAdamW, steps: int) -> dict[str, Value]:
    """Return the mean time of each phase of the inner optimizer over the last ``steps`` steps."""
    phases = ("adamw", "collect", "newton_schulz", "return") if inner.has_matrices else ("adamw",)
    taken = inner.timer.take()
    return {f"perf/{phase}_ms": taken.get(phase, 0.0) / steps for phase in phases}


def _evaluate(context: RunContext, step: int) -> None:
    """Record the held-out loss of the anchor if the run has held-out data."""
    if context.valid_data is not None:
        context.watch.enter(f"the evaluation after inner step {step}", patient=True)
        with context.monitor.paused("evaluation"):
            context.monitor.evaluation(step, _loss_on(context, context.valid_data))


def _test(context: RunContext, step: int) -> None:
    """Record the anchor's loss on ``data.test`` at the end of the run, if there is such data."""
    if context.test_data is not None:
        context.watch.enter("the test evaluation", patient=True)
        with context.monitor.paused():
            context.monitor.test(step, _loss_on(context, context.test_data))


def _loss_on(context: RunContext, source: BatchSource) -> float:
    """Return the anchor's loss on held-out data; collectives as in `evaluate`."""
    with record_function("muloco/evaluate"):
        return evaluate(
            context.forward,
            context.optimizer,
            source,
            context.groups,
            steps=context.config.training.eval_iters,
        )


def _stop(context: RunContext, step: int) -> Outcome:
    """Save, if the run has a checkpoint directory, and return how the run ends."""
    if context.store is None:
        return Outcome.UNSAVED
    saved = _save(context, step) and _saves_are_done(context)
    context.stop_file.remove()
    return Outcome.STOPPED if saved else Outcome.SAVE_FAILED


def _stalled(context: RunContext, step: int, reason: str) -> Outcome:
    """Save what there is and end the run; all ranks of the job come here after the same step.

    Nothing is pruned, so the last state before the trouble stays beside the one of now.
    """
    _announce(context, step)
    saved = context.store is not None and _save(context, step) and _saves_are_done(context)
    remedy = (
        "Look for bad data or a bad machine; then start again, from an older checkpoint "
        "(checkpoint.resume) if the weights themselves are at fault."
    )
    state = "The state is saved" if saved else "The state was not saved; earlier checkpoints stay"
    context.monitor.say(f"STOPPED after iteration {step}: {reason}. {state}. {remedy}")
    return Outcome.STALLED


def _save(context: RunContext, step: int) -> bool:
    """Save a checkpoint of ``step`` if the run has a directory; return False if saving failed.

    A failure, such as a full disk or values that are not finite, does not end the run. It is
    reported, and the next checkpoint is tried when it is due. While the run does not advance, a
    save deletes no older checkpoint.

    Collectives: over the whole job; every rank calls it after the same step.
    """
    if context.store is None:
        return True
    began = time.perf_counter()
    context.watch.enter(f"the save after inner step {step}", patient=True)
    with context.monitor.paused("save"), record_function("muloco/save"):
        context.state.scalars.update(scalars_of(step, context.train_data.layout))
        try:
            path = context.store.save(step, context.state, prune=context.optimizer.advances)
        except CheckpointError as error:  # raised on all ranks alike
            _not_saved(context, step, str(error))
            return False
        finally:
            _tell_of_saves(context)  # of the one before it, which this one has waited for
        in_background = context.config.checkpoint.async_save
        context.monitor.say(f"writing {path}" if in_background else f"saved {path}")
    context.monitor.scalars(step, {"checkpoint/held_s": time.perf_counter() - began})
    return True


def _tell_of_saves(context: RunContext) -> None:
    """Drive a save in the background, and say how it ended once it has; never waits."""
    result = None if context.store is None else context.store.poll()
    if result is None:
        return
    if result.error:
        _not_saved(
            context,
            result.step,
            f"{result.path} could not be written: {result.error}. "
            "Training state and earlier checkpoints are unchanged. Free space or change "
            "checkpoint.dir.",
        )
    else:
        context.monitor.say(f"saved {result.path}")


def _saves_are_done(context: RunContext) -> bool:
    """Wait for a save in the background; return False if the last one failed.

    Collectives: those of `CheckpointStore.wait`; every rank calls it at the same point.
    """
    if context.store is None:
        return True
    with context.monitor.paused():
        done = context.store.wait()
    _tell_of_saves(context)
    return done


def _not_saved(context: RunContext, step: int, why: str) -> None:
    """Report a failed save: a line with what is still whole, and a metric."""
    assert context.store is not None
    context.store.failures += 1
    context.monitor.say(f"NOT SAVED: {why} {context.store.standing()}")
    context.monitor.scalars(step, {"checkpoint/failed_saves": context.store.failures})


def _finish(context: RunContext, last_step: int) -> Outcome:
    """Save, flush, store the flushed anchor beside the checkpoint, and evaluate it.

    Collectives: over the whole job.
    """
    # The save and the flush wait for all replicas, so leaders that wait for posts must train on.
    _announce(context, last_step + 1)
    # Saved before the flush: a run that resumes with more steps goes on from the unflushed state,
    # so that it is bitwise equal to a run that never ended here.
    saved = context.first_step > last_step or _save(context, last_step)
    context.watch.enter("the last outer step")
    report = context.optimizer.flush()
    if report is not None:
        context.monitor.outer_step(report)
    saved = saved and _saves_are_done(context) and _save_final_anchor(context, last_step)
    context.stop_file.remove()
    _evaluate(context, last_step)
    _test(context, last_step)
    _sample(context)
    state = context.state
    kinds = {ANCHOR: state.anchors()}
    digests = digests_of(state.groups, state.view.shards, kinds, training_device())
    context.monitor.say(f"final anchor digest: {digests[ANCHOR]}")
    try:
        require_finite(state, kinds)
    except CheckpointError as error:  # raised on all ranks alike
        context.monitor.say(f"THE RUN HAS FAILED: {error}")
        return Outcome.NOT_FINITE
    return Outcome.DONE if saved else Outcome.SAVE_FAILED


def _save_final_anchor(context: RunContext, last_step: int) -> bool:
    """Store the flushed anchor in the last checkpoint; return False if saving failed.

    A run that resumes after its last step comes here too, in case only this file was missing.
    """
    if context.store is None:
        return True
    if not context.store.has(last_step):  # resumed from a finished run in another directory
        return True
    context.watch.enter("the save of the final anchor", patient=True)
    path = checkpoint_path(context.store.directory, last_step)
    try:
        context.store.save_final_anchor(path, context.state)
    except CheckpointError as error:
        _not_saved(context, last_step, str(error))
        return False
    return True


def _sample(context: RunContext) -> None:
    """Print text generated from the anchor if the configuration asks for it."""
    monitor = context.config.monitor
    topology = context.groups.topology
    if not monitor.sample_tokens or topology.pipeline > 1 or topology.context > 1:
        return
    prompt = context.tokenizer.tokenize(monitor.sample_prompt)
    with context.monitor.paused(), anchor_in_place(context.optimizer):
        tokens = generate(
            context.model.module,
            prompt,
            length=monitor.sample_tokens,
            window=context.config.model.seq_length,
            vocab_size=context.tokenizer.vocab_size,
            temperature=_SAMPLE_TEMPERATURE,
            seed=context.config.training.seed,
        )
    context.monitor.sample(context.tokenizer.detokenize(prompt + tokens))


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
