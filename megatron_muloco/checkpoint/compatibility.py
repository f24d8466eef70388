"""Which configuration a checkpoint may be resumed with. No torch.

What decides the meaning of the saved tensors, or which samples come next, must be what it was. All
else (learning rates, schedules, lengths, intervals, paths, the layout of a replica) may change;
the run then goes on from the same state with the new values.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

__all__ = ["FIXED_KEYS", "differences", "residual_changes"]

# Key or section -> why it cannot change. A section stands for all keys in it.
FIXED_KEYS: dict[str, str] = {
    "model": "the stored tensors are those of this model",
    "parallel.num_replicas": "changing the number of replicas is not available yet",
    "data.seed": "it orders the samples, and some would come twice and others never",
    "data.tokenizer_type": "token numbers would mean other text",
    "training.global_batch_size": "the place in the data is counted in steps of this size",
    "inner.kind": "the stored moments belong to this optimizer",
    "outer.kind": "the stored outer state belongs to this optimizer",
    "outer.sync_interval": "the stored round is cut by it",
    "outer.fragments": "fragments are at different places of their intervals",
    "outer.overlap_steps": "it decides which fragments are in flight",
}
# Either a number or a section; shown as one value.
_WHOLE_KEYS = frozenset({"outer.sync_interval"})
# Kinds of residuals of error feedback, for people.
_RESIDUALS = {
    "residual": "what the replicas' codes lost (e)",
    "owner_residual": "what the code of the mean lost (f)",
}
# Used once, before the first step.
_FREE_KEYS = frozenset({"model.init", "model.init_method_std"})


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return one line for each fixed key whose value changed.

    Args:
        saved: Resolved configuration of the checkpoint, as nested plain values.
        current: That of this run.
    """
    before, after = dict(_leaves(saved)), dict(_leaves(current))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        reason = _reason(key)
        if reason and before.get(key) != after.get(key):
            lines.append(f"{key}: {before.get(key)!r} when saved, {after.get(key)!r} now; {reason}")
    return lines


def residual_changes(saved: Collection[str], current: Collection[str]) -> list[str]:
    """Return a line for the residuals that begin anew, and one for those that nobody takes over.

    Args:
        saved: Key prefixes of the tensors of one replica in the checkpoint.
        current: Kinds of tensors of this run's synchronizer.
    """
    had = {kind for kind in _RESIDUALS if any(key.endswith(f".{kind}") for key in saved)}
    has = {kind for kind in _RESIDUALS if kind in current}
    lines = []
    if has - had:
        lines.append(f"error feedback: {_listed(has - had)}: zeros, the checkpoint has none")
    if had - has:
        lines.append(f"error feedback: {_listed(had - has)}: dropped, this run keeps none")
    return lines


def _listed(kinds: Collection[str]) -> str:
    return " and ".join(label for kind, label in _RESIDUALS.items() if kind in kinds)


def _reason(key: str) -> str | None:
    """Return why a dotted key is fixed, ``None`` where it is free."""
    if key in _FREE_KEYS:
        return None
    return next(
        (why for fixed, why in FIXED_KEYS.items() if key == fixed or key.startswith(f"{fixed}.")),
        None,
    )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" not in _WHOLE_KEYS:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
