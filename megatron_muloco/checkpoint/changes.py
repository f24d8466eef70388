"""Rules for a resume with another configuration: which keys may change, and where the state goes.

There are three groups of keys:

- *fixed* (`FIXED_KEYS`): they decide what the stored tensors mean or which samples come next;
- *named* (`NAMED_CHANGES`): they change the training itself, so ``checkpoint.allow_changes`` must
  name them;
- all others are free, also tensor, pipeline and data parallelism.

`Takeover` holds the rules for the named changes, from K replicas to K'::

    anchor, f, means in flight   the same on all replicas: exact
    outer momentum u             exact; zero if outer.kind changes
    moments                      replica r takes those of replica r mod K, exact
    local parameters, those at   exact if K' = K; otherwise every replica takes the mean of all
    launches in flight, e        K replicas (copies of the anchor, if they equal it)

The mean keeps what the next outer step sees: the mean pseudogradient of the K' replicas, residuals
included, is that of the K replicas, at any step of a round. Moments are not averaged: they are
taken as one replica had them, so that digests can prove it.

Source: decision 23.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.checkpoint.state import ANCHOR, Description, is_shared, outer_key
from megatron_muloco.errors import CheckpointError

__all__ = [
    "FIXED_KEYS",
    "NAMED_CHANGES",
    "Differences",
    "RunningMean",
    "Takeover",
    "change_notes",
    "differences",
    "model_differences",
    "refusal",
    "residual_changes",
]

# ---- which keys may change ------------------------------------------------------------------

# Key or section -> why it cannot change. A section stands for all keys in it.
FIXED_KEYS: dict[str, str] = {
    "model": "the stored tensors are those of this model",
    "data.seed": "it orders the samples, so some would repeat and others never come",
    "data.tokenizer_type": "token ids would mean other text",
    "outer.sync_interval": "it defines the round that the stored state is in",
    "outer.fragments": "each fragment is at its own place in its interval",
    "outer.overlap_steps": "it decides which fragments are in flight",
}
# Name in checkpoint.allow_changes -> the key that it allows to change.
NAMED_CHANGES: dict[str, str] = {
    "replicas": "parallel.num_replicas",
    "method": "outer.kind",
    "inner_optimizer": "inner.kind",
}
# Its value may be a number or a section, so it is compared and printed as one value.
_WHOLE_KEYS = frozenset({"outer.sync_interval"})
# Keys of the model section that have no effect after the first step, or none on what is stored.
_FREE_KEYS = frozenset({"model.init", "model.init_method_std", "model.transformer_impl"})
_INIT_FROM = "checkpoint.init_from"
_ALLOW = "checkpoint.allow_changes"


@dataclass(frozen=True)
class Differences:
    """Keys that are not free and whose value changed, a line of text each.

    Attributes:
        fixed: Keys that cannot change.
        named: Name of the change -> the line of its key.
    """

    fixed: tuple[str, ...]
    named: Mapping[str, str]


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Differences:
    """Return what changed between two resolved configurations, given as nested plain values.

    Args:
        saved: That of the checkpoint.
        current: That of this run.
    """
    before, after = dict(_leaves(saved)), dict(_leaves(current))
    fixed, named = [], {}
    names = {key: name for name, key in NAMED_CHANGES.items()}
    begins_or_ends = _has_outer(before) != _has_outer(after)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        line = f"{key}: {before.get(key)!r} when saved, {after.get(key)!r} now"
        if key in names:
            named[names[key]] = line
        elif key == _INIT_FROM and after.get(key) is not None:
            # Only a run that began with these weights goes on with the key still set.
            fixed.append(f"{line}; there is a checkpoint to resume, so they would not be used")
        elif (reason := _reason(key)) and not (begins_or_ends and key.startswith("outer.")):
            fixed.append(f"{line}; {reason}")
    return Differences(tuple(fixed), named)


def model_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the lines of `differences` that are about the model."""
    return tuple(line for line in differences(saved, current).fixed if line.startswith("model."))


