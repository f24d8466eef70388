r"""Megatron's indexed datasets as files: names, header, sanity, and the manifest beside them.

Megatron reads ``PREFIX.idx`` and ``PREFIX.bin`` and asserts when they are not what it expects.
This module looks first, with numpy alone (no torch, no Megatron: start-up checks and ``--dry-run``
take no time), and says what is wrong. The layout of the index, little endian::

    b"MMIDIDX\0\0" | version u64 = 1 | dtype code u8 | sequences S u64 | documents D u64
    | lengths i32[S] | byte offsets i64[S] | document ends i64[D]          (D counts a leading 0)

Source: ``megatron/core/datasets/indexed_dataset.py``, the same in 0.16.1 and 0.19.2.

``PREFIX.json`` is ours: what the tokens were made from and by which tokenizer. Datasets that were
prepared by other tools have none and are read all the same.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_muloco.errors import ConfigError

__all__ = [
    "IndexedFiles",
    "Manifest",
    "bin_path",
    "check_indexed",
    "idx_path",
    "manifest_path",
    "open_indexed",
    "partial_files",
    "publish",
    "read_manifest",
    "write_manifest",
]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip

_PREPARE = "Run: python tools/prepare_data.py --input FILES --output-prefix {prefix} ..."


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `prepare_data` knows about a dataset.

    Attributes:
        tokens: Token count, end-of-document ids included.
        documents: Documents written.
        text_bytes: UTF-8 bytes of their text.
        skipped: Bad records left out on request.
        empty: Records without text, which make no document.
        append_eod: Whether every document ends with ``eod``.
        eod: The id that ends documents.
        dtype: numpy name of the stored token type.
        tokenizer_type: As in the config.
        tokenizer_digest: From `tokenizer.tokenizer_digest`.
        vocab_size: Ids of the tokenizer.
        inputs: Path and size in bytes of every input, in order.
        origin: Where the text came from, as the caller states it (versions, a content hash).
    """

    tokens: int
    documents: int
    text_bytes: int
    skipped: int
    empty: int
    append_eod: bool
    eod: int
    dtype: str
    tokenizer_type: str
    tokenizer_digest: str
    vocab_size: int
    inputs: list[dict[str, Any]]
    origin: dict[str, Any]


@dataclass(frozen=True, slots=True)
class IndexedFiles:
    """A dataset opened read-only: all tokens in file order and the length of each sequence."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    documents: int


def bin_path(prefix: str) -> Path:
    """Return the file with the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str) -> Path:
    """Return the file with the lengths; it exists only when the dataset is complete."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str) -> Path:
    """Return the file that says what the tokens are."""
    return Path(f"{prefix}.json")


def check_indexed(prefix: str, *, min_tokens: int = 1) -> list[str]:
    """Return why a dataset cannot be used, as sentences that say what to do.

    Args:
        prefix: Path without suffix.
        min_tokens: Tokens of the shortest dataset that gives a sample.
    """
    try:
        found = len(open_indexed(prefix).tokens)
    except ConfigError as error:
        return list(error.problems)
    if found < min_tokens:
        return [
            f"dataset {prefix}: its {found} tokens are fewer than the {min_tokens} of one sample. "
            f"Use more text or a shorter model.seq_length."
        ]
    return []


def open_indexed(prefix: str) -> IndexedFiles:
    """Map a dataset into memory.

    Raises:
        ConfigError: Files missing, of another kind, truncated, inconsistent or empty.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise ConfigError(_missing(prefix, path))
    dtype, sequences, ends = _read_header(prefix)
    lengths = np.memmap(idx_path(prefix), np.int32, "r", offset=_HEADER.size, shape=(sequences,))
    tokens_expected = int(lengths.sum(dtype=np.int64))
    bytes_expected = tokens_expected * np.dtype(dtype).itemsize
    bytes_found = bin_path(prefix).stat().st_size
    if bytes_found != bytes_expected:
        raise ConfigError(
            f"dataset {prefix}: the .bin file has {bytes_found} bytes but the .idx file describes "
            f"{bytes_expected}; they do not belong together or a copy was cut short. "
            + _PREPARE.format(prefix=prefix)
        )
    tokens = np.memmap(bin_path(prefix), dtype, "r", shape=(tokens_expected,))
    return IndexedFiles(tokens, lengths, ends - 1)


def read_manifest(prefix: str) -> Manifest | None:
    """Return the manifest, or ``None`` where the dataset was prepared by another tool.

    Raises:
        ConfigError: The file is there but is not a manifest.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"dataset {prefix}: {path} is not a manifest of tools/prepare_data.py ({error}). "
            + _PREPARE.format(prefix=prefix)
        ) from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest and wait until it is on disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def partial_files(prefix: str) -> Iterator[tuple[Path, Path, Path]]:
    """Give the temporary names of tokens, index and manifest, and remove what is left of them.

    The suffix comes last, so that no reader of ``*.idx`` takes them for a dataset. A killed process
    leaves them behind; the next run with this prefix writes over them.
    """
    partials = (
        _partial(bin_path(prefix)),
        _partial(idx_path(prefix)),
        _partial(manifest_path(prefix)),
    )
    try:
        yield partials
    finally:
        for path in partials:
            path.unlink(missing_ok=True)


def publish(prefix: str) -> None:
    """Give the temporary files their names; the index is the last, and an old one goes first."""
    for path in (bin_path(prefix), idx_path(prefix)):
        with _partial(path).open("rb") as file:
            os.fsync(file.fileno())
    idx_path(prefix).unlink(missing_ok=True)  # from here on an old dataset is not complete either
    for path in (bin_path(prefix), manifest_path(prefix), idx_path(prefix)):
        _partial(path).replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _read_header(prefix: str) -> tuple[type[np.generic], int, int]:
    """Return (token type, sequences, document ends) of an index that has its full length."""
    path = idx_path(prefix)
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC or len(header) < _HEADER.size:
        raise ConfigError(
            f"dataset {prefix}: {path} does not start like a Megatron index, so it is another kind "
            f"of file. " + _PREPARE.format(prefix=prefix)
        )
    _, version, code, sequences, ends = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise ConfigError(
            f"dataset {prefix}: {path} has version {version} and token type {code}; known are "
            f"version 1 and the integer types. " + _PREPARE.format(prefix=prefix)
        )
    if size < _HEADER.size + 12 * sequences + 8 * ends:
        raise ConfigError(
            f"dataset {prefix}: {path} is shorter than its {sequences} sequences need; a copy was "
            f"cut short. " + _PREPARE.format(prefix=prefix)
        )
    if sequences == 0 or bin_path(prefix).stat().st_size == 0:
        raise ConfigError(
            f"dataset {prefix}: it holds no tokens, so there is nothing to train on. "
            + _PREPARE.format(prefix=prefix)
        )
    return _DTYPES[code], sequences, ends


def _missing(prefix: str, path: Path) -> str:
    others = [p for p in (idx_path(prefix), bin_path(prefix)) if p != path and p.is_file()]
    if others:
        what = f"{others[0]} is there but {path} is not; the preparation was interrupted."
    elif Path(prefix).suffix in (".bin", ".idx"):
        return f"dataset {prefix}: give the path without {Path(prefix).suffix}, as Megatron does."
    else:
        what = f"neither {idx_path(prefix)} nor {bin_path(prefix)} exists."
    return f"dataset {prefix}: {what} {_PREPARE.format(prefix=prefix)}"
