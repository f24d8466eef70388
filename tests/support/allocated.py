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


class SavedBytes:
    """Counts the bytes that autograd saves for backward inside the block, as long as they live.

    A storage counts once, and for the module that saved it last. Parameters are not counted. Only
    what exists before a recomputation is counted: what a checkpoint saves in backward is not.

    Args:
        model: The model; its modules' names are given to ``kind_of``.
        kind_of: Returns the kind of a tensor that a module saved.

    Attributes:
        most: Largest number of bytes that were alive at the same time.
        at_most: These bytes by kind.
    """

    def __init__(self, model: torch.nn.Module, kind_of: Callable[[str, torch.Tensor], str]) -> None:
        self.most = 0
        self.at_most: dict[str, int] = {}
        self._model, self._kind_of = model, kind_of
        self._parameters = {_key(parameter) for parameter in model.parameters()}
        self._alive: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._modules: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "SavedBytes":
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name)))
            self._handles.append(module.register_forward_hook(self._leave))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self._modules.append(name)

    def _leave(self, *_: Any) -> None:
        self._modules.pop()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        key = _key(tensor)
        recomputes = torch._C._current_graph_task_id() != -1  # inside a backward pass
        if key not in self._parameters and not recomputes:
            storage = tensor.untyped_storage()
            kind = self._kind_of(self._modules[-1] if self._modules else "", tensor)
            self._alive[key] = (StorageWeakRef(storage), storage.nbytes(), kind)
            self._count()
        if tensor.is_leaf and tensor.requires_grad:
            return tensor
        # Of an output, the tensor itself would hold the node that holds it.
        return tensor.detach().requires_grad_(tensor.requires_grad)

    def _count(self) -> None:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        total = sum(size for _, size, _ in self._alive.values())
        if total > self.most:
            self.most, self.at_most = total, {}
            for _, size, kind in self._alive.values():
                self.at_most[kind] = self.at_most.get(kind, 0) + size
