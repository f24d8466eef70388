"""Loads the tokenizer that the config names, in two forms, and trains sentencepiece tokenizers.

`load_encoder` returns what preparing text needs: ids, vocabulary size, end-of-document id. For
sentencepiece and bytes it imports neither torch nor Megatron, which would cost every worker process
seconds. `load_tokenizer` returns Megatron's own object, which Megatron's datasets require. Both
give the same ids. Of Megatron's constructors only ``from_pretrained`` is used, because 0.16.1 and
0.19.x share it.

`train_tokenizer` trains a BPE tokenizer that loses nothing: decoding returns the exact text. For
that it neither normalises nor adds a blank in front (``add_dummy_prefix=False``), and it falls back
to bytes for characters outside the vocabulary. The one exception is U+2581, with which
sentencepiece itself marks blanks.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_muloco.errors import ConfigError

__all__ = [
    "MIN_VOCAB_SIZE",
    "TOKENIZER_TYPES",
    "Encoder",
    "Tokenizer",
    "check_tokenizer",
    "check_vocab_size",
    "load_encoder",
    "load_tokenizer",
    "masks_padding",
    "tokenizer_digest",
    "train_tokenizer",
]

TOKENIZER_TYPES = ("sentencepiece", "huggingface", "tiktoken", "byte-level")

# Megatron's ByteLevelTokenizer: bytes are their own ids, 512 ids in all, id 0 (NUL) ends documents.
_BYTE_LEVEL_VOCAB_SIZE = 512
_BYTE_LEVEL_EOD = 0

# Files that determine the ids of a Hugging Face tokenizer directory.
_HUGGINGFACE_FILES = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "spiece.model",
                      "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
                      "vocab.txt")  # fmt: skip


class Encoder(Protocol):
    """Minimal tokenizer for preparing data.

    Attributes:
        vocab_size: Number of ids.
        eod: Id that ends a document.
    """

    vocab_size: int
    eod: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without any special token."""
        ...


