"""`build_run`: builds everything that one rank needs to train, from a checked configuration.

The order: process groups, data, model, optimizer with the outer step, checkpoint to resume from,
monitor. `RunContext` holds the result for the training loop.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_muloco.checkpoint.changes import change_notes
from megatron_muloco.checkpoint.directory import everywhere
from megatron_muloco.checkpoint.state import RunState, format_note
from megatron_muloco.checkpoint.store import CheckpointStore
from megatron_muloco.comm.collectives import gather_objects, job_store
from megatron_muloco.comm.groups import Groups
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import Derived, batch_schedule, derive
from megatron_muloco.data.batches import BatchSource, IdRange, SampleDataset
from megatron_muloco.data.datasets import Datasets, build_datasets
from megatron_muloco.data.sampler import BatchLayout, RunLayout, batch_layout, run_layout
from megatron_muloco.data.tokenizer import Tokenizer, load_tokenizer, masks_padding
from megatron_muloco.errors import CheckpointError, ConfigError, MulocoError
from megatron_muloco.model.attention import AttentionBackend
from megatron_muloco.model.attention_backends import choose_attention
from megatron_muloco.model.build import build_model
from megatron_muloco.model.fused import Fusions, choose_fusions
from megatron_muloco.model.initialise import has_poison
from megatron_muloco.monitor.build import build_monitor
from megatron_muloco.monitor.diagnostics import OrthogonalisationProbe
from megatron_muloco.monitor.monitor import Monitor
from megatron_muloco.monitor.profiler import StepProfiler, build_profiler
from megatron_muloco.optim.muon import Muon
from megatron_muloco.optim.parameter_table import ParameterReport, ParameterTable, parameter_report
from megatron_muloco.planning.memory import checkpoint_bytes, memory_plan
from megatron_muloco.planning.report import refusal, render_plan
from megatron_muloco.planning.verdict import Device, judge
from megatron_muloco.runtime.accelerator import training_device
from megatron_muloco.runtime.megatron import wrap_data_parallel
from megatron_muloco.topology import Topology
from megatron_muloco.training.build_optimizer import build_replica_optimizer
from megatron_muloco.training.forward import ForwardBackward
from megatron_muloco.training.replica_optimizer import ReplicaOptimizer
from megatron_muloco.training.start import initialize_replicas
from megatron_muloco.training.stopping import (
    STOP_FILE,
    StopAgreement,
    StopFile,
    StopRequest,
)
from megatron_muloco.training.watch import Watch

__all__ = [
    "RunContext",
    "RunData",
    "StoppedEarlyError",
    "build_context",
    "build_run",
    "gather_report",
    "load_data",
    "scalars_of",
]


def gather_report(table: ParameterTable, groups: Groups) -> ParameterReport:
    """Return the parameter report of all pipeline stages of this replica.

    The report is equal on all replicas.

    Args:
        table: Parameter table of this rank's pipeline stage (identical on all its ranks).
        groups: This rank's groups.

    Collectives: one object gather over the replica if it has more than one stage; every rank of the
    replica calls it.
    """
    if groups.topology.pipeline == 1:
        return parameter_report([table])
    coords = groups.coords
    is_primary = coords.tp == coords.cp == coords.dp == 0
    gathered = gather_objects(groups.replica, (coords.pp, table) if is_primary else None)
    stages = dict(entry for entry in gathered if entry is not None)
    return parameter_report([stages[stage] for stage in sorted(stages)])


@dataclass(frozen=True)
class RunContext:
    """The parts of a run on one rank, which the training loop uses.

    Attributes:
        config: The configuration of the run.
        derived: Values that follow from the configuration and the number of ranks.
        groups: This rank's process groups.
        tokenizer: The tokenizer of the data.
        model: This rank's pipeline stage.
        optimizer: The inner and outer steps.
        forward: The forward and backward pass of one inner step.
        train_data: Training microbatches by step.
        valid_data: Held-out microbatches; ``None`` without evaluation.
        test_data: Held-out microbatches for the end of the run; ``None`` without ``data.test``.
        monitor: Console and TensorBoard output.
        profiler: The profiler of a window of inner steps; ``None`` where this rank has none.
        probe: Measures how orthogonal samples of Newton-Schulz results are; ``None`` without Muon.
        store: The checkpoint directory; ``None`` when nothing is saved.
        state: The state that a checkpoint holds.
        agreement: The agreement of all replicas on the step to stop after.
        first_step: The first inner step to make.
        stop_file: File that asks to stop.
        watch: Watch that is told what the loop does.
    """

    config: RunConfig
    derived: Derived
    groups: Groups
    tokenizer: Tokenizer
    model: DistributedDataParallel
    optimizer: ReplicaOptimizer
    forward: ForwardBackward
    train_data: BatchSource
    valid_data: BatchSource | None
    test_data: BatchSource | None
    monitor: Monitor
    profiler: StepProfiler | None
    probe: OrthogonalisationProbe | None
    store: CheckpointStore | None
    state: RunState
    agreement: StopAgreement
    first_step: int
    stop_file: StopFile = field(default_factory=lambda: StopFile(None))
    watch: Watch = field(default_factory=Watch)


@dataclass(frozen=True)
class RunData:
    """What a run reads; the same on all ranks.

    Attributes:
        tokenizer: The tokenizer of the data.
        datasets: All samples, in their global order.
    """

    tokenizer: Tokenizer
    datasets: Datasets

    def ids(self, config: RunConfig) -> IdRange:
        """Return the token ids that the run's model has embeddings for."""
        return IdRange(config.model.vocab_size, masks_padding(self.tokenizer))


