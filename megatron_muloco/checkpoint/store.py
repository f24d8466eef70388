"""`CheckpointStore` saves, finds and loads the checkpoints of one run.

::

    store = CheckpointStore(Path(config.checkpoint.dir), groups, keep=config.checkpoint.keep)
    store.claim(print)
    if (found := store.latest()) is not None:
        store.load(found.path, state)
    ...
    store.save(step, state)
    ...
    # after the last inner step
    path = store.save(step, state)
    synchronizer.flush()
    store.save_final_anchor(path, state)
    store.close()

Every method but `poll`, `standing` and `close` is a collective of the whole job: all ranks call it
at the same point. Rank 0 alone looks at directories and renames them, and tells the others what it
found, because network file systems may show different ranks different listings for a while.

With ``background=True`` a save returns when this rank's parts are in host memory. Call `poll` after
every step, and `wait` before the end.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch.distributed import ProcessGroup

from megatron_muloco.checkpoint import layout
from megatron_muloco.checkpoint.background import (
    BackgroundSave,
    HostCopies,
    SaveResult,
    describe_without_digests,
    next_number,
    with_digests,
)
from megatron_muloco.checkpoint.directory import cause_of, everywhere, plan_write, write_tensors
from megatron_muloco.checkpoint.io import (
    Kinds,
    copied_parts,
    describe,
    finite_kinds,
    masters_differ,
    require_finite,
    run_kinds,
    sharded,
    sharded_rng,
    write_description,
)
from megatron_muloco.checkpoint.layout import Found
from megatron_muloco.checkpoint.lease import Lease
from megatron_muloco.checkpoint.loading import load_anchor, load_run
from megatron_muloco.checkpoint.sharding import ModelSpace
from megatron_muloco.checkpoint.state import ANCHOR, Description, Masters, RunState
from megatron_muloco.comm.collectives import broadcast_object
from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import CheckpointError
from megatron_muloco.runtime.accelerator import training_device

__all__ = ["CheckpointStore"]


class CheckpointStore:
    """The checkpoints of one run in one directory that all ranks see.

    Invariant: the checkpoint that the latest file names is complete at any moment, also after a
    kill. A save that fails changes neither that checkpoint nor the training state.

    Args:
        directory: Directory of the ``iter_*`` directories; the first save creates it.
        groups: This rank's groups.
        keep: Number of newest checkpoints to keep.
        retain_interval: Checkpoints of its multiples are kept for ever.
        background: Whether `save` returns when this rank's parts are copied to host memory.

    Attributes:
        failures: Saves that failed, as the caller counts them.
    """

    def __init__(
        self,
        directory: Path,
        groups: Groups,
        *,
        keep: int = 2,
        retain_interval: int | None = None,
        background: bool = False,
    ) -> None:
        self.directory, self.keep = directory, keep
        self._groups, self._device = groups, training_device()
        self._control, self._retain = groups.control, retain_interval
        # Pinning has not run on a GPU.
        pin = self._device.type == "cuda"
        self._copies = HostCopies(pin=pin) if background else None
        self._saving: BackgroundSave | None = None
        self._noted: SaveResult | None = None
        self._news: SaveResult | None = None
        self._failed = False
        self.failures = 0
        self._lease: Lease | None = None

    def claim(self, say: Callable[[str], object], *, needed: int = 0) -> str:
        """Take the directory for this run, and check that it can be written; return a warning.

        Args:
            say: Function that shows a line to the user while another run's lease is watched.
            needed: Bytes of one checkpoint; 0 where they are not known.

        Raises:
            CheckpointError: Another run uses the directory, a rank cannot write there, or the disk
                has no room for one checkpoint.

        Collectives: two agreements on errors, then rank 0 broadcasts one text; every rank of the
        job calls it.
        """
        what = f"checkpoint.dir {self.directory} cannot be used"
        remedy = "Give a directory that all ranks can write, with room for the checkpoints."
        warning = ""
        with everywhere(self._control, what, remedy):
            if _first_rank():
                lease = Lease(self.directory, say)
                lease.acquire()
                self._lease = lease
                warning = layout.room_for(self.directory, needed=needed, keep=self.keep)
        with everywhere(self._control, what, remedy):
            layout.probe(self.directory, str(torch.distributed.get_rank()))
        return broadcast_object(self._control, warning)

    def close(self) -> None:
        """Give the directory back to other runs. No collectives."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def standing(self) -> str:
        """Return a sentence about the newest whole checkpoint, as this rank sees it."""
        try:
            found = layout.find_latest(self.directory)
        except (OSError, CheckpointError):
            found = None
        if found is None:
            return f"There is no whole checkpoint in {self.directory}."
        return f"The newest whole checkpoint is {found.path}."

    def latest(self) -> Found | None:
        """Return the checkpoint to resume from and a note for the user; ``None`` if there is none.

        Raises:
            CheckpointError: There are checkpoints, but none of them can be resumed from.

        Collectives: agreement on errors, then rank 0 broadcasts one small object to the job.
        """
        found: Found | None = None
        with everywhere(
            self._control, f"{self.directory} cannot be read", "Check that all ranks may read it."
        ):
            if _first_rank():
                found = layout.find_latest(self.directory)
        return broadcast_object(self._control, found)

    def has(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is published, as rank 0 sees it.

        Collectives: rank 0 broadcasts one flag to the job; every rank calls it.
        """
        return broadcast_object(
            self._control,
            _first_rank() and layout.checkpoint_path(self.directory, step).is_dir(),
        )

    def save(self, step: int, state: RunState, *, prune: bool = True) -> Path:
        """Save a checkpoint of ``step`` and delete superseded ones; return its path.

        With ``background`` it returns when this rank's parts are copied, and the checkpoint appears
        later: see `poll` and `wait`. An earlier save is waited for first.

        Args:
            step: Inner step just made.
            state: The live state.
            prune: Whether superseded checkpoints are deleted. False while a run does not advance,
                so that the last good state is not replaced.

        Raises:
            CheckpointError: It could not be written, or is not finite; training may continue.
            SyncError: Replicas disagree about what they share; nothing was written.

        Collectives: those of `wait`, `describe` and `_write_published`; every rank of the job calls
        it.
        """
        path = layout.checkpoint_path(self.directory, step)
        has_masters = masters_differ(state)
        kinds = run_kinds(state, with_masters=has_masters)
        if self._copies is not None:
            self.wait()
            self._save_in_background(path, step, state, kinds, has_masters=has_masters, prune=prune)
            return path
        require_finite(state, kinds)
        description = describe(
            state, kinds, step=step, has_masters=has_masters, device=self._device
        )
        space = self._space(state.view)
        _write_published(
            path,
            chain(sharded(copied_parts(kinds, space), space), sharded_rng()),
            lambda temporary: write_description(temporary, description),
            self._control,
            before=self._check_lease,
        )
        with everywhere(self._control, *self._not_updated(path)):
            if _first_rank():
                self._make_current(step, prune=prune)
        return path

    def _save_in_background(
        self,
        path: Path,
        step: int,
        state: RunState,
        kinds: Kinds,
        *,
        has_masters: bool,
        prune: bool,
    ) -> None:
        """Copy this rank's parts to host memory and start to write them.

        Collectives: those of `describe_without_digests`, of the copies, and torch's planning.
        """
        description = describe_without_digests(state, kinds, step=step, has_masters=has_masters)
        space = self._space(state.view)
        temporary = layout.temporary_path(path)
        try:
            with everywhere(self._control, *_not_written(path)):
                if _first_rank():
                    layout.begin(path)
            # Outside of `everywhere`, as in `_write_published`.
            copies = list(copied_parts(kinds, space, self._copies))
            with everywhere(self._control, *_not_written(path)):
                entries = chain(sharded(copies, space), sharded_rng())
                planned = plan_write(temporary, entries, control=self._control)
        except BaseException:
            if _first_rank():
                layout.abandon(temporary)
            raise

        def publish(by_rank: list[tuple[int, Mapping[str, int]]]) -> None:
            self._check_lease()
            write_description(temporary, with_digests(description, kinds, by_rank))
            layout.publish(path)
            try:
                self._make_current(step, prune=prune)
            except OSError as error:
                what, remedy = self._not_updated(path)
                raise CheckpointError(f"{what}: {cause_of(error)}. {remedy}") from error

        self._saving = BackgroundSave(
            next_number(self._control),
            path,
            step,
            planned,
            copies,
            space,
            self._groups,
            finite=finite_kinds(state, kinds),
            publish=publish,
            discard=lambda: layout.abandon(temporary),
        )

    def poll(self) -> SaveResult | None:
        """Drive a save in the background; return its result once, when it has ended.

        Called between two steps on every rank; it neither waits nor uses a collective. Rank 0 gets
        the result as soon as the checkpoint is published, the others after `wait`.
        """
        if self._saving is not None:
            self._saving.poll()
            self._note(self._saving.result)
        news, self._news = self._news, None
        return news

    def wait(self) -> bool:
        """Wait until no save is in progress; return False if the last in the background failed.

        Collectives: none without a save in progress, else those of `BackgroundSave.wait`; every
        rank of the job calls it.
        """
        if self._saving is not None:
            result = self._saving.wait()
            self._note(result)
            self._saving, self._failed = None, bool(result.error)
        return not self._failed

    def _note(self, result: SaveResult | None) -> None:
        if result is not None and result is not self._noted:
            self._noted = self._news = result

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _make_current(self, step: int, *, prune: bool) -> None:
        # In this order: a kill between the two leaves one checkpoint too many, the reverse could
        # leave a latest file that names a deleted one.
        layout.set_latest(self.directory, step)
        if prune:
            layout.prune(self.directory, step=step, keep=self.keep, retain_interval=self._retain)

    def _not_updated(self, path: Path) -> tuple[str, str]:
        return (
            f"the checkpoint {path} is complete, but {self.directory} could not be updated",
            f"Resume with checkpoint.resume: {path}, or free space and save again.",
        )

    def save_final_anchor(self, path: Path, state: RunState) -> Path:
        """Store the current anchor, after the final flush, inside the checkpoint ``path``.

        Raises:
            CheckpointError: It could not be written; the checkpoint is as before.

        Collectives: as `save`.
        """
        kinds = {ANCHOR: state.anchors()}
        require_finite(state, kinds)
        description = describe(
            state, kinds, step=layout.step_of(path), has_masters=False, device=self._device
        )
        target = path / layout.FINAL_ANCHOR
        space = self._space(state.view)
        _write_published(
            target,
            sharded(copied_parts(kinds, space), space),
            lambda temporary: write_description(temporary, description),
            self._control,
            before=self._check_lease,
        )
        return target

    def load(self, path: Path, into: RunState) -> Description:
        """Overwrite the live state with that of a checkpoint; see `load_run`."""
        return load_run(_resolved(path, self._control), into, self._space(into.view))

    def load_anchor(
        self,
        path: Path,
        view: Masters,
        *,
        flushed: bool = True,
        model: Mapping[str, Any] | None = None,
    ) -> Description:
        """Set masters and model parameters to the anchor of a checkpoint; see `load_anchor`."""
        path, space = _resolved(path, self._control), self._space(view)
        return load_anchor(path, self._groups, view, space, flushed=flushed, model=model)

    def _space(self, view: Masters) -> ModelSpace:
        return ModelSpace(self._groups, view.infos, view.shards, self._device)


def _write_published(
    path: Path,
    entries: Iterable[ShardedBase],
    describe_in: Callable[[Path], None],
    control: ProcessGroup,
    *,
    before: Callable[[], None],
) -> None:
    """Write a directory under a temporary name and rename it when it is complete.

    Args:
        path: Final name of the directory; replaced if it exists.
        entries: Tensors that this rank writes; exhausted inside, on all ranks at the same point.
        describe_in: Function that writes the small files into the temporary directory; rank 0
            calls it.
        control: `Groups.control`.
        before: Called on rank 0 before the directory gets its name; it may refuse.

    Raises:
        CheckpointError: On every rank, if any of them failed; ``path`` is then as it was.

    Collectives: those of ``entries``, torch's planning, and three agreements on errors; every rank
    of the job calls it.
    """
    what, remedy = _not_written(path)
    temporary = layout.temporary_path(path)
    try:
        with everywhere(control, what, remedy):
            if _first_rank():
                layout.begin(path)
        # Outside of `everywhere`: ``entries`` gathers over dp x cp, and a rank that failed inside
        # would leave the others there. No rank writes before rank 0 has made the directory.
        collected = list(entries)
        with everywhere(control, what, remedy):
            write_tensors(temporary, collected, control=control)
        with everywhere(control, what, remedy):
            if _first_rank():
                # Reached only if every rank has written and synced its tensors.
                before()
                describe_in(temporary)
                layout.publish(path)
    except BaseException:  # also a KeyboardInterrupt: a full disk needs the space back
        if _first_rank():
            layout.abandon(temporary)
        raise


def _not_written(path: Path) -> tuple[str, str]:
    return (
        f"the checkpoint {path} could not be written",
        "Training state and earlier checkpoints are unchanged. Free space or change "
        "checkpoint.dir.",
    )


def _resolved(path: Path, control: ProcessGroup) -> Path:
    """Return the checkpoint that ``path`` means, as rank 0 sees it.

    Collectives: agreement on errors, then rank 0 broadcasts one path to the job.
    """
    found = path
    with everywhere(control, f"{path} cannot be read", "Check that all ranks may read it."):
        if _first_rank():
            found = layout.resolve(path)
    return broadcast_object(control, found)


def _first_rank() -> bool:
    return bool(torch.distributed.get_rank() == 0)