def refusal(found: Differences, allowed: Collection[str]) -> str:
    """Return why a checkpoint cannot be resumed and what to do; empty if it can.

    Args:
        found: What changed.
        allowed: ``checkpoint.allow_changes``.
    """
    parts = []
    if found.fixed:
        parts += [
            *(f"  {line}" for line in found.fixed),
            "Continuing would mix two runs. Give these keys their old values, or start a new run "
            "with checkpoint.resume: none and another checkpoint.dir.",
        ]
    missing = [name for name in found.named if name not in allowed]
    if missing:
        # All that changed, not only what is missing: the line replaces the one that is there.
        line = f"{_ALLOW}=[{','.join(found.named)}]"
        parts += [
            *(f"  {found.named[name]} ({name})" for name in missing),
            "This changes the training. If it is meant, confirm it by name: allow_changes: "
            f"[{', '.join(found.named)}] in the section checkpoint, or --set '{line}'. "
            "docs/concepts/checkpoints.md says what happens to each part of the state.",
        ]
    return "\n".join(parts)


def _has_outer(leaves: Mapping[str, Any]) -> bool:
    return leaves.get("outer.kind") != "none"


def _reason(key: str) -> str | None:
    """Return why a dotted key is fixed, or ``None`` if it may change."""
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


# ---- where the state goes -------------------------------------------------------------------

# Kinds of the outer state of which a run with another K takes the mean over the replicas.
_AVERAGED = ("at_launch", "residual")
_VECTOR_MOMENTS = ("exp_avg", "exp_avg_sq")
_MUON_MOMENT = "momentum_buffer"


