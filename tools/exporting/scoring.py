"""Losses of a trained model: on a run's held-out data, and on texts, in bits per byte.

Texts are scored as the lm-evaluation-harness scores a document: every token is predicted once, in
windows of the model's length that follow each other; the first begins after an end-of-document
token, and the last is filled up with tokens that were scored before.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_muloco.config.derived import smallest_topology
from megatron_muloco.data.batches import BatchSource
from megatron_muloco.data.datasets import build_datasets
from megatron_muloco.data.sampler import batch_layout
from megatron_muloco.data.tokenizer import load_encoder
from megatron_muloco.errors import ConfigError
from megatron_muloco.training.forward import ForwardBackward, evaluate
from tools.exporting.live import LiveModel

__all__ = ["Score", "held_out", "score_texts", "windows"]


@dataclass(frozen=True)
class Score:
    """Sum of losses over tokens.

    Attributes:
        nats: Sum of the tokens' negative log-likelihoods.
        tokens: Number of them.
        bytes: Bytes of UTF-8 that they stand for.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; NaN where there is no byte."""
        return self.nats / math.log(2) / self.bytes if self.bytes else float("nan")

    def __str__(self) -> str:
        return (
            f"{self.loss:.6f} nats per token, {self.bits_per_byte:.6f} bits per byte "
            f"({self.tokens:,} tokens, {self.bytes:,} bytes)"
        )


class _Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def held_out(live: LiveModel, split: str) -> Score:
    """Return the loss that the run reports for its held-out data, on the same samples.

    Args:
        live: The model.
        split: ``valid`` or ``test``.

    Raises:
        ConfigError: The run has no such data, or it is not here.
    """
    config, training = live.config, live.config.training
    sources = getattr(config.data, split)
    if not sources:
        raise ConfigError(
            f"{live.source.path}: its run has no data.{split}. Score texts instead (--text FILE)."
        )
    datasets = build_datasets(
        train=(),
        valid=sources,
        train_samples=0,
        valid_samples=training.eval_iters * training.global_batch_size,
        seq_length=config.model.seq_length,
        seed=config.data.seed,
        tokenizer=live.tokenizer,
        cache_dir=config.data.cache_dir,
    )
    assert datasets.valid is not None
    layout = batch_layout(config, smallest_topology(config)).held_out()
    steps = training.eval_iters
    source = BatchSource(datasets.valid, layout, replica=0, dp_rank=0, steps=steps)
    forward = ForwardBackward(
        live.model,
        live.groups,
        micro_batch_size=training.micro_batch_size,
        seq_length=config.model.seq_length,
        end_of_document=live.tokenizer.eod if config.data.mask_document_boundaries else None,
    )
    loss = evaluate(forward, None, source, live.groups, steps=steps)
    count = _byte_counter(live)
    labels = [
        row
        for step in range(1, steps + 1)
        for index in range(layout.num_microbatches)
        for row in source.microbatch(step, index)["labels"].tolist()
    ]
    tokens = sum(len(row) for row in labels)
    return Score(loss * tokens, tokens, sum(count(row) for row in labels))


def score_texts(live: LiveModel, texts: Sequence[str]) -> Score:
    """Return the loss over all tokens of texts, each read from its beginning."""
    data = live.config.data
    encoder = load_encoder(data.tokenizer_type, data.tokenizer_model)
    length = live.config.model.seq_length
    nats, tokens = 0.0, 0
    for ids in encoder.encode_batch(texts):
        for inputs, targets in windows(ids, first=encoder.eod, length=length):
            logits = live.logits(torch.tensor([inputs]))[0, -len(targets) :]
            wanted = torch.tensor(targets)
            nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens += len(targets)
    if not tokens:
        raise ConfigError("the texts have no token, so there is nothing to score.")
    return Score(nats, tokens, sum(len(text.encode()) for text in texts))


def windows(
    ids: Sequence[int], *, first: int, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield inputs and the tokens that their last positions predict.

    Args:
        ids: Tokens of one document.
        first: Token that stands before it.
        length: Most tokens of the inputs.
    """
    before = [first, *ids]  # before[i] is the input that predicts ids[i]
    done = 0
    while done < len(ids):
        end = min(done + length, len(ids))
        yield before[max(0, end - length) : end], list(ids[done:end])
        done = end


def _byte_counter(live: LiveModel) -> Any:
    """Return a function of token ids that returns the bytes of text that they stand for.

    Exact for sentencepiece and bytes. Other tokenizers decode a row as a whole, where a character
    that is cut at either end counts as its replacement.
    """
    data = live.config.data
    if data.tokenizer_type == "byte-level":
        return lambda ids: sum(1 for place in ids if place != live.tokenizer.eod)
    if data.tokenizer_type == "sentencepiece":
        import sentencepiece

        processor: Any = sentencepiece.SentencePieceProcessor()
        processor.Load(data.tokenizer_model)
        lengths = [_piece_bytes(processor, place) for place in range(processor.get_piece_size())]
        return lambda ids: sum(lengths[place] for place in ids)
    return lambda ids: len(live.tokenizer.detokenize(list(ids)).encode())


def _piece_bytes(processor: Any, place: int) -> int:
    if processor.is_control(place) or processor.is_unknown(place):
        return 0
    if processor.is_byte(place):
        return 1
    return len(processor.id_to_piece(place).replace("▁", " ").encode())
