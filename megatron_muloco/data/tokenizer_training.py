"""Training of a sentencepiece BPE tokenizer that loses nothing.

Every text comes back exactly from its ids: no normalisation, no blank added in front
(``add_dummy_prefix=False``; with it, a Hugging Face export would differ on a third of the lines),
and bytes as a fallback for characters outside the vocabulary. The one exception is U+2581, which
sentencepiece itself uses for the blank. Training is deterministic: documents in the given order,
no sampling inside the trainer, and a model file without paths or dates.
"""

import io
from collections.abc import Iterable, Iterator

from megatron_muloco.errors import ConfigError

__all__ = ["MIN_VOCAB_SIZE", "train_tokenizer"]

# 256 bytes and the four control ids; characters and merges come on top.
MIN_VOCAB_SIZE = 260

# Control ids. unk, bos and eos are sentencepiece's defaults; a pad id of its own keeps Megatron's
# datasets from treating a real token as padding.
_UNK, _BOS, _EOS, _PAD = 0, 1, 2, 3

# The trainer drops longer lines without failing, so they are cut before (4 bytes a character).
_LONGEST_LINE = 4096
_LONGEST_LINE_BYTES = 4 * _LONGEST_LINE


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Return the model file of a BPE tokenizer trained on texts.

    Args:
        texts: Documents in a fixed order; consumed once.
        vocab_size: Ids in all, control ids and bytes included.

    Raises:
        ConfigError: The size is impossible, or the texts have too few different words for it.
    """
    if vocab_size < MIN_VOCAB_SIZE + 1:
        raise ConfigError(
            f"vocab size {vocab_size} leaves no room beside the {MIN_VOCAB_SIZE} byte and control "
            f"ids. Use 512 or more; 4096 suits a small English model."
        )
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(
            "training a tokenizer needs the sentencepiece package. Run: pip install sentencepiece"
        ) from error
    model = io.BytesIO()
    lines = _Counted(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Runs of blanks become tokens: indentation would otherwise cost one token a column.
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=_UNK,
            bos_id=_BOS,
            eos_id=_EOS,
            pad_id=_PAD,
            max_sentence_length=_LONGEST_LINE_BYTES,
            shuffle_input_sentence=False,
            # Written into the model file, so it must not follow the machine.
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(_reason(error, vocab_size, lines.count)) from error
    return model.getvalue()


class _Counted:
    """Lines of texts, counted while they are read."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            for line in text.splitlines():
                for start in range(0, len(line), _LONGEST_LINE):
                    self.count += 1
                    yield line[start : start + _LONGEST_LINE]


def _reason(error: Exception, vocab_size: int, lines: int) -> str:
    if lines == 0:
        return "the input holds no text, so there is nothing to train a tokenizer on."
    last = str(error).strip().splitlines()[-1]
    return (
        f"vocab size {vocab_size}: sentencepiece cannot build it from {lines} lines ({last}). "
        f"Use a smaller vocabulary or more text."
    )
