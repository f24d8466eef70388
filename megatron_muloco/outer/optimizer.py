"""Mathematics of the outer step: pseudogradient, Nesterov step, merge rules, anchor state.

One outer step, in the order of this file. theta is the anchor, theta_k what replica k trains, w_k
its weight, u the outer momentum::

    at the launch      D_k      =  theta - theta_k                          `pseudogradient`
    on the network     D        =  sum_k w_k D_k / sum_k w_k                `Reducer`
    at the apply       u       <-  mu u + D                                 `OuterNesterov.step`
                       theta   <-  theta - eta (D + mu u)                   `OuterNesterov.step`
                       theta_k <-  (1 - alpha) theta + alpha theta_k        `Mix.merge`
                  or   theta_k <-  theta + (theta_k - theta_k at launch)    `Additive.merge`

`AnchorState` holds theta and u for one rank's shards. Every formula is elementwise and in fp32, so
a shard gets the same bits as the whole tensor would.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_muloco.errors import CheckpointError
from megatron_muloco.params import coverage

__all__ = [
    "Additive",
    "AnchorState",
    "MergeRule",
    "Mix",
    "OuterNesterov",
    "OuterOptimizer",
    "RoundSchedule",
    "check_names",
    "copy_to",
    "overwrite",
    "pin_while_used",
    "pseudogradient",
]

# ---- pseudogradient ------------------------------------------------------------------------------


def pseudogradient(anchor: Tensor, local: Tensor, *, out: Tensor) -> Tensor:
    """Return ``anchor - local``, the direction that the outer optimizer subtracts.

    A positive entry means that the replica moved *down* in that coordinate, so the result behaves
    like a gradient summed over the round: an outer step with lr 1 and no momentum moves the anchor
    onto the (mean) local parameters, up to one fp32 rounding.

    Args:
        anchor: Parameters agreed at the last outer step; fp32, on any device.
        local: The replica's current parameters, same shape; may be a view of a model parameter.
        out: Buffer for the result, fp32, on the device that will send it. It may be neither input.

    Returns:
        ``out``.

    Dtypes: the subtraction is done in fp32, whatever ``local`` is.
    Source: DiLoCo (arXiv:2311.08105), algorithm 1.
    """
    # The package's only subtraction of anchor and local parameters: the sign is decided here.
    out.copy_(anchor)
    return out.sub_(local.to(device=out.device, dtype=out.dtype))


# ---- the step on the anchor ----------------------------------------------------------------------

RoundSchedule = Callable[[int], float]
"""A hyperparameter as a function of the round, which is counted from 1."""


class OuterOptimizer(Protocol):
    """Rule by which the anchor moves with the mean pseudogradient.

    It is called for one shard of one parameter at a time, so it must be elementwise and must keep
    all its state in ``momentum``, which checkpoints hold. It must be deterministic: every replica
    makes the same step by itself.
    """

    def step(self, anchor: Tensor, momentum: Tensor, mean: Tensor, *, round_index: int) -> None:
        """Update ``anchor`` and ``momentum`` in place.

        Args:
            anchor: theta, a flat fp32 shard.
            momentum: One fp32 value per parameter, same shape; zeros before the first step.
            mean: D, the mean pseudogradient, same shape. It must be overwritten with the amount
                subtracted from the anchor, whose norm is logged.
            round_index: Round of the launch, counted from 1.
        """


@dataclass(frozen=True, slots=True)
class OuterNesterov:
    """SGD with Nesterov momentum on the mean pseudogradient.

    ::

        u      <-  mu u + D
        theta  <-  theta - eta (D + mu u)

    With mu = 0 and eta = 1 the anchor becomes the mean of the local parameters.

    Attributes:
        lr: Outer learning rate (eta). It is applied here and nowhere else, also with error
            feedback.
        momentum: Outer momentum (mu).

    Source: DiLoCo (arXiv:2311.08105), in the form of ``torch.optim.SGD(nesterov=True)``: the
    momentum buffer does not contain the learning rate, so a schedule of ``lr`` acts at once.
    """

    lr: float | RoundSchedule
    momentum: float | RoundSchedule

    def step(self, anchor: Tensor, momentum: Tensor, mean: Tensor, *, round_index: int) -> None:
        """Update ``anchor`` and ``momentum`` (u) in place; see `OuterOptimizer.step`.

        ``mean`` is overwritten with ``eta (D + mu u)``. ``round_index`` selects the values of
        schedules of lr and momentum.

        Dtypes: fp32 throughout. The result equals torch's SGD within one rounding.
        """
        lr, mu = _at(self.lr, round_index), _at(self.momentum, round_index)
        # Separate multiply and add, not addcmul or add_(alpha=): a kernel may use a fused
        # multiply-add in its vector loop and not in its tail. Bits would then depend on where a
        # shard starts, and a resume on another layout would differ.
        momentum.mul_(mu).add_(mean)  # u <- mu u + D
        update = mean.add_(momentum * mu).mul_(lr)  # eta (D + mu u), in the memory of D
        anchor.sub_(update)  # theta <- theta - eta (D + mu u)


def _at(value: float | RoundSchedule, round_index: int) -> float:
    return value(round_index) if callable(value) else value


# ---- how a replica takes the new anchor ----------------------------------------------------------


class MergeRule(Protocol):
    """Rule by which a replica takes the new anchor after an outer step."""

    @property
    def kept_progress(self) -> float:
        """Share of the progress between launch and apply that the merge keeps, in [0, 1]."""

    def merge(self, local: Tensor, anchor: Tensor, at_launch: Tensor) -> None:
        """Write the new local parameters into ``local``.

        Args:
            local: theta_k now; written in place.
            anchor: theta after the outer step.
            at_launch: theta_k when the fragment was launched; ``local`` itself without overlap.
        """


@dataclass(frozen=True, slots=True)
class Mix:
    """``theta_k <- (1 - alpha) * theta + alpha * theta_k``.

    Attributes:
        mixing_weight: alpha, the share of the local value that is kept; 0 takes the anchor.

    Source: Streaming DiLoCo (arXiv:2501.18512), where alpha is 0.5 whenever launches overlap steps.
    """

    mixing_weight: float = 0.0

    @property
    def kept_progress(self) -> float:
        """Share of the progress between launch and apply that the merge keeps."""
        return self.mixing_weight

    def merge(self, local: Tensor, anchor: Tensor, at_launch: Tensor) -> None:
        """Write ``(1 - alpha) theta + alpha theta_k`` into ``local``; see `MergeRule.merge`."""
        if self.mixing_weight == 0.0:  # needed for correctness: 0 * NaN is NaN
            local.copy_(anchor)
        else:
            local.mul_(self.mixing_weight).add_(anchor * (1.0 - self.mixing_weight))


@dataclass(frozen=True, slots=True)
class Additive:
    """``theta_k <- theta + (theta_k - theta_k at launch)``: keeps all steps since the launch."""

    @property
    def kept_progress(self) -> float:
        """Share of the progress between launch and apply that the merge keeps."""
        return 1.0

    def merge(self, local: Tensor, anchor: Tensor, at_launch: Tensor) -> None:
        """Write the anchor plus the change of ``local`` since the launch; see `MergeRule.merge`."""
        if local is at_launch:  # no overlap: the difference is 0, also where local is not finite
            local.copy_(anchor)
        else:
            local.sub_(at_launch).add_(anchor)


# ---- state of one rank's shards ------------------------------------------------------------------


class AnchorState:
    """Anchor theta and outer momentum u of one rank's shards, by name, flat fp32.

    The state lives on the masters' device or in host memory. From host memory one shard at a time
    is copied to the masters' device for its step, so the arithmetic and all bits are the same. All
    tensors are views of one block, 8 bytes a value.

    Args:
        masters: Parameters that the run starts from. They are copied, because masters may be views
            of the parameters that the replica trains.
        device: Device of the state.

    Attributes:
        device: Device of the state.
        anchor: theta by name.
        momentum: u by name; the same names.
    """

    def __init__(self, masters: Mapping[str, Tensor], device: torch.device) -> None:
        self.device = device
        sizes = [local.numel() for local in masters.values()]
        both = torch.zeros(2, sum(sizes), dtype=torch.float32, device=device)
        # A rank without shards has nothing to pin, and CUDA refuses an empty range.
        if device.type == "cpu" and any(local.is_cuda for local in masters.values()):
            pin_while_used(self, both)
        anchor, momentum = (
            dict(zip(masters, row.split(sizes), strict=True)) for row in both.unbind()
        )
        self.anchor: dict[str, Tensor] = {
            name: anchor[name].view_as(local) for name, local in masters.items()
        }
        self.momentum: dict[str, Tensor] = {
            name: momentum[name].view_as(local) for name, local in masters.items()
        }
        overwrite(self.anchor, masters)

    def anchor_on(self, device: torch.device, name: str) -> Tensor:
        """Return one shard's anchor on ``device``: the stored tensor itself if it is there."""
        return self.anchor[name].to(device)

    def pseudogradient(self, name: str, local: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return ``theta - local`` of one shard, by default in new memory beside ``local``."""
        out = torch.empty_like(local) if out is None else out
        return pseudogradient(self.anchor[name], local, out=out)

    def step(self, name: str, mean: Tensor, optimizer: OuterOptimizer, round_index: int) -> Tensor:
        """Take the outer step on one shard; see `OuterOptimizer.step`.

        Returns:
            The new anchor on the device of ``mean``.
        """
        anchor, momentum = self.anchor[name].to(mean.device), self.momentum[name].to(mean.device)
        optimizer.step(anchor, momentum, mean, round_index=round_index)
        if anchor is not self.anchor[name]:  # the state is in host memory; these were copies
            self.anchor[name].copy_(anchor)
            self.momentum[name].copy_(momentum)
        return anchor

    def load(self, anchor: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> None:
        """Copy saved tensors into this state.

        Raises:
            CheckpointError: The names are not those of this rank's shards.
        """
        check_names("anchor", anchor, self.anchor)
        check_names("momentum", momentum, self.momentum)
        for name in self.anchor:
            self.anchor[name].copy_(anchor[name])
            self.momentum[name].copy_(momentum[name])


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Return an fp32 copy on ``device``; a host copy of a CUDA tensor is in pinned memory."""
    pin = device.type == "cpu" and tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=torch.float32, device=device, pin_memory=pin)
    return copy.copy_(tensor.detach())