class Tokenizer(Protocol):
    """The part of Megatron's tokenizer object that this package uses."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is smaller."""
        ...

    @property
    def eod(self) -> int:
        """Id that ends a document."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return ids without special tokens."""
        ...

    def detokenize(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...


def check_tokenizer(tokenizer_type: str, tokenizer_model: str | None) -> list[str]:
    """Return what is wrong with the tokenizer's type and path, without loading it."""
    if tokenizer_type not in TOKENIZER_TYPES:
        return [
            f"data.tokenizer_type: {tokenizer_type!r} is not one of {', '.join(TOKENIZER_TYPES)}."
        ]
    if tokenizer_type == "byte-level":
        return []
    if not tokenizer_model:
        return [
            f"data.tokenizer_model is not set, but a {tokenizer_type} tokenizer is read from a "
            f"file. Set it, or use tokenizer_type: byte-level, which needs none."
        ]
    path = Path(tokenizer_model)
    if tokenizer_type == "huggingface" and not path.exists():
        # A hub name ("org/name") is for the transformers library to resolve.
        looks_local = (
            path.is_absolute() or tokenizer_model.startswith(".") or tokenizer_model.count("/") > 1
        )
        return [_missing(tokenizer_type, tokenizer_model)] if looks_local else []
    if tokenizer_type == "huggingface":
        return []
    return [] if path.is_file() else [_missing(tokenizer_type, tokenizer_model)]


def check_vocab_size(tokenizer_vocab_size: int, model_vocab_size: int) -> list[str]:
    """Return a problem if the tokenizer has ids that the model has no embedding for."""
    if tokenizer_vocab_size <= model_vocab_size:
        return []
    return [
        f"model.vocab_size: {model_vocab_size} is smaller than the {tokenizer_vocab_size} ids of "
        f"the tokenizer, so some tokens would have no embedding. Use vocab_size of at least "
        f"{tokenizer_vocab_size}, or train a smaller tokenizer with tools/train_tokenizer.py."
    ]


def tokenizer_digest(tokenizer_type: str, tokenizer_model: str | None) -> str:
    """Return a hash of everything that determines the ids; training compares it with the data's.

    It covers the file for sentencepiece and tiktoken, the tokenizer files of a local Hugging Face
    directory, and only the name for a hub name and for bytes.
    """
    digest = hashlib.sha256(tokenizer_type.encode())
    if tokenizer_type == "byte-level" or tokenizer_model is None:
        return digest.hexdigest()
    path = Path(tokenizer_model)
    if path.is_file():
        digest.update(path.read_bytes())
    elif path.is_dir():
        for name in _HUGGINGFACE_FILES:
            if (path / name).is_file():
                digest.update(name.encode() + b"\0" + (path / name).read_bytes())
    else:
        digest.update(tokenizer_model.encode())
    return digest.hexdigest()


def load_encoder(tokenizer_type: str, tokenizer_model: str | None = None) -> Encoder:
    """Return the encoder of a tokenizer.

    Raises:
        ConfigError: Unknown type, missing or unreadable file, or a library that is not installed.
    """
    if problems := check_tokenizer(tokenizer_type, tokenizer_model):
        raise ConfigError(problems)
    if tokenizer_type == "byte-level":
        return _Bytes()
    if tokenizer_type == "sentencepiece":
        assert tokenizer_model is not None
        return _SentencePiece(tokenizer_model)
    return _Megatron(load_tokenizer(tokenizer_type, tokenizer_model))


def load_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    *,
    model_vocab_size: int | None = None,
) -> Tokenizer:
    """Return Megatron's tokenizer.

    Args:
        tokenizer_type: One of `TOKENIZER_TYPES`.
        tokenizer_model: File, directory or hub name; ``None`` for ``byte-level``.
        model_vocab_size: When given, a larger vocabulary is refused.

    Raises:
        ConfigError: As `load_encoder`, or the vocabulary does not fit the model.
    """
    if problems := check_tokenizer(tokenizer_type, tokenizer_model):
        raise ConfigError(problems)
    from megatron.core.tokenizers import MegatronTokenizer

    path = None if tokenizer_type == "byte-level" else tokenizer_model
    metadata = {"library": tokenizer_type, "model_type": "gpt"}
    try:
        tokenizer: Tokenizer = MegatronTokenizer.from_pretrained(path, metadata_path=metadata)
    # The libraries behind it raise errors of many types for a file of another kind.
    except Exception as error:
        raise ConfigError(_unreadable(tokenizer_type, tokenizer_model, error)) from error
    size = tokenizer.vocab_size
    problems = [] if model_vocab_size is None else check_vocab_size(size, model_vocab_size)
    if problems:
        raise ConfigError(problems)
    return tokenizer


def masks_padding(tokenizer: Tokenizer) -> bool:
    """Whether Megatron's datasets mask positions of the tokenizer's padding id.

    They do not where it has none, or one that is also another special id. They then mask -1, which
    no text contains.

    Source: ``MegatronDataset`` in ``megatron/core/datasets/megatron_dataset.py``.
    """
    specials = dict(_attribute(tokenizer, "special_tokens_dict") or {})
    specials.pop("pad_token", None)
    other = [*specials.values()] or [_attribute(tokenizer, name) for name in ("eos", "eod")]
    pad = _attribute(tokenizer, "pad")
    return pad is not None and pad >= 0 and pad not in other


def _attribute(tokenizer: Tokenizer, name: str) -> Any:
    """Return a property of Megatron's tokenizer, which some libraries do not implement."""
    try:
        return getattr(tokenizer, name)
    except (AttributeError, IndexError, NotImplementedError, ValueError):
        return None


class _Bytes:
    vocab_size = _BYTE_LEVEL_VOCAB_SIZE
    eod = _BYTE_LEVEL_EOD

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


