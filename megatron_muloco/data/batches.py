"""`BatchSource` returns microbatches by step number: the sampler's indices of a Megatron dataset.

A `BatchSource` has no position. Step t gives the same tensors in any order of calls and in any
process, so resuming means asking for the next step. Samples come from memory-mapped files, at the
cost of copying ``seq_length`` tokens each, so no loader processes are needed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_muloco.data.sampler import BatchLayout, RunLayout

__all__ = ["BatchSource", "SampleDataset", "collate", "document_ids", "read_ahead"]

# Keys of a sample of Megatron's GPTDataset when it creates no attention mask.
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class SampleDataset(Protocol):
    """Random access to samples, as Megatron's GPTDataset and BlendedDataset give it."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return one sample: tensors of ``seq_length`` elements."""
        ...


class BatchSource:
    """The samples of one rank, by step and microbatch.

    Args:
        dataset: Samples in their global order.
        layout: Division of every step's samples.
        replica: This rank's replica. For held-out data pass ``layout.held_out()`` and replica 0 on
            all replicas: which forward passes a replica makes is decided by `evaluate`.
        dp_rank: This rank's data-parallel rank; ranks that differ only in tensor, pipeline or
            context position read the same samples.
        steps: Number of steps that will be read; the dataset must be long enough.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        layout: BatchLayout | RunLayout,
        *,
        replica: int,
        dp_rank: int,
        steps: int,
    ) -> None:
        needed = layout.consumed(steps)
        if len(dataset) < needed:
            raise ValueError(f"{steps} steps need {needed} samples; the dataset has {len(dataset)}")
        self.layout = layout
        self._dataset = dataset
        self._replica = replica
        self._dp_rank = dp_rank

    def microbatch(self, step: int, index: int) -> dict[str, Tensor]:
        """Return the tensors of one forward pass, on the CPU.

        Args:
            step: Inner step (or evaluation step), from 1.
            index: Microbatch within the step.

        Shapes: as `collate`, b = micro-batch size.
        """
        places = self.layout.at(step).indices(step, self._replica, self._dp_rank, index)
        return collate([self._dataset[place] for place in places])


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the samples stacked: tokens, labels, loss_mask and position_ids.

    Shapes: each [b, s] for b samples of s tokens.
    Dtypes: int64, except loss_mask, which is fp32.
    """
    return {key: torch.stack([sample[key] for sample in samples]) for key in _KEYS}


def read_ahead(
    batches: Iterator[Mapping[str, Tensor]],
    keys: Sequence[str],
    *,
    pin: Callable[[Tensor], Tensor] = Tensor.pin_memory,
) -> Iterator[dict[str, Tensor]]:
    """Yield microbatches in their order; a thread reads and pins the next one meanwhile.

    Copies from pinned memory to an accelerator need no synchronisation. Not run on a GPU yet.

    Args:
        batches: Microbatches on the CPU. One more than was asked for is taken from it.
        keys: The tensors to keep.
        pin: Returns a tensor in pinned memory.
    """

    def take() -> dict[str, Tensor] | None:
        batch = next(batches, None)
        return None if batch is None else {key: pin(batch[key]) for key in keys}

    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(take)
        while (batch := coming.result()) is not None:
            coming = reader.submit(take)
            yield batch


def document_ids(tokens: Tensor, eod: int) -> Tensor:
    """Return for each position the index of its document.

    That is the number of end-of-document ids *before* the position: such an id still belongs to the
    document that it ends, and the next token starts a new one. Positions may attend to each other
    if their indices are equal.

    Args:
        tokens: Token ids, [b, s].
        eod: Id that ends a document.

    Returns:
        int64, [b, s], starting at 0 in each row.
    """
    ends = (tokens == eod).long()
    return ends.cumsum(dim=-1) - ends
