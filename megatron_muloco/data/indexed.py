r"""Files of Megatron's indexed datasets: names, header, checks, and the manifest beside them.

Megatron reads ``PREFIX.idx`` and ``PREFIX.bin`` and fails an assertion when they are not as
expected. This module checks them before and says what is wrong. It uses numpy alone (no torch, no
Megatron), so start-up checks and ``--dry-run`` are fast. The layout of the index, little endian::

    b"MMIDIDX\0\0" | version u64 = 1 | dtype code u8 | sequences S u64 | documents D u64
    | lengths i32[S] | byte offsets i64[S] | document ends i64[D]          (D counts a leading 0)

Source: ``megatron/core/datasets/indexed_dataset.py``, the same in 0.16.1 and 0.19.2.

``PREFIX.json`` is this package's manifest: the inputs and the tokenizer of the dataset. Datasets
prepared by other tools have none and are read all the same.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import numpy as np
import numpy.typing as npt

from megatron_muloco.errors import ConfigError

__all__ = [
    "IndexedFiles",
    "Manifest",
    "bin_path",
    "check_indexed",
    "check_manifest",
    "file_digest",
    "idx_path",
    "manifest_path",
    "open_indexed",
    "partial_files",
    "publish",
    "read_manifest",
    "write_manifest",
    "write_whole",
]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip

_BLOCK = 1 << 22  # sequences checked at once, which bounds the memory of the checks

_PREPARE = "Run: python tools/prepare_data.py --input FILES --output-prefix {prefix} ..."


@dataclass(frozen=True, slots=True)
class Manifest:
    """Inputs, tokenizer and counts of a dataset, as `megatron_muloco.data.prepare` records them.

    Attributes:
        tokens: Number of tokens, including end-of-document ids.
        documents: Number of documents.
        text_bytes: UTF-8 bytes of their text.
        skipped: Number of bad records that were left out.
        empty: Number of records without text, which make no document.
        append_eod: Whether every document ends with ``eod``.
        eod: Id that ends a document.
        dtype: numpy name of the stored token type.
        tokenizer_type: Type of the tokenizer, as in the config.
        tokenizer_digest: Digest of the tokenizer (`tokenizer.tokenizer_digest`).
        vocab_size: Number of ids of the tokenizer.
        inputs: Path and size in bytes of every input, in order.
        origin: Origin of the text as the caller states it (versions, a content hash).
        largest_id: Largest token id; ``None`` in a manifest of an older version.
        bin_digest: SHA-256 of the tokens' file, in hexadecimal; empty in an older manifest.
        idx_digest: SHA-256 of the index, likewise.
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
    largest_id: int | None = None
    bin_digest: str = ""
    idx_digest: str = ""


