"""`Reference`: the whole algorithm on one page, K replicas in one process on whole tensors.

It is written to be read, not to be fast, and imports nothing from the package. Tests compare every
distributed, overlapped and compressed path with it.

    symbol     here             meaning
    theta      anchor           parameters agreed at the last outer step
    theta_k    local[k]         parameters that replica k trains
    Delta_k    delta            pseudogradient, anchor - local: points uphill
    E, D       codec            encode and decode as one function, x -> D(E(x))
    e_k, f     residual[k], f   errors of the first and the second encoding (error feedback)
    u          u                outer momentum
    H, P, tau  sync_interval, fragments, overlap_steps
    alpha      mixing_weight    share of the local value that is kept
    eta, mu    outer_lr, outer_momentum
    beta       error_decay

An inner step is any function that changes ``local[k]`` in place. Its optimizer state is private to
it, lives as long as the run, and is never averaged.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Parameters", "Reference", "Settings", "identity"]

Parameters = dict[str, Tensor]
Number = TypeVar("Number", int, float)


def identity(name: str, start: int, values: Tensor) -> Tensor:
    """Return a copy of the values: the lossless codec."""
    return values.clone()


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a run.

    H, eta and mu are constants or functions of the round, which is counted from 1.

    Attributes:
        sync_interval: H.
        train_iters: Inner steps of the run.
        fragments: P lists of names, which together contain every name once.
        overlap_steps: tau.
        mixing_weight: alpha.
        additive: Whether an apply sets ``theta + progress since the launch`` instead of mixing.
        outer_lr: eta.
        outer_momentum: mu.
        codec: ``(name, start, x) -> D(E(x))`` for the values x of a tensor from ``start`` on.
        error_feedback: Whether encoding errors are kept; otherwise e and f stay zero.
        error_decay: beta.
        coding_units: Flat ranges of a tensor that are encoded separately, by name; a tensor that is
            not listed is one range. The second encoding has the same ranges.
        encode_mean: Whether the mean is encoded a second time: true for reductions in which each
            rank averages one chunk and sends it, false for top-k, where every rank decodes all.
    """

    sync_interval: int | Callable[[int], int]
    train_iters: int
    fragments: Sequence[Sequence[str]]
    overlap_steps: int = 0
    mixing_weight: float = 0.0
    additive: bool = False
    outer_lr: float | Callable[[int], float] = 1.0
    outer_momentum: float | Callable[[int], float] = 0.0
    codec: Callable[[str, int, Tensor], Tensor] = identity
    error_feedback: bool = False
    error_decay: float = 0.9
    coding_units: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    encode_mean: bool = True


@dataclass
class _Sent:
    """A fragment in flight: q_k, weight and theta_k at launch of every replica."""

    launched_at: int
    q: list[Parameters]
    weight: list[float]
    at_launch: list[Parameters]


