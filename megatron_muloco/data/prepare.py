"""`prepare` turns text files into a Megatron indexed dataset, with several processes.

::

    main process                    workers                       main process
    cut files into records  --->    decode, parse, tokenize  ---> append in order, publish

Inputs are plain text, JSON lines and their gzipped forms. Reading has two halves. `raw_records`
cuts a file into byte records; that is cheap, so the main process does it for all files in order.
`text_of` decodes one record, in a worker. A record knows its file and line, and every complaint
about it names them.

Workers get records in batches, and results are appended in the order of submission, so the written
files do not depend on the number of workers. At most a few batches per worker are in flight, which
bounds memory for inputs of any size.

Files are written under temporary names and published at the end, the ``.idx`` last. So a dataset
with an ``.idx`` is complete, at whatever moment a run was killed. Nothing is ever written over an
input, and nothing over any other file unless the caller asks for it.
"""

import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from multiprocessing import connection
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt

from megatron_muloco.data.indexed import (
    Manifest,
    bin_path,
    file_digest,
    idx_path,
    manifest_path,
    partial_files,
    publish,
    write_manifest,
)
from megatron_muloco.data.tokenizer import Encoder, load_encoder, tokenizer_digest
from megatron_muloco.errors import ConfigError

__all__ = [
    "BadRecord",
    "Layout",
    "Part",
    "PrepareOptions",
    "Record",
    "check_inputs",
    "check_outputs",
    "check_prefix",
    "layout_of",
    "prepare",
    "raw_records",
    "text_of",
]

# ---- records of text files -----------------------------------------------------------------

Layout = Literal["jsonl", "text", "paragraphs"]

_JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BadRecord(Exception):
    """One record cannot be used; the message names file and line."""


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes of one document before decoding.

    Attributes:
        path: File as the user named it.
        line: First line of the record, from 1.
        data: UTF-8 text, or one JSON object.
        layout: Layout of the file, which says how to read ``data``.
        consumed: Bytes of the (compressed) file read so far, for progress.
    """

    path: str
    line: int
    data: bytes
    layout: Layout
    consumed: int


def layout_of(path: str) -> Layout:
    """Return the layout that a file's name suggests."""
    suffixes = [suffix for suffix in Path(path).suffixes if suffix != ".gz"]
    return "jsonl" if suffixes and suffixes[-1] in _JSON_SUFFIXES else "text"


def check_inputs(paths: list[str]) -> None:
    """Raise one `ConfigError` that names every input that is not a non-empty file."""
    problems = []
    for path in paths:
        if not Path(path).is_file():
            kind = "is a directory" if Path(path).is_dir() else "does not exist"
            problems.append(
                f"input {path} {kind}. Name files; a shell pattern such as DIR/*.jsonl works."
            )
        elif Path(path).stat().st_size == 0:
            problems.append(f"input {path} is empty. Leave it out.")
    if problems:
        raise ConfigError(problems)


def check_outputs(
    outputs: Sequence[Path], *, inputs: Sequence[str], overwrite: bool, other: str
) -> None:
    """Raise one `ConfigError` that names every file that must not be written.

    Args:
        outputs: Files that will be written; existing ones would be replaced.
        inputs: Files that are read, which no output may be, whatever ``overwrite`` says.
        overwrite: Whether other existing files may be replaced.
        other: Option that gives the outputs other names.
    """
    problems = []
    for output in outputs:
        read = [path for path in inputs if _same_file(output, Path(path))]
        if read:
            problems.append(
                f"output {output} is the input {read[0]}, which would be lost. Use another {other}."
            )
        elif output.is_dir():
            problems.append(f"output {output} is a directory. Use another {other}.")
        elif os.path.lexists(output) and not overwrite:
            problems.append(
                f"output {output} exists already. Use --overwrite to replace it, or another "
                f"{other}."
            )
    if problems:
        raise ConfigError(problems)


