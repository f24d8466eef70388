"""Anchor and outer momentum of one rank's shards, on the device or in host memory."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_muloco.errors import CheckpointError
from megatron_muloco.outer.optimizer import OuterNesterov
from megatron_muloco.outer.pseudogradient import pseudogradient
from megatron_muloco.shards import coverage

__all__ = ["AnchorState", "check_names", "copy_to", "overwrite"]


class AnchorState:
    """theta and u by name, flat fp32; the same names in both.

    In host memory they visit the masters' device one shard at a time, so that the arithmetic, and
    with it every bit, is the same as with the state on the device.

    Args:
        masters: The parameters that the run starts from; copied, since masters may be views of
            the parameters that the replica trains.
        device: Where the state lives.
    """

    def __init__(self, masters: Mapping[str, Tensor], device: torch.device) -> None:
        self.device = device
        self.anchor = {name: copy_to(device, local) for name, local in masters.items()}
        self.momentum = {
            name: copy_to(device, torch.zeros_like(local)) for name, local in masters.items()
        }

    def anchor_on(self, device: torch.device, name: str) -> Tensor:
        """Return one shard's anchor on ``device``: the stored tensor itself where it is there."""
        return self.anchor[name].to(device)

    def pseudogradient(self, name: str, local: Tensor) -> Tensor:
        """Return anchor minus ``local`` in new memory on the device of ``local``."""
        return pseudogradient(self.anchor[name], local, out=torch.empty_like(local))

    def step(self, name: str, mean: Tensor, optimizer: OuterNesterov, round_index: int) -> Tensor:
        """Take the outer step on one shard; see `OuterNesterov.step`.

        Returns:
            The new anchor on the device of ``mean``, where the step is taken.
        """
        anchor, momentum = self.anchor[name].to(mean.device), self.momentum[name].to(mean.device)
        optimizer.step(anchor, momentum, mean, round_index=round_index)
        if anchor is not self.anchor[name]:
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
    """Return an fp32 copy on ``device``; pinned on the host of an accelerator's tensor."""
    pin = device.type == "cpu" and tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=torch.float32, device=device, pin_memory=pin)
    return copy.copy_(tensor.detach())


@torch.no_grad()
def overwrite(masters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the masters of the same names."""
    for name, value in values.items():
        masters[name].copy_(value)


def check_names(kind: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise `CheckpointError` unless saved tensors are exactly those that this rank holds."""
    missing, surplus = coverage(list(given), wanted)
    if missing or surplus:
        raise CheckpointError(
            f"outer state '{kind}': missing {', '.join(missing) or 'none'}; not held by this rank: "
            f"{', '.join(surplus) or 'none'}. It was saved for another model, or another division "
            "of it. Resume with the model of the saved run."
        )