class StoppedEarlyError(MulocoError):
    """A stop was requested before the first step of this start, so there is nothing to save."""


def build_run(
    config: RunConfig, watch: Watch | None = None, stop: StopRequest | None = None
) -> RunContext:
    """Join the job, build data, model and optimizers, and load the checkpoint to resume from.

    Args:
        config: The configuration of the run.
        watch: Watch of this process; by default one that does nothing.
        stop: Stop request of this process, which is looked at before anything is printed.

    Raises:
        ConfigError: Data, tokenizer, number of ranks or checkpoint do not fit the configuration.
        StoppedEarlyError: A rank was asked to stop meanwhile; raised on all ranks.

    Collectives: every rank of the job calls it.
    """
    groups = initialize_replicas(config, watch)
    require_memory(config, groups.topology, training_gpu())
    writes = torch.distributed.get_rank() == 0
    data = load_data(config, groups.topology)
    context = build_context(config, groups, data, writes=writes, stop=stop)
    return context if watch is None else replace(context, watch=watch)


def training_gpu() -> Device | None:
    """Return this rank's GPU with the memory that torch reports; ``None`` on a CPU."""
    device = training_device()
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.name, properties.total_memory)


def require_memory(config: RunConfig, topology: Topology, gpu: Device | None) -> None:
    """Refuse a run whose plan does not fit this rank's GPU, unless the config allows it.

    Raises:
        ConfigError: The plan needs more memory than the GPU has.
    """
    if gpu is None or not config.training.check_memory:
        return
    verdict = judge(config, topology, memory_plan(config, topology), gpu)
    if not verdict.fits:
        raise ConfigError(refusal(verdict))


def load_data(config: RunConfig, topology: Topology) -> RunData:
    """Return tokenizer and datasets of a run.

    Raises:
        ConfigError: Data or tokenizer do not fit the configuration.

    Collectives: as `build_datasets`; every rank of the job calls it.
    """
    training = config.training
    tokenizer = load_tokenizer(
        config.data.tokenizer_type,
        config.data.tokenizer_model,
        model_vocab_size=config.model.vocab_size,
    )
    evaluates = bool(config.data.valid) and training.eval_interval > 0
    batch = training.global_batch_size
    datasets = build_datasets(
        train=config.data.train,
        valid=config.data.valid,
        train_samples=batch_schedule(training).consumed(derive(config, topology).train_iters),
        valid_samples=training.eval_iters * batch if evaluates else 0,
        seq_length=config.model.seq_length,
        seed=config.data.seed,
        tokenizer=tokenizer,
        cache_dir=config.data.cache_dir,
        test=config.data.test,
        test_samples=training.eval_iters * batch if config.data.test else 0,
    )
    return RunData(tokenizer, datasets)