@dataclass(frozen=True)
class Takeover:
    """The part of a checkpoint that one replica takes over.

    Attributes:
        saved: The checkpoint.
        current: The resolved configuration of this run.
        own: Index of the replica.
    """

    saved: Description
    current: Mapping[str, Any]
    own: int

    @property
    def saved_replicas(self) -> int:
        """K of the checkpoint."""
        return len(self.saved.replicas)

    @property
    def changes_replicas(self) -> bool:
        """Whether this run has another K."""
        return bool(self.saved_replicas != self.current["parallel"]["num_replicas"])

    @property
    def changes_inner(self) -> bool:
        """Whether this run has another inner optimizer."""
        return bool(self.saved.config["inner"]["kind"] != self.current["inner"]["kind"])

    @property
    def changes_outer(self) -> bool:
        """Whether this run has another kind of outer step."""
        return bool(self.saved.config["outer"]["kind"] != self.current["outer"]["kind"])

    @property
    def changes_training(self) -> bool:
        """Whether the rules below do anything but copy this replica's own state."""
        return self.changes_replicas or self.changes_inner or self.changes_outer

    @property
    def begins_outer(self) -> bool:
        """Whether a run of plain data parallelism goes on with outer steps."""
        return bool(self.saved.config["outer"]["kind"] == "none" and self.changes_outer)

    @property
    def source(self) -> int:
        """The replica whose moments and plain values this one takes."""
        return self.own % self.saved_replicas

    def masters(self) -> tuple[str, ...]:
        """Return the key prefixes whose mean becomes the local parameters."""
        if not self.saved.has_masters:
            return (ANCHOR,)
        return tuple(f"replica_{replica}.master" for replica in self._averaged())

    def moment(self, kind: str) -> str:
        """Return the key prefix of a moment of the inner optimizer."""
        return f"replica_{self.source}.inner.{kind}"

    def outer(self, kind: str) -> tuple[str, ...]:
        """Return the key prefixes whose mean becomes a kind of the outer state; none for zeros."""
        if kind == "momentum" and self.changes_outer:
            return ()
        replicas = self._averaged() if kind in _AVERAGED else (self.source,)
        return tuple(dict.fromkeys(outer_key(kind, replica) for replica in replicas))

    def _averaged(self) -> Sequence[int]:
        return range(self.saved_replicas) if self.changes_replicas else (self.own,)

    def digest(self, prefix: str) -> str | None:
        """Return the digest with which the tensors under a key prefix were saved."""
        if prefix == ANCHOR:
            return self.saved.anchor_digest
        replica = 0 if is_shared(prefix) else int(prefix.split(".")[0].removeprefix("replica_"))
        found: str | None = self.saved.replicas[replica]["digests"].get(prefix)
        return found

    def moments_read(self, names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Return the moments to read: kind -> parameter names.

        Args:
            names: Kind -> names of this run's moments.
        """
        if not self.changes_inner:
            return {kind: list(found) for kind, found in names.items()}
        if self.saved.config["inner"]["kind"] != "adamw":
            return {}
        # Those of all parameters: a digest is that of a whole kind.
        every = list(dict.fromkeys(name for found in names.values() for name in found))
        return dict.fromkeys(_VECTOR_MOMENTS, every)

    def moments(
        self, read: Mapping[str, Mapping[str, Tensor]], own: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[dict[str, dict[str, Tensor]], int]:
        """Return this run's moments and their step count.

        The first moment of both optimizers is the decayed sum S of the past gradients, up to a
        factor: AdamW's is ``(1 - beta1) S``, Muon's S (``heavy_ball``) or ``(1 - momentum) S``
        (``ema``). So Muon goes on with AdamW's. AdamW cannot go on with Muon's: there is no second
        moment, and with one step count for both, the bias correction of a second moment that begins
        at zero would multiply the first moment that does not. All moments begin at zero.

        Args:
            read: The tensors of `moments_read`.
            own: Kind -> name -> tensor as this run needs them.
        """
        step = int(self.saved.replicas[self.source]["inner_step"])
        if not self.changes_inner:
            return {kind: dict(read[kind]) for kind in own}, step
        zeros = {
            kind: {n: torch.zeros_like(t) for n, t in held.items()} for kind, held in own.items()
        }
        if not read:
            return zeros, 0
        factor = self._first_moment_factor()
        taken = {
            kind: {name: read[kind][name] for name in own.get(kind, ())} for kind in _VECTOR_MOMENTS
        }
        taken[_MUON_MOMENT] = {
            name: read["exp_avg"][name] * factor for name in own.get(_MUON_MOMENT, ())
        }
        return zeros | {kind: held for kind, held in taken.items() if kind in own}, step

    def _first_moment_factor(self) -> float:
        """Return Muon's first moment over AdamW's."""
        muon = self.current["inner"]["muon"]
        ours = 1.0 - muon["momentum"] if muon["accumulation"] == "ema" else 1.0
        return float(ours / (1.0 - self.saved.config["inner"]["adam"]["beta1"]))

    def outer_scalars(self) -> dict[str, Any]:
        """Return the plain values of the outer step.

        With another K or inner optimizer, norms of pseudogradients are not comparable with those of
        before, so the guard begins afresh; the trained share of the interval is the mean, like the
        parameters.
        """
        scalars: dict[str, Any] = dict(self.saved.replicas[self.source]["synchronizer"])
        if self.changes_replicas or self.changes_inner:
            scalars["guard"] = {}
        if self.changes_replicas:
            every = [replica["synchronizer"]["progress"] for replica in self.saved.replicas]
            scalars["progress"] = [
                {**own, "trained": fmean(replica[fragment]["trained"] for replica in every)}
                for fragment, own in enumerate(scalars["progress"])
            ]
        return scalars

    def require_finite(self, broken: Collection[str]) -> None:
        """Raise CheckpointError if tensors that were read under these prefixes are not finite."""
        if broken:
            raise CheckpointError(
                f"the checkpoint of step {self.saved.step} has values that are not finite in "
                f"{', '.join(sorted(broken))}, and a mean or a copy would carry them to other "
                "replicas. Resume without the change: the guard sets such a replica back to the "
                "anchor at its next outer step. Save after that, and change then."
            )


class RunningMean:
    """The mean of tensors that come one after the other, by name.

    ``m <- m + (x - m) / count``: of equal tensors it is exactly that tensor, for any number.
    """

    def __init__(self) -> None:
        self._count, self.mean = 0, dict[str, Tensor]()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add one replica's tensors, which this object may keep and overwrite."""
        self._count += 1
        if self._count == 1:
            self.mean = dict(tensors)
            return
        for name, mean in self.mean.items():
            mean.add_(tensors[name] - mean, alpha=1.0 / self._count)


# ---- what the console says ------------------------------------------------------------------

# Residuals of error feedback -> their names in messages.
_RESIDUALS = {
    "residual": "compression error of the pseudogradients (e)",
    "owner_residual": "compression error of the mean (f)",
}


def change_notes(
    saved: Description, current: Mapping[str, Any], kinds: Collection[str]
) -> list[str]:
    """Return lines for the user about a resume that changed something, and warnings.

    Args:
        saved: The checkpoint.
        current: The resolved configuration of this run.
        kinds: Kinds of tensors of this run's synchronizer; empty without one.
    """
    takeover = Takeover(saved, current, own=0)
    found = differences(saved.config, current)
    lines = [f"changed by checkpoint.allow_changes: {line}" for line in found.named.values()]
    if takeover.changes_replicas:
        before, now = takeover.saved_replicas, current["parallel"]["num_replicas"]
        where = (
            f"the mean of those of the {before} replicas; the round goes on"
            if saved.has_masters
            else "the anchor"
        )
        lines.append(
            f"{before} -> {now} replicas: local parameters are {where}; replica r has the moments "
            f"of replica r mod {before}"
        )
        lines += _outer_rates(saved.config["outer"], current["outer"], before, now)
    if takeover.changes_inner:
        lines.append(
            "moments of matrices: Muon goes on with AdamW's first moment"
            if saved.config["inner"]["kind"] == "adamw"
            else "moments: all begin at zero, as does AdamW's step count"
        )
    if takeover.changes_outer and kinds:
        lines.append("outer momentum: zero")
    return lines + residual_changes(saved.replicas[0]["digests"], kinds)


def _outer_rates(
    saved: Mapping[str, Any], current: Mapping[str, Any], before: int, now: int
) -> list[str]:
    """Return a warning if outer lr and momentum are still those of another K."""
    if not saved["kind"] == current["kind"] == "nesterov":
        return []
    same = [key for key in ("lr", "momentum") if saved[key] == current[key]]
    if not same:
        return []
    direction = "higher" if now > before else "lower"
    values = " and ".join(f"outer.{key} {current[key]}" for key in same)
    return [
        f"WARNING: {values} are those of {before} replicas. In the papers both rise with K, so "
        f"{now} replicas call for {direction} values; docs/guides/choosing.md has theirs"
    ]


def residual_changes(saved: Collection[str], current: Collection[str]) -> list[str]:
    """Return a line for the residuals that start from zero, and one for those that are dropped.

    Args:
        saved: Key prefixes of the tensors of one replica in the checkpoint.
        current: Kinds of tensors of this run's synchronizer.
    """
    had = {kind for kind in _RESIDUALS if any(key.endswith(f".{kind}") for key in saved)}
    has = {kind for kind in _RESIDUALS if kind in current}
    lines = []
    if has - had:
        lines.append(f"error feedback: {_listed(has - had)}: zero, the checkpoint has none")
    if had - has:
        lines.append(f"error feedback: {_listed(had - has)}: dropped, this run keeps none")
    return lines


def _listed(kinds: Collection[str]) -> str:
    return " and ".join(label for kind, label in _RESIDUALS.items() if kind in kinds)