_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every CUDA context of the process


def pin_while_used(owner: object, block: Tensor) -> None:
    """Lock the pages of host memory, so that GPUs copy it directly, until ``owner`` is gone.

    (CUDA only; this way of pinning has not run on a GPU.)
    """
    # torch's pinned allocator rounds every block up to a power of two, in the worst case to twice
    # its size. Registering memory that was allocated as usual adds no byte.
    torch.cuda.check_error(
        torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, _PORTABLE)
    )
    # The arguments keep the block alive, so it is never freed while it is registered.
    release = weakref.finalize(owner, _unpin, block)
    release.atexit = False  # CUDA may be gone by then, and the process frees everything


def _unpin(block: Tensor) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(block.data_ptr()))


@torch.no_grad()
def overwrite(masters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy ``values`` into the masters of the same names."""
    for name, value in values.items():
        masters[name].copy_(value)


def check_names(kind: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    """Check that saved tensors are exactly those of this rank.

    Args:
        kind: Kind of the tensors, for the message.
        given: Names in the checkpoint.
        wanted: Names that this rank holds.

    Raises:
        CheckpointError: Names are missing, or belong to other ranks.
    """
    missing, surplus = coverage(list(given), wanted)
    if missing or surplus:
        raise CheckpointError(
            f"outer state '{kind}': missing {', '.join(missing) or 'none'}; not held by this rank: "
            f"{', '.join(surplus) or 'none'}. It was saved for another model, or for another "
            "sharding of it. Resume with the model of the saved run."
        )