def build_context(
    config: RunConfig,
    groups: Groups,
    data: RunData,
    *,
    writes: bool,
    stop: StopRequest | None = None,
) -> RunContext:
    """Build model, optimizers and monitor, and load the checkpoint to resume from.

    Args:
        config: The configuration of the run.
        groups: This rank's process groups.
        data: What the run reads.
        writes: Whether this rank writes console lines and TensorBoard events.
        stop: Stop request of this process, which is looked at before anything is printed.

    Raises:
        ConfigError: The checkpoint does not fit the configuration.
        StoppedEarlyError: A rank was asked to stop; raised on all ranks.

    Collectives: every rank of the job calls it.
    """
    derived = derive(config, groups.topology)
    datasets = data.datasets
    fusions = choose_fusions(config.training, training_device())
    attention = choose_attention(config, training_device())
    store, warning = _claimed_store(config, groups)
    found = _found(config, store)
    # A load overwrites all weights, so drawing them first would be for nothing.
    draw = found is None and config.checkpoint.init_from is None
    model = _build_model(config, groups, fusions, attention.backend, draw=draw)
    optimizer = build_replica_optimizer(model, config, groups)
    probe = _build_probe(optimizer)
    state = RunState(
        groups,
        optimizer.view,
        optimizer.inner,
        optimizer.synchronizer,
        config,
        spikes=optimizer.spikes,
    )
    resumed, note = 0, ""
    if store is not None and found is not None:
        resumed, note = _resume(*found, store, state, model, optimizer)
    elif config.checkpoint.init_from is not None:
        note = _begin_from(Path(config.checkpoint.init_from), state, model, optimizer)
    layout = _train_layout(config, groups, state, resumed, len(datasets.train))
    if stop is not None:
        _stop_early(stop, store, groups)
    monitor = _build_monitor(config, groups, optimizer, layout, resumed, attention.reason, writes)
    monitor.say(warning)
    monitor.say(note)
    if training_device().type == "cuda":
        monitor.say(fusions.line())
    return RunContext(
        config=config,
        derived=derived,
        groups=groups,
        tokenizer=data.tokenizer,
        model=model,
        optimizer=optimizer,
        forward=ForwardBackward(
            model,
            groups,
            micro_batch_size=config.training.micro_batch_size,
            seq_length=config.model.seq_length,
            end_of_document=data.tokenizer.eod if config.data.mask_document_boundaries else None,
        ),
        train_data=BatchSource(
            datasets.train,
            layout,
            replica=groups.coords.replica,
            dp_rank=groups.coords.dp,
            steps=derived.train_iters,
            ids=data.ids(config),
        ),
        valid_data=_held_out_source(config, groups, datasets.valid, data.ids(config)),
        test_data=_held_out_source(config, groups, datasets.test, data.ids(config)),
        monitor=monitor,
        profiler=build_profiler(
            config.monitor,
            rank=torch.distributed.get_rank(),
            device=training_device(),
            monitor=monitor,
        ),
        probe=probe,
        store=store,
        state=state,
        agreement=StopAgreement(
            job_store(),
            replica=groups.coords.replica,
            num_replicas=groups.topology.num_replicas,
            limit=60.0 * config.training.distributed_timeout_minutes,
        ),
        first_step=resumed + 1,
        stop_file=_stop_file(config),
    )


def _build_monitor(
    config: RunConfig,
    groups: Groups,
    optimizer: ReplicaOptimizer,
    layout: RunLayout,
    resumed: int,
    attention: str,
    writes: bool,
) -> Monitor:
    """Return the monitor. Collectives: every rank calls it, for the report of parameters."""
    return build_monitor(
        config,
        groups.topology,
        optimizer.schedule,
        device=training_device(),
        writes=writes,
        resumed_step=resumed,
        layout=layout,
        plan_text=render_plan(config, groups.topology, training_gpu()),
        parameters=gather_report(optimizer.inner.table, groups),
        attention=attention,
    )


