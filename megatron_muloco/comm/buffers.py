"""Flat buffers for collectives: where each tensor lies in one, and keeping them between rounds."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BufferPool", "Layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and sizes of tensors laid end to end in one flat buffer."""

    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """Return the layout of ``tensors`` in their order."""
        return cls(tuple((name, tensor.numel()) for name, tensor in tensors.items()))

    @property
    def numel(self) -> int:
        """Elements of all tensors together."""
        return sum(size for _, size in self.sizes)

    def pack(self, tensors: Mapping[str, Tensor], buffer: Tensor) -> None:
        """Copy ``tensors`` to the head of ``buffer``, converting to its dtype."""
        places = self.unpack(buffer)
        assert places.keys() == tensors.keys(), "packed names are not the given names"
        for name, tensor in tensors.items():
            places[name].copy_(tensor)

    def unpack(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return each tensor's place in ``buffer``, as views."""
        pieces = buffer[: self.numel].split([size for _, size in self.sizes])
        names = [name for name, _ in self.sizes]
        return dict(zip(names, pieces, strict=True))


class BufferPool:
    """Buffers that outlive a round, so that an outer step allocates nothing new after the first.

    As many exist as were ever in use at once, not one for every fragment.

    Args:
        device: Where they are.
        pin_memory: For host memory that an accelerator copies to and from.
    """

    def __init__(self, device: torch.device, *, pin_memory: bool = False) -> None:
        self._device, self._pin_memory = device, pin_memory
        self._free: list[Tensor] = []
        self._lent: list[tuple[Tensor, Tensor]] = []

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a flat buffer of exactly this size, contents undefined."""
        wanted = numel * dtype.itemsize
        self._free.sort(key=Tensor.numel)
        index = next((i for i, free in enumerate(self._free) if free.numel() >= wanted), None)
        if index is not None:
            storage = self._free.pop(index)
        else:
            # Grow instead of adding: the smallest free buffer makes room for this one.
            del self._free[:1]
            storage = torch.empty(
                wanted, dtype=torch.uint8, device=self._device, pin_memory=self._pin_memory
            )
        buffer = storage[:wanted].view(dtype)
        self._lent.append((buffer, storage))
        return buffer

    def give(self, *buffers: Tensor) -> None:
        """Take back buffers; their contents stay until they are taken again."""
        for buffer in buffers:
            index = next(i for i, (lent, _) in enumerate(self._lent) if lent is buffer)
            self._free.append(self._lent.pop(index)[1])
