"""`AllocatedBytes`: counts the memory that tensor operations allocate."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are created inside the block, as long as they live.

    Memory that an operation allocates and frees internally is not counted.

    Attributes:
        most: Largest number of bytes that were alive at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count the tensors it created."""
        before = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        self._alive = {
            key: (storage, size)
            for key, (storage, size) in self._alive.items()
            if not storage.expired()
        }
        for leaf in tree_leaves(result):
            if _is_tensor(leaf) and _key(leaf) not in before:
                storage = leaf.untyped_storage()
                self._alive[_key(leaf)] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return result


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