@dataclass(frozen=True, slots=True)
class IndexedFiles:
    """A dataset opened read-only.

    Attributes:
        tokens: All tokens in file order.
        lengths: Number of tokens of each sequence.
        documents: Number of documents.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    documents: int


def bin_path(prefix: str) -> Path:
    """Return the path of the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str) -> Path:
    """Return the path of the index; the file exists only if the dataset is complete."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str) -> Path:
    """Return the path of the manifest."""
    return Path(f"{prefix}.json")


def check_indexed(prefix: str, *, min_tokens: int = 1) -> list[str]:
    """Return why a dataset cannot be used, each reason a sentence that says what to do.

    Args:
        prefix: Path without suffix.
        min_tokens: Number of tokens of the shortest dataset that contains a sample.
    """
    try:
        files = open_indexed(prefix)
        check_manifest(prefix, files)
    except ConfigError as error:
        return list(error.problems)
    found = len(files.tokens)
    if found < min_tokens:
        return [
            f"dataset {prefix}: its {found} tokens are fewer than the {min_tokens} of one sample. "
            f"Use more text or a shorter model.seq_length."
        ]
    return []


def open_indexed(prefix: str) -> IndexedFiles:
    """Map a dataset into memory.

    Raises:
        ConfigError: A file is missing, of another kind, truncated, inconsistent or empty.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise ConfigError(_missing(prefix, path))
    dtype, sequences, ends = _read_header(prefix)
    lengths = np.memmap(idx_path(prefix), np.int32, "r", offset=_HEADER.size, shape=(sequences,))
    if problem := _first_bad_entry(prefix, lengths, ends, np.dtype(dtype).itemsize):
        raise ConfigError(
            f"dataset {prefix}: {idx_path(prefix)}: {problem}, so samples would be read from wrong "
            f"places. " + _PREPARE.format(prefix=prefix)
        )
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
    """Return the manifest, or ``None`` if another tool prepared the dataset.

    Raises:
        ConfigError: The file exists but is not a manifest.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        manifest = Manifest(**json.loads(path.read_bytes()))
        for field in fields(manifest):
            _check_field(field.name, field.type, getattr(manifest, field.name))
        return manifest
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"dataset {prefix}: {path} is not a manifest of tools/prepare_data.py ({error}). "
            + _PREPARE.format(prefix=prefix)
        ) from error


def check_manifest(prefix: str, files: IndexedFiles) -> None:
    """Compare the manifest, if there is one, with the dataset.

    Raises:
        ConfigError: It is not a manifest, or describes other contents.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return
    there = {
        "tokens": len(files.tokens),
        "documents": files.documents,
        "dtype": files.tokens.dtype.name,
    }
    for name, found in there.items():
        if (said := getattr(manifest, name)) != found:
            raise ConfigError(
                f"dataset {prefix}: {manifest_path(prefix)} says {name} {str(said)[:40]}, but the "
                f"dataset has {found}; they do not belong together. "
                + _PREPARE.format(prefix=prefix)
            )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest and fsync it."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one or all of the new one.

    The temporary name is unique, so two processes that write the same file do not mix.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def partial_files(prefix: str) -> Iterator[tuple[Path, Path, Path]]:
    """Yield the temporary names of tokens, index and manifest; remove leftovers at the end.

    The temporary suffix comes last, so that a search for ``*.idx`` does not find them. A killed
    process leaves them behind; the next run with this prefix overwrites them. The tokens' file is
    locked inside the block, so that two runs cannot write to one prefix.

    Raises:
        ConfigError: Another process is writing this dataset, or the file system has no locks.
    """
    partials = (
        _partial(bin_path(prefix)),
        _partial(idx_path(prefix)),
        _partial(manifest_path(prefix)),
    )
    descriptor = _locked(prefix, partials[0])
    try:
        yield partials
    finally:
        for path in partials:
            path.unlink(missing_ok=True)
        os.close(descriptor)  # unlocks


def publish(prefix: str) -> None:
    """Rename the temporary files to their final names, the index last.

    The index of an old dataset is deleted first. So at no moment does an index lie beside tokens
    that it does not describe.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        with _partial(path).open("rb") as file:
            os.fsync(file.fileno())
    idx_path(prefix).unlink(missing_ok=True)  # from here on the old dataset is incomplete
    for path in (bin_path(prefix), manifest_path(prefix), idx_path(prefix)):
        _partial(path).replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _locked(prefix: str, path: Path) -> int:
    """Return a descriptor of ``path`` that holds the file's lock until it is closed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended in between has renamed or deleted the file that was opened here.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"dataset {prefix}: another process is writing it at this moment. Wait for that "
                f"process, or use another prefix."
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(
                f"dataset {prefix}: {path} cannot be locked ({error.strerror}), so two runs could "
                f"mix their files. Write to another file system and copy the result."
            ) from error
        os.close(descriptor)


