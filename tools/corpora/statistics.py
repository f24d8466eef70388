"""Unigram baseline: cross-entropy of held-out text under the training text's token counts."""

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_muloco.data.indexed import open_indexed
from megatron_muloco.errors import ConfigError

__all__ = ["token_counts", "unigram_cross_entropy"]

# Tokens counted at once: 32 MiB of int64 indices inside bincount.
_CHUNK = 4 * 1024 * 1024


def token_counts(prefixes: list[str], vocab_size: int) -> npt.NDArray[np.int64]:
    """Return how often each id occurs in some datasets.

    Raises:
        ConfigError: A dataset cannot be read, or has ids of another vocabulary.
    """
    total = np.zeros(vocab_size, np.int64)
    for prefix in prefixes:
        tokens: npt.NDArray[Any] = open_indexed(prefix).tokens
        for start in range(0, len(tokens), _CHUNK):
            counts = np.bincount(tokens[start : start + _CHUNK], minlength=vocab_size)
            if len(counts) > vocab_size:
                raise ConfigError(
                    f"dataset {prefix}: it holds id {len(counts) - 1}, but the vocabulary has "
                    f"{vocab_size} ids; it was prepared with another tokenizer. "
                    f"Run tools/prepare_data.py with the tokenizer of this run."
                )
            total += counts
    return total


def unigram_cross_entropy(train: list[str], held_out: list[str], vocab_size: int) -> float:
    """Return the held-out cross-entropy in nats per token of a unigram model.

    The model is the training text's token frequencies with one added to each count, so that ids
    seen only in held-out text have a probability too. A language model that learned nothing but
    how frequent tokens are has this loss.

    Args:
        train: Prefixes the model is estimated from.
        held_out: Prefixes it is measured on, end-of-document ids included.
        vocab_size: Ids of the tokenizer.
    """
    seen = token_counts(train, vocab_size) + 1.0
    measured = token_counts(held_out, vocab_size)
    log_probability = np.log(seen / seen.sum())
    return float(-(measured @ log_probability) / measured.sum())