def _same_file(one: Path, other: Path) -> bool:
    """Whether two names mean the same file, now or once it is written."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def raw_records(path: str, layout: Layout) -> Iterator[Record]:
    """Yield the records of one file in order.

    Blank lines separate paragraphs, and are ignored in JSON lines.

    Raises:
        ConfigError: The file cannot be read to its end (permissions, damaged gzip).
    """
    try:
        with Path(path).open("rb") as file:
            compressed = path.endswith(".gz")
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if compressed else file
            yield from _cut(path, layout, stream, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"input {path}: damaged gzip ({error}), so documents would be missing silently. "
            f"Download or compress the file again."
        ) from error
    except OSError as error:
        raise ConfigError(f"input {path}: cannot be read ({error}).") from error


def text_of(record: Record, json_key: str) -> str:
    """Return the text of a record.

    Args:
        record: Record from `raw_records`.
        json_key: Field of a JSON object that holds the text; unused for plain text.

    Raises:
        BadRecord: Not UTF-8, not JSON, not an object, or no string under the key.
    """
    try:
        decoded = record.data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = record.line + record.data.count(b"\n", 0, error.start)
        raise BadRecord(f"{record.path}:{line}: not valid UTF-8 ({error.reason})") from error
    return _field(record, decoded, json_key) if record.layout == "jsonl" else decoded


def _field(record: Record, line: str, key: str) -> str:
    where = f"{record.path}:{record.line}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadRecord(f"{where}: a JSON {type(value).__name__} where an object was expected")
    if key not in value:
        keys = ", ".join(map(repr, value)) or "none"
        raise BadRecord(
            f"{where}: no key {key!r}; the keys are {keys} (--json-keys names the one with the "
            "text)"
        )
    text = value[key]
    if not isinstance(text, str):
        raise BadRecord(f"{where}: {key!r} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{where}: {key!r} holds half a surrogate pair, which is not text"
        ) from error
    return text


def _cut(path: str, layout: Layout, stream: BinaryIO, file: BinaryIO) -> Iterator[Record]:
    if layout == "text":
        data = stream.read().removeprefix(_BYTE_ORDER_MARK)
        yield Record(path, 1, data, layout, file.tell())
        return
    pending: list[bytes] = []
    number = 0
    for number, line in enumerate(stream, 1):
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        blank = not content.strip()
        if layout == "jsonl" and not blank:
            yield Record(path, number, content, layout, file.tell())
        elif not blank:
            pending.append(content)
        elif pending:
            yield Record(path, number - len(pending), b"".join(pending), layout, file.tell())
            pending = []
    if pending:
        yield Record(path, number - len(pending) + 1, b"".join(pending), layout, file.tell())


# ---- tokenization and writing --------------------------------------------------------------

# Text per batch: tens of milliseconds of work, so the cost of pipes and pickling is negligible.
_BATCH_BYTES = 256 * 1024

# Batches in flight per worker: one in work, one waiting, one being collected.
_BATCHES_PER_WORKER = 3


@dataclass(frozen=True, slots=True)
class Part:
    """One side of a split of documents into training and held-out text.

    A hash of the text decides, so a document is on the same side on every machine, in any order and
    with more documents around it, and copies of a document are on one side.

    Attributes:
        held_out: Share of the documents that is held out, in (0, 1).
        seed: Another seed holds out other documents.
        valid: Whether this is the held-out side.
    """

    held_out: float
    seed: int
    valid: bool

    def takes(self, text: str) -> bool:
        """Return whether a document is on this side."""
        seed = self.seed.to_bytes(8, "little")
        digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed).digest()
        return (int.from_bytes(digest, "little") < self.held_out * 2**64) == self.valid


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """Options of `prepare`.

    Attributes:
        tokenizer_type: Type of the tokenizer, as in the config.
        tokenizer_model: File of the tokenizer; ``None`` for ``byte-level``.
        layout: Layout of all inputs; ``None`` chooses JSON lines or one document per file by name.
        json_key: Field of a JSON record that holds the text.
        append_eod: End every document with the tokenizer's end-of-document id.
        workers: Processes that tokenize; 1 does it in this process.
        on_error: ``fail`` stops at the first bad record; ``skip`` counts bad records and leaves
            them out.
        overwrite: Replace an existing dataset.
        origin: Copied to the manifest.
        part: Side of a split to write; None for all documents.
    """

    tokenizer_type: str
    tokenizer_model: str | None = None
    layout: Layout | None = None
    json_key: str = "text"
    append_eod: bool = True
    workers: int = 2
    on_error: Literal["fail", "skip"] = "fail"
    overwrite: bool = False
    origin: dict[str, Any] = field(default_factory=dict)
    part: Part | None = None


@dataclass(slots=True)
class _Batch:
    """Tokens of consecutive records; ``lengths`` are those of their documents."""

    tokens: npt.NDArray[Any]
    lengths: list[int]
    text_bytes: int
    empty: int
    bad: list[str]


@dataclass(slots=True)
class _Totals:
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    empty: int = 0
    bad: list[str] = field(default_factory=list)
    largest_id: int = 0
    hash: Any = field(default_factory=hashlib.sha256)


def prepare(
    inputs: Sequence[str],
    prefix: str,
    options: PrepareOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
    report_bad: Callable[[str], None] | None = None,
) -> Manifest:
    """Write ``prefix.bin``, ``prefix.json`` and, last, ``prefix.idx``.

    Args:
        inputs: Files, in the order of their documents in the dataset.
        prefix: Path of the dataset without suffix; its directory is created.
        options: Tokenizer, layout and handling of bad records.
        progress: Called with (input bytes read, tokens written).
        report_bad: Called with the message about every bad record that is skipped.

    Raises:
        ConfigError: Bad input or tokenizer, an output is an input or exists already, or another
            process is writing this dataset.
    """
    check_inputs(list(inputs))
    check_prefix(inputs, prefix, options)
    encoder = _encoder(options.tokenizer_type, options.tokenizer_model)
    megatron = _indexed_format()
    dtype: type[np.integer[Any]] = megatron.DType.optimal_dtype(encoder.vocab_size)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    with partial_files(prefix) as (bin_partial, idx_partial, manifest_partial):
        # Again under the lock: another run with this prefix may have ended meanwhile.
        check_prefix(inputs, prefix, options)
        builder = megatron.IndexedDatasetBuilder(str(bin_partial), dtype=dtype)
        totals = _Totals()
        for position, batch in _tokenized(inputs, options, dtype):
            _append(builder, batch, totals)
            for message in batch.bad:
                if options.on_error == "fail":
                    raise ConfigError(
                        f"{message}. Repair it, or leave such records out with --on-error skip."
                    )
                if report_bad is not None:
                    report_bad(message)
            if progress is not None:
                progress(position, totals.tokens)
        if totals.documents == 0:
            raise ConfigError(
                f"no text for {prefix} in {len(inputs)} inputs ({totals.empty} empty and "
                f"{len(totals.bad)} bad records), so no dataset was written."
            )
        builder.finalize(str(idx_partial))
        manifest = _manifest(inputs, options, encoder, dtype, totals, file_digest(idx_partial))
        write_manifest(manifest_partial, manifest)
        publish(prefix)
    return manifest


def check_prefix(inputs: Sequence[str], prefix: str, options: PrepareOptions) -> None:
    """Raise ConfigError if a file of the dataset must not be written; see `check_outputs`."""
    files = [bin_path(prefix), manifest_path(prefix), idx_path(prefix)]
    read = [*inputs, *([options.tokenizer_model] if options.tokenizer_model else [])]
    partial = [path.with_name(path.name + ".partial") for path in files]
    check_outputs(partial, inputs=read, overwrite=True, other="--output-prefix")
    check_outputs(files, inputs=read, overwrite=options.overwrite, other="--output-prefix")


def _tokenized(
    inputs: Sequence[str], options: PrepareOptions, dtype: type[np.integer[Any]]
) -> Iterator[tuple[int, _Batch]]:
    """Yield (input bytes read, batch) in the order of the inputs."""
    work = partial(_encode, options=options, dtype=dtype)
    batches = _batches(inputs, options.layout)
    if options.workers == 1:
        for position, records in batches:
            yield position, work(records)
        return
    # spawn: this process has Megatron and its threads loaded, which a fork can hang on.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, _end_with_parent) as pool:
        try:
            yield from _in_order(pool, work, batches, options.workers * _BATCHES_PER_WORKER)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(
    pool: Executor,
    work: Callable[[Sequence[Record]], _Batch],
    batches: Iterable[tuple[int, list[Record]]],
    in_flight: int,
) -> Iterator[tuple[int, _Batch]]:
    """Run batches in a pool, at most ``in_flight`` at once, and yield results in their order."""
    waiting: deque[tuple[int, Future[_Batch]]] = deque()
    for position, records in batches:
        waiting.append((position, pool.submit(work, records)))
        if len(waiting) >= in_flight:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()


def _batches(inputs: Sequence[str], layout: Layout | None) -> Iterator[tuple[int, list[Record]]]:
    """Yield (bytes of all inputs read so far, records) of about `_BATCH_BYTES` each."""
    position = before = size = 0
    batch: list[Record] = []
    for path in inputs:
        for record in raw_records(path, layout or layout_of(path)):
            batch.append(record)
            size += len(record.data)
            position = before + record.consumed
            if size >= _BATCH_BYTES:
                yield position, batch
                batch, size = [], 0
        before += Path(path).stat().st_size
    if batch:
        yield before, batch


def _encode(
    records: Sequence[Record], options: PrepareOptions, dtype: type[np.integer[Any]]
) -> _Batch:
    """Return the tokens of some records.

    Messages about bad records are returned, not raised, so that they are reported in input order.
    """
    encoder = _encoder(options.tokenizer_type, options.tokenizer_model)
    texts: list[str] = []
    bad: list[str] = []
    empty = 0
    for record in records:
        try:
            text = text_of(record, options.json_key)
        except BadRecord as error:
            bad.append(str(error))
            continue
        if not text.strip():
            empty += 1
        elif options.part is None or options.part.takes(text):
            texts.append(text)
    ending = [encoder.eod] if options.append_eod else []
    documents = [ids + ending for ids in encoder.encode_batch(texts)]
    lengths = [len(ids) for ids in documents]
    flat = np.fromiter(chain.from_iterable(documents), np.int64, sum(lengths))
    if flat.size and not 0 <= flat.min() <= flat.max() < encoder.vocab_size:
        raise ConfigError(
            f"the tokenizer gives ids from {flat.min()} to {flat.max()}, but says that it has "
            f"{encoder.vocab_size} ids, so a model of that size has no embedding for some. Use a "
            f"tokenizer whose ids are from 0 to its vocabulary size."
        )
    return _Batch(
        flat.astype(dtype), lengths, sum(len(text.encode()) for text in texts), empty, bad
    )


# A tokenizer is loaded once in each process that uses it.
_encoder = functools.lru_cache(maxsize=1)(load_encoder)


def _end_with_parent() -> None:
    """Make a worker exit when the main process dies: a killed process cannot stop its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_end() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def _append(builder: Any, batch: _Batch, totals: _Totals) -> None:
    start = 0
    for length in batch.lengths:
        builder.add_document(batch.tokens[start : start + length], [length])
        start += length
    if start:
        totals.largest_id = max(totals.largest_id, int(batch.tokens.max()))
    totals.hash.update(np.ascontiguousarray(batch.tokens))
    totals.tokens += start
    totals.documents += len(batch.lengths)
    totals.text_bytes += batch.text_bytes
    totals.empty += batch.empty
    totals.bad += batch.bad


def _manifest(
    inputs: Sequence[str],
    options: PrepareOptions,
    encoder: Encoder,
    dtype: type[np.integer[Any]],
    totals: _Totals,
    idx_digest: str,
) -> Manifest:
    return Manifest(
        tokens=totals.tokens,
        documents=totals.documents,
        text_bytes=totals.text_bytes,
        skipped=len(totals.bad),
        empty=totals.empty,
        append_eod=options.append_eod,
        eod=encoder.eod,
        dtype=np.dtype(dtype).name,
        tokenizer_type=options.tokenizer_type,
        tokenizer_digest=tokenizer_digest(options.tokenizer_type, options.tokenizer_model),
        vocab_size=encoder.vocab_size,
        inputs=[{"path": path, "bytes": Path(path).stat().st_size} for path in inputs],
        origin=options.origin,
        largest_id=totals.largest_id,
        bin_digest=totals.hash.hexdigest(),
        idx_digest=idx_digest,
    )


def _indexed_format() -> Any:
    """Return Megatron's module for indexed datasets; importing it takes seconds."""
    with warnings.catch_warnings():
        # About optional GPU packages, which writing files does not need.
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