def _read_header(prefix: str) -> tuple[type[np.generic], int, int]:
    """Return (token type, sequences, document ends) of an index after checking its length."""
    path = idx_path(prefix)
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC or len(header) < _HEADER.size:
        raise ConfigError(
            f"dataset {prefix}: {path} does not start like a Megatron index, so it is a file of "
            f"another kind. " + _PREPARE.format(prefix=prefix)
        )
    _, version, code, sequences, ends = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise ConfigError(
            f"dataset {prefix}: {path} has version {version} and token type {code}; known are "
            f"version 1 and the integer types. " + _PREPARE.format(prefix=prefix)
        )
    needed = _HEADER.size + 12 * sequences + 8 * ends
    if size < needed:
        raise ConfigError(
            f"dataset {prefix}: {path} is shorter than its {sequences} sequences need; a copy was "
            f"cut short. " + _PREPARE.format(prefix=prefix)
        )
    if size not in (needed, needed + sequences):  # with a mode for each sequence, a byte
        raise ConfigError(
            f"dataset {prefix}: {path} has {size} bytes, but its header describes {needed}; its "
            f"counts of sequences and documents cannot be right. " + _PREPARE.format(prefix=prefix)
        )
    if sequences == 0 or bin_path(prefix).stat().st_size == 0:
        raise ConfigError(
            f"dataset {prefix}: it holds no tokens, so there is nothing to train on. "
            + _PREPARE.format(prefix=prefix)
        )
    return _DTYPES[code], sequences, ends


def _first_bad_entry(prefix: str, lengths: npt.NDArray[np.int32], ends: int, itemsize: int) -> str:
    """Return what is wrong with the first bad entry of an index; empty if all are right.

    Every tool writes the sequences one after the other, so each offset is the sum of the lengths
    before it, and Megatron reads correctly from these only.

    Args:
        prefix: The dataset.
        lengths: Lengths of its sequences.
        ends: Number of its document ends.
        itemsize: Bytes of a token.
    """
    sequences, path, at = len(lengths), idx_path(prefix), _HEADER.size + 4 * len(lengths)
    offsets = np.memmap(path, np.int64, "r", offset=at, shape=(sequences,))
    expected = 0
    for first in range(0, sequences, _BLOCK):
        block = lengths[first : first + _BLOCK].astype(np.int64)
        if (block < 0).any():
            bad = int((block < 0).argmax())
            return f"sequence {first + bad} has length {block[bad]}"
        after = expected + np.cumsum(block) * itemsize
        should = np.concatenate(([expected], after[:-1]))
        wrong = offsets[first : first + _BLOCK] != should
        if wrong.any():
            bad = int(wrong.argmax())
            return (
                f"sequence {first + bad} begins at byte {offsets[first + bad]} of the .bin file "
                f"and not at {should[bad]}, where the one before it ends"
            )
        expected = int(after[-1])
    if ends < 1:
        return "it has no documents"
    documents = np.memmap(path, np.int64, "r", offset=at + 8 * sequences, shape=(ends,))
    if documents[0] != 0:
        return f"document 0 begins at sequence {documents[0]}"
    for first in range(0, ends - 1, _BLOCK):
        block = documents[first : first + _BLOCK + 1]
        wrong = (block[1:] < block[:-1]) | (block[1:] > sequences)
        if wrong.any():
            bad = int(wrong.argmax())
            return (
                f"document {first + bad} ends at sequence {block[bad + 1]}, begins at "
                f"{block[bad]}, and there are {sequences}"
            )
    if documents[-1] != sequences:
        return f"the documents end at sequence {documents[-1]} of {sequences}"
    return ""


def _check_field(name: str, kind: Any, value: Any) -> None:
    """Raise TypeError or ValueError if a value of a manifest has another type or is negative."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    plain = [get_origin(each) or each for each in kinds]
    if type(value) not in plain:
        raise TypeError(f"{name} is not of type {' or '.join(each.__name__ for each in plain)}")
    if type(value) is int and value < 0:
        raise ValueError(f"{name} is negative")


def _missing(prefix: str, path: Path) -> str:
    others = [p for p in (idx_path(prefix), bin_path(prefix)) if p != path and p.is_file()]
    if others:
        what = f"{others[0]} is there but {path} is not; the preparation was interrupted."
    elif Path(prefix).suffix in (".bin", ".idx"):
        return f"dataset {prefix}: give the path without {Path(prefix).suffix}, as Megatron does."
    else:
        what = f"neither {idx_path(prefix)} nor {bin_path(prefix)} exists."
    return f"dataset {prefix}: {what} {_PREPARE.format(prefix=prefix)}"