def _stop_early(stop: StopRequest, store: CheckpointStore | None, groups: Groups) -> None:
    """Raise on all ranks if one was asked to stop: nobody reads the first lines any more.

    Collectives: a gather of one object over the job.
    """
    if any(gather_objects(groups.control, stop.requested)):
        if store is not None:
            store.close()
        raise StoppedEarlyError(
            "stopped on request before the first step; there is nothing to save"
        )


def _stop_file(config: RunConfig) -> StopFile:
    """Return the file that rank 0 looks at; of the other ranks one that is never found."""
    looks = torch.distributed.get_rank() == 0 and config.checkpoint.dir is not None
    return StopFile(Path(str(config.checkpoint.dir)) / STOP_FILE if looks else None)


def _build_model(
    config: RunConfig, groups: Groups, fusions: Fusions, attention: AttentionBackend, *, draw: bool
) -> DistributedDataParallel:
    training = config.training
    return wrap_data_parallel(
        build_model(config, groups, fusions, attention, draw=draw),
        groups,
        reduce_in_fp32=training.accumulate_dtype == "fp32",
        overlap_grad_reduce=training.overlap_grad_reduce,
        overlap_param_gather=training.overlap_param_gather,
    )


def _train_layout(
    config: RunConfig, groups: Groups, state: RunState, step: int, samples: int
) -> RunLayout:
    """Return the layout of training after inner step ``step``, which goes on where samples ended.

    Raises:
        ConfigError: The batch changed, and length or data do not allow it.
    """
    training = config.training
    layout = run_layout(config, groups.topology)
    consumed = state.scalars.get("consumed_samples", layout.consumed(step))
    if consumed == layout.consumed(step):
        return layout
    layout = layout.resumed(step, consumed)
    last = derive(config, groups.topology).train_iters
    problems = []
    if training.train_iters is None:
        problems.append(
            f"training.global_batch_size: it is {training.global_batch_size}, and the first {step} "
            f"steps read {layout.consumed(step)} samples with another. A length in tokens would "
            f"count those steps with the new one. Set training.train_iters."
        )
    if layout.consumed(last) > samples:
        problems.append(
            f"training.global_batch_size: with {training.global_batch_size} from step {step} on, "
            f"the run ends at sample {layout.consumed(last)}, and there are {samples}. Train for "
            "fewer steps, or with a batch that is not smaller than before."
        )
    if problems:
        raise ConfigError(problems)
    return layout


def _held_out_source(
    config: RunConfig, groups: Groups, samples: SampleDataset | None, ids: IdRange
) -> BatchSource | None:
    """Return this rank's microbatches of held-out samples, if there are any."""
    if samples is None:
        return None
    return BatchSource(
        samples,
        batch_layout(config, groups.topology).held_out(),
        replica=0,
        dp_rank=groups.coords.dp,
        steps=config.training.eval_iters,
        ids=ids,
    )


def _build_probe(optimizer: ReplicaOptimizer) -> OrthogonalisationProbe | None:
    """Wrap the orthogonaliser in a probe; return ``None`` if this stage has no Muon matrices."""
    inner = optimizer.inner
    muon = inner.matrix_update
    if not inner.has_matrices or not isinstance(muon, Muon):
        return None
    probe = OrthogonalisationProbe(muon.orthogonalise, matrices_per_step=inner.planned_calls)
    muon.orthogonalise = probe
    return probe


def _claimed_store(config: RunConfig, groups: Groups) -> tuple[CheckpointStore | None, str]:
    """Return the run's checkpoint directory and a warning; ``None`` when nothing is saved.

    Raises:
        ConfigError: Another run uses the directory, or it cannot be written.

    Collectives: those of `CheckpointStore.claim`.
    """
    checkpoint = config.checkpoint
    if checkpoint.dir is None:
        return None, ""
    store = CheckpointStore(
        Path(checkpoint.dir),
        groups,
        keep=checkpoint.keep,
        retain_interval=checkpoint.save_retain_interval,
        background=checkpoint.async_save,
    )
    try:
        # The monitor is not there yet, and the line must appear while the run waits.
        warning = store.claim(print, needed=checkpoint_bytes(config, groups.topology))
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.dir: {error}") from error
    return store, warning


