"""`BatchSource` returns microbatches by step number: the sampler's indices of a Megatron dataset.

A `BatchSource` has no position. Step t gives the same tensors in any order of calls and in any
process, so resuming means asking for the next step. Samples come from memory-mapped files, at the
cost of copying ``seq_length`` tokens each, so no loader processes are needed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_muloco.data.sampler import BatchLayout, RunLayout
from megatron_muloco.errors import ConfigError

__all__ = ["BatchSource", "IdRange", "SampleDataset", "collate", "document_ids", "read_ahead"]

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


@dataclass(frozen=True, slots=True)
class IdRange:
    """The token ids that a model has embeddings for.

    With tensor parallelism an id outside of it selects no row on any rank, and training goes on
    with a vector of zeros. So every microbatch is checked.

    Attributes:
        size: Ids are from 0 to ``size - 1``.
        masks_padding: Whether the dataset masks the positions of a padding id. If not, the only
            masked positions are those of id -1, which Megatron turns into id 0.
    """

    size: int
    masks_padding: bool

    def check(self, batch: Mapping[str, Tensor], places: Sequence[int]) -> None:
        """Raise ConfigError if a microbatch, made of the samples ``places``, has another id."""
        low, high = torch.stack([batch["tokens"], batch["labels"]]).aminmax()
        negative = not self.masks_padding and bool((batch["loss_mask"] == 0).any())
        if low < 0 or high >= self.size or negative:
            found = "-1" if negative else str(int(low if low < 0 else high))
            raise ConfigError(
                f"a token of the samples {', '.join(map(str, places))} has id {found}, but the "
                f"model has embeddings for 0 to {self.size - 1} (model.vocab_size). Prepare the "
                f"data again with tools/prepare_data.py, or use the tokenizer's vocabulary size."
            )


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
        ids: Token ids that the model has embeddings for; ``None`` checks none.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        layout: BatchLayout | RunLayout,
        *,
        replica: int,
        dp_rank: int,
        steps: int,
        ids: IdRange | None = None,
    ) -> None:
        needed = layout.consumed(steps)
        if len(dataset) < needed:
            raise ValueError(f"{steps} steps need {needed} samples; the dataset has {len(dataset)}")
        self.layout = layout
        self._dataset = dataset
        self._replica = replica
        self._dp_rank = dp_rank
        self._ids = ids

    def microbatch(self, step: int, index: int) -> dict[str, Tensor]:
        """Return the tensors of one forward pass, on the CPU.

        Args:
            step: Inner step (or evaluation step), from 1.
            index: Microbatch within the step.

        Shapes: as `collate`, b = micro-batch size.

        Raises:
            ConfigError: A token has an id that the model has no embedding for.
        """
        places = self.layout.at(step).indices(step, self._replica, self._dp_rank, index)
        batch = collate([self._dataset[place] for place in places])
        if self._ids is not None:
            self._ids.check(batch, places)
        return batch


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