class Reference:
    """K replicas in lockstep.

    Args:
        initial: Parameters that all replicas start from.
        inner_steps: For each replica, a function that makes inner step t on its parameters.
        settings: Hyperparameters.
        weigh: ``(replica, fragment, t, delta) -> w_k`` in [0, 1]; by default 1 where delta is
            finite.
    """

    def __init__(
        self,
        initial: Mapping[str, Tensor],
        inner_steps: Sequence[Callable[[Parameters, int], None]],
        settings: Settings,
        weigh: Callable[[int, int, int, Parameters], float] | None = None,
    ) -> None:
        self.settings = settings
        self.inner_steps = inner_steps
        self.weigh = weigh or (lambda k, fragment, t, delta: float(_finite(delta)))
        self.anchor = _copy(initial)
        self.local = [_copy(initial) for _ in inner_steps]
        self.u = _zeros(initial)
        self.residual = [_zeros(initial) for _ in inner_steps]
        self.f = _zeros(initial)
        self.restarted_from_anchor: list[tuple[int, int]] = []  # (t, replica) that was not finite
        self._sent: dict[int, _Sent] = {}

    def run(self) -> None:
        """Make all inner steps, then flush."""
        for t in range(1, self.settings.train_iters + 1):
            self.step(t)
        self.flush()

    def step(self, t: int) -> None:
        """Make inner step t on every replica, then the launches and applies that are due."""
        for local, inner_step in zip(self.local, self.inner_steps, strict=True):
            inner_step(local, t)
        tau, count = self.settings.overlap_steps, len(self.settings.fragments)
        applies = [i for i in range(count) if t - tau >= 1 and self._is_launch(t - tau, i)]
        launches = [i for i in range(count) if self._is_launch(t, i)]
        if tau > 0:
            for i in applies:
                self.apply(i)
        for i in launches:
            self.launch(i, t)
        if tau == 0:
            for i in applies:
                self.apply(i)

    def _is_launch(self, t: int, i: int) -> bool:
        _, start, h = self._round(t)
        return t == start + (h * (i + 1) // len(self.settings.fragments) or h)

    def _round(self, t: int) -> tuple[int, int, int]:
        """Return the round r of step t, the steps before it, and its own H_r steps."""
        r, start, h = 1, 0, _at(self.settings.sync_interval, 1)
        while start + h < t:
            r, start = r + 1, start + h
            h = _at(self.settings.sync_interval, r)
        return r, start, h

    def launch(self, i: int, t: int) -> None:
        """Encode and send the pseudogradient of fragment i of every replica with a weight."""
        s = self.settings
        sent = _Sent(t, q=[], weight=[], at_launch=[])
        lost_replicas = []
        for k, local in enumerate(self.local):
            delta = {name: self.anchor[name] - local[name] for name in s.fragments[i]}
            weight = self.weigh(k, i, t, delta)
            sent.weight.append(weight)
            # With weight 0 nothing is sent, so nothing is lost: e_k stays as it is.
            sent.q.append(self._encode(delta, self.residual[k]) if weight else {})
            sent.at_launch.append({name: local[name].clone() for name in s.fragments[i]})
            if not _finite(delta):
                lost_replicas.append(k)
        self._sent[i] = sent
        for k in lost_replicas:
            self._restart(k, t)

    def _encode(self, values: Parameters, residual: Parameters) -> Parameters:
        """Return ``q = D(E(v))`` for ``v = x + beta e``, and set ``e <- v - q``."""
        s = self.settings
        result = {}
        for name, x in values.items():
            v = x + s.error_decay * residual[name] if s.error_feedback else x
            q = torch.empty_like(v)
            for start, end in s.coding_units.get(name, [(0, v.numel())]):
                q.view(-1)[start:end] = s.codec(name, start, v.reshape(-1)[start:end])
            if s.error_feedback:
                residual[name] = v - q
            result[name] = q
        return result

    def _restart(self, k: int, t: int) -> None:
        """Restart a non-finite replica from the anchor in all fragments, without residuals."""
        self.restarted_from_anchor.append((t, k))
        for name, local in self.local[k].items():
            local.copy_(self.anchor[name])
        self.residual[k] = _zeros(self.anchor)
        for sent in self._sent.values():
            sent.at_launch[k] = {name: self.anchor[name].clone() for name in sent.at_launch[k]}

    def apply(self, i: int) -> None:
        """Average fragment i, take the outer step, and merge the anchor into every replica."""
        s = self.settings
        sent = self._sent.pop(i)
        usable = [(q, w) for q, w in zip(sent.q, sent.weight, strict=True) if w]
        if usable:  # otherwise anchor, u and f stay as they are
            weight_sum = sum(w for _, w in usable)
            mean = {n: _sum(w * q[n] for q, w in usable) / weight_sum for n in s.fragments[i]}
            delta = self._encode(mean, self.f) if s.encode_mean else mean
            r, _, _ = self._round(sent.launched_at)
            eta, mu = _at(s.outer_lr, r), _at(s.outer_momentum, r)
            for name, d in delta.items():
                self.u[name] = mu * self.u[name] + d
                step = eta * (d + mu * self.u[name])  # Nesterov
                self.anchor[name] = self.anchor[name] - step
        for k, local in enumerate(self.local):
            for name in s.fragments[i]:
                anchor, alpha = self.anchor[name], s.mixing_weight
                if s.additive:
                    local[name].copy_(anchor + (local[name] - sent.at_launch[k][name]))
                elif alpha == 0.0:
                    local[name].copy_(anchor)
                else:
                    local[name].copy_((1 - alpha) * anchor + alpha * local[name])

    def flush(self) -> None:
        """Apply fragments in flight, then average those with inner steps since their launch."""
        s = self.settings
        for i in sorted(self._sent, key=lambda i: (self._sent[i].launched_at, i)):
            self.apply(i)
        for i, names in enumerate(s.fragments):
            if self._is_launch(s.train_iters, i):
                continue  # no inner step since its last launch
            members = [{name: local[name] for name in names} for local in self.local]
            usable = [member for member in members if _finite(member)]
            for name in names:
                if usable:
                    total = _sum(member[name] for member in usable)
                    self.anchor[name] = total / len(usable)
                for local in self.local:
                    local[name].copy_(self.anchor[name])


def _at(value: Number | Callable[[int], Number], r: int) -> Number:
    return value(r) if callable(value) else value


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum, added from left to right."""
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor.clone() if total is None else total + tensor
    assert total is not None
    return total


def _finite(tensors: Parameters) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def _copy(tensors: Mapping[str, Tensor]) -> Parameters:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _zeros(tensors: Mapping[str, Tensor]) -> Parameters:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