def _found(config: RunConfig, store: CheckpointStore | None) -> tuple[Path, str] | None:
    """Return the checkpoint to resume from and a note; ``None`` for a run from the beginning.

    Raises:
        ConfigError: There are checkpoints, but none of them can be resumed from.

    Collectives: those of `CheckpointStore.latest`.
    """
    wanted = config.checkpoint.resume
    if store is None or wanted == "none":
        return None
    if wanted != "auto":
        return Path(wanted), ""
    try:
        found = store.latest()
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.resume: {error}") from error
    return None if found is None else (found.path, found.note)


def _resume(
    path: Path,
    note: str,
    store: CheckpointStore,
    state: RunState,
    model: DistributedDataParallel,
    optimizer: ReplicaOptimizer,
) -> tuple[int, str]:
    """Load a checkpoint; return its step and ``note`` with what else the user should know.

    Raises:
        ConfigError: The checkpoint cannot be resumed. Nothing has been trained or written yet.
    """
    try:
        description = store.load(path, state)
        _require_loaded(path, model, optimizer, state.groups.control)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.resume: {error}") from error
    step = description.step
    if step > (last := optimizer.derived.train_iters):
        raise ConfigError(
            f"checkpoint.resume: {path} was saved after inner step {step}, and this run ends after "
            f"{last}. Set training.train_iters to at least {step}."
        )
    optimizer.steps = step
    kinds = () if state.synchronizer is None else state.synchronizer.kinds()
    changes = change_notes(description, state.resolved, kinds)
    notes = [text for text in (note, format_note(description), *changes) if text]
    return step, "\n".join([*notes, f"resumed from {path} after inner step {step}"])


def _begin_from(
    path: Path, state: RunState, model: DistributedDataParallel, optimizer: ReplicaOptimizer
) -> str:
    """Load the weights that a new run begins with; return a note for the user.

    Raises:
        ConfigError: They cannot be loaded, or are those of another model.
    """
    store = CheckpointStore(path, state.groups)
    try:
        description = store.load_anchor(path, state.view, model=state.resolved["model"])
        if state.synchronizer is not None:
            state.synchronizer.begin(0)
        _require_loaded(path, model, optimizer, state.groups.control)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.init_from: {error}") from error
    return (
        f"weights from {path}: the anchor of inner step {description.step} "
        f"(digest {description.anchor_digest}); all else begins afresh"
    )


def _require_loaded(
    path: Path, model: DistributedDataParallel, optimizer: ReplicaOptimizer, control: ProcessGroup
) -> None:
    """Raise CheckpointError on all ranks if a load left poison in any tensor of any rank.

    Collectives: with ``overlap_param_gather``, a parameter all-gather over dp x cp; then agreement
    on errors over the job. Every rank of the job calls it.
    """
    what = f"the checkpoint {path} could not be loaded"
    remedy = "Resume from an older checkpoint (checkpoint.resume: <directory>)."
    with optimizer.view.gathered(), everywhere(control, what, remedy):
        tensors: dict[str, Tensor] = dict(model.module.named_parameters())
        tensors |= {f"master of {name}": t for name, t in optimizer.view.masters.items()}
        for moment, found in optimizer.inner.named_state().items():
            tensors |= {f"{moment} of {name}": t for name, t in found.items()}
        if optimizer.synchronizer is not None:
            anchors = optimizer.synchronizer.anchors()
            tensors |= {f"anchor of {name}": t for name, t in anchors.items()}
        left = [name for name, tensor in tensors.items() if has_poison(tensor)]
        if left:
            raise CheckpointError(
                f"{what}: it has no values for {', '.join(left[:4])} ({len(left)} tensors in all). "
                f"{remedy}"
            )


def scalars_of(step: int, layout: BatchLayout | RunLayout) -> dict[str, Any]:
    """Return the numbers of the run that go into a checkpoint."""
    return {"step": step, "consumed_samples": layout.consumed(step)}
