"""`CheckpointStore` saves, finds and loads the checkpoints of one run.

::

    store = CheckpointStore(Path(config.checkpoint.dir), groups, keep=config.checkpoint.keep)
    if (found := store.latest()) is not None:
        store.load(found.path, state)
    ...
    store.save(step, state)
    ...
    # after the last inner step
    path = store.save(step, state)
    synchronizer.flush()
    store.save_final_anchor(path, state)

Every method is a collective of the whole job: all ranks call it at the same point. Rank 0 alone
looks at directories and renames them, and tells the others what it found, because network file
systems may show different ranks different listings for a while.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch.distributed import ProcessGroup

from megatron_muloco.checkpoint import layout
from megatron_muloco.checkpoint.directory import everywhere, write_tensors
from megatron_muloco.checkpoint.io import (
    describe,
    load_anchor,
    load_run,
    masters_differ,
    require_finite,
    run_kinds,
    sharded_kinds,
    sharded_rng,
    write_description,
)
from megatron_muloco.checkpoint.layout import Found
from megatron_muloco.checkpoint.sharding import ModelSpace
from megatron_muloco.checkpoint.state import ANCHOR, Description, Masters, RunState
from megatron_muloco.comm.collectives import broadcast_object
from megatron_muloco.comm.groups import Groups
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
    """

    def __init__(self, directory: Path, groups: Groups, *, keep: int = 2) -> None:
        self.directory, self.keep = directory, keep
        self._groups, self._device = groups, training_device()
        self._control = groups.control

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
        """Publish a checkpoint of ``step`` and delete superseded ones; return its path.

        Args:
            step: Inner step just made.
            state: The live state.
            prune: Whether superseded checkpoints are deleted. False while a run does not advance,
                so that the last good state is not replaced.

        Raises:
            CheckpointError: It could not be written, or is not finite; training may continue.
            SyncError: Replicas disagree about what they share; nothing was written.

        Collectives: those of `describe` and `_write_published`; every rank of the job calls it.
        """
        path = layout.checkpoint_path(self.directory, step)
        has_masters = masters_differ(state)
        kinds = run_kinds(state, with_masters=has_masters)
        require_finite(state, kinds)
        description = describe(
            state, kinds, step=step, has_masters=has_masters, device=self._device
        )
        _write_published(
            path,
            chain(sharded_kinds(kinds, self._space(state.view)), sharded_rng()),
            lambda temporary: write_description(temporary, description),
            self._control,
        )
        with everywhere(
            self._control,
            f"the checkpoint {path} is complete, but {self.directory} could not be updated",
            f"Resume with checkpoint.resume: {path}, or free space and save again.",
        ):
            if _first_rank():
                # In this order: a kill between the two leaves one checkpoint too many, the reverse
                # could leave a latest file that names a deleted one.
                layout.set_latest(self.directory, step)
                if prune:
                    layout.prune(self.directory, step=step, keep=self.keep)
        return path

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
        _write_published(
            target,
            sharded_kinds(kinds, self._space(state.view)),
            lambda temporary: write_description(temporary, description),
            self._control,
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
) -> None:
    """Write a directory under a temporary name and rename it when it is complete.

    Args:
        path: Final name of the directory; replaced if it exists.
        entries: Tensors that this rank writes; exhausted inside, on all ranks at the same point.
        describe_in: Function that writes the small files into the temporary directory; rank 0
            calls it.
        control: `Groups.control`.

    Raises:
        CheckpointError: On every rank, if any of them failed; ``path`` is then as it was.

    Collectives: those of ``entries``, torch's planning, and three agreements on errors; every rank
    of the job calls it.
    """
    what = f"the checkpoint {path} could not be written"
    remedy = (
        "Training state and earlier checkpoints are unchanged. Free space or change checkpoint.dir."
    )
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
                describe_in(temporary)
                layout.publish(path)
    except BaseException:  # also a KeyboardInterrupt: a full disk needs the space back
        if _first_rank():
            layout.abandon(temporary)
        raise


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