class _SentencePiece:
    def __init__(self, model: str) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ConfigError(
                "tokenizer_type sentencepiece: the sentencepiece package is not installed. "
                "Run: pip install sentencepiece"
            ) from error
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.Load(model)
        except (OSError, RuntimeError) as error:
            raise ConfigError(_unreadable("sentencepiece", model, error)) from error
        self.vocab_size: int = self._processor.get_piece_size()
        # As Megatron does for a model that has no piece named for the end of a document.
        self.eod: int = self._processor.eos_id()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return ids


class _Megatron:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eod

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokenizer.tokenize(text) for text in texts]


# What to do where the file of a tokenizer is missing.
_MISSING_REMEDIES = {
    "sentencepiece": "Train one with tools/train_tokenizer.py (the demo's comes from "
    "tools/demo_corpus.py).",
    "huggingface": "Put the files of a Hugging Face tokenizer there, such as tokenizer.json and "
    "tokenizer_config.json, or name another directory. tools/train_tokenizer.py trains "
    "tokenizer_type: sentencepiece instead.",
    "tiktoken": "Name the vocabulary file of a tiktoken tokenizer, or train a tokenizer of "
    "tokenizer_type: sentencepiece with tools/train_tokenizer.py.",
}


def _missing(kind: str, model: str) -> str:
    return f"data.tokenizer_model: {model} does not exist. {_MISSING_REMEDIES[kind]}"


def _unreadable(kind: str, model: str | None, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return (
        f"data.tokenizer_model: {model} is not a usable {kind} tokenizer "
        f"({type(error).__name__}: {reason[0] if reason else 'no reason given'})."
    )


# ---- training ------------------------------------------------------------------------------

# 256 bytes and the four control ids; characters and merges come on top.
MIN_VOCAB_SIZE = 260

# Control ids. unk, bos and eos are sentencepiece's defaults. The separate pad id keeps Megatron's
# datasets from treating a real token as padding.
_UNK, _BOS, _EOS, _PAD = 0, 1, 2, 3

# The trainer silently drops longer lines, so they are cut before (at most 4 bytes a character).
_LONGEST_LINE = 4096
_LONGEST_LINE_BYTES = 4 * _LONGEST_LINE


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Return the model file of a BPE tokenizer trained on texts.

    Training is deterministic: the trainer reads the documents in the given order and draws no
    sample, and the model file contains no paths or dates.

    Args:
        texts: Documents in a fixed order; consumed once.
        vocab_size: Total number of ids, including control ids and bytes.

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
            # A dummy prefix would change a third of the lines in a Hugging Face export. Runs of
            # blanks become tokens: indentation would otherwise cost one token a column.
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=_UNK,
            bos_id=_BOS,
            eos_id=_EOS,
            pad_id=_PAD,
            max_sentence_length=_LONGEST_LINE_BYTES,
            shuffle_input_sentence=False,
            # Written into the model file, so it must not depend on the machine.
            num_threads=2,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        if lines.error is not None:
            raise lines.error from None
        raise ConfigError(_reason(error, vocab_size, lines.count)) from error
    return model.getvalue()


class _Counted:
    """Iterable over the lines of texts that counts them while they are read.

    It keeps the error that ended the texts, of which sentencepiece's own error says only where in
    the code it was raised.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in text.splitlines():
                    for start in range(0, len(line), _LONGEST_LINE):
                        self.count += 1
                        yield line[start : start + _LONGEST_LINE]
        except BaseException as error:
            self.error = error
            raise


def _reason(error: Exception, vocab_size: int, lines: int) -> str:
    if lines == 0:
        return "the input holds no text, so there is nothing to train a tokenizer on."
    last = str(error).strip().splitlines()[-1]
    return (
        f"vocab size {vocab_size}: sentencepiece cannot build it from {lines} lines ({last}). "
        f"Use a smaller vocabulary or more text."
    )
