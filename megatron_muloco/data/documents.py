"""Documents out of text files, JSON lines and their gzipped forms.

Reading is in two halves. `raw_records` cuts a file into byte records and is cheap, so the main
process does it for all files in order; `text_of` decodes one record and is what worker processes
do. A record knows its file and line, and everything wrong with it is said with that place.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from megatron_muloco.errors import ConfigError

__all__ = ["BadRecord", "Layout", "Record", "check_inputs", "layout_of", "raw_records", "text_of"]

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
        layout: How ``data`` is to be read.
        consumed: Bytes of the (compressed) file read so far, for progress.
    """

    path: str
    line: int
    data: bytes
    layout: Layout
    consumed: int


def layout_of(path: str) -> Layout:
    """Return how a file is read when the user did not say: by its name."""
    suffixes = [suffix for suffix in Path(path).suffixes if suffix != ".gz"]
    return "jsonl" if suffixes and suffixes[-1] in _JSON_SUFFIXES else "text"


def check_inputs(paths: list[str]) -> None:
    """Raise one `ConfigError` naming every input that is not a readable, non-empty file."""
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


def raw_records(path: str, layout: Layout) -> Iterator[Record]:
    """Yield the records of one file in order.

    Blank lines separate paragraphs and are nothing in JSON lines.

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
            f"input {path}: damaged gzip ({error}), so documents would be missing without notice. "
            f"Fetch or compress the file again."
        ) from error
    except OSError as error:
        raise ConfigError(f"input {path}: cannot be read ({error}).") from error


def text_of(record: Record, json_key: str) -> str:
    """Return the text of a record.

    Args:
        record: From `raw_records`.
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
        raise BadRecord(f"{where}: no key {key!r}; the keys are {', '.join(map(repr, value))}")
    text = value[key]
    if not isinstance(text, str):
        raise BadRecord(f"{where}: {key!r} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{where}: {key!r} holds half a surrogate pair, which is no text"
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
