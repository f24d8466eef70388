"""Reads and writes safetensors files one tensor at a time.

The format is 8 bytes of header length (little-endian), a header in JSON, and the values of all
tensors end to end. With a writer of our own an export needs no package beyond those of training and
memory for one tensor; the tests read its files with the safetensors library.

Source of the format: https://huggingface.co/docs/safetensors (read in November 2026).
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.checkpoint.layout import sync_directory, write_file
from megatron_muloco.errors import ConfigError

__all__ = ["INDEX_FILE", "SafetensorsDirectory", "write_safetensors"]

INDEX_FILE = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_FILE_BYTES = 5 * 10**9  # the usual limit of files on the Hugging Face hub's models
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

Shapes = Mapping[str, tuple[int, ...]]


def write_safetensors(
    directory: Path,
    shapes: Shapes,
    tensors: Iterator[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> int:
    """Write tensors to one file, or to several with an index; return the bytes of all values.

    Args:
        directory: Existing directory.
        shapes: Name -> shape, in the order in which ``tensors`` come.
        tensors: Name and values; each is cast to ``dtype`` and dropped before the next.
        dtype: fp32, bf16 or fp16.
        max_file_bytes: Values of one file, unless a single tensor is larger.
    """
    files: list[dict[str, tuple[int, ...]]] = [{}]
    used = total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if files[-1] and used + size > max_file_bytes:
            files.append({})
            used = 0
        files[-1][name] = shape
        used += size
        total += size
    place: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        file = _SINGLE
        if len(files) > 1:
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_one(directory / file, part, tensors, dtype)
        place |= dict.fromkeys(part, file)
    assert next(tensors, None) is None, "more tensors than shapes"
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place}
        write_file(directory / INDEX_FILE, json.dumps(index, indent=1) + "\n")
    sync_directory(directory)
    return total


def _write_one(
    path: Path, shapes: Shapes, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            found, values = next(tensors)
            assert (found, tuple(values.shape)) == (name, shape), (found, values.shape)
            stream.write(values.detach().to(dtype).contiguous().view(torch.uint8).numpy())
        stream.flush()
        os.fsync(stream.fileno())


class SafetensorsDirectory:
    """The tensors of a directory's safetensors files, read by name.

    Raises:
        ConfigError: There is no such file, or one is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._place: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
        for path in self._files(directory):
            start, header = _header(path)
            for name, entry in header.items():
                self._place[name] = (path, start, entry)

    def _files(self, directory: Path) -> list[Path]:
        index = directory / INDEX_FILE
        names = [_SINGLE]
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ConfigError(f"{index} is damaged ({error}). Copy it again.") from error
        for name in names:
            # A name with a path in it could read any file of the machine.
            if Path(name).name != name or not (directory / name).is_file():
                raise ConfigError(
                    f"{directory} has no weights: {name} is missing. Give the directory of a "
                    "Hugging Face model with safetensors files."
                )
        return [directory / name for name in names]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape."""
        return {name: tuple(entry["shape"]) for name, (_, _, entry) in self._place.items()}

    def dtypes(self) -> set[str]:
        """Return the dtypes of all tensors, by their names in the format."""
        return {str(entry["dtype"]) for _, _, entry in self._place.values()}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in fp32."""
        path, start, entry = self._place[name]
        begin, end = entry["data_offsets"]
        with path.open("rb") as stream:
            stream.seek(start + begin)
            raw = bytearray(stream.read(end - begin))
        return torch.frombuffer(raw, dtype=_DTYPES[entry["dtype"]]).view(entry["shape"]).float()


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where values begin, and name -> dtype, shape and place of each tensor."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} is {entry['dtype']}, not one of {', '.join(_DTYPES)}")
            expected = math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
            if begin < 0 or end - begin != expected or 8 + length + end > size:
                raise ValueError(f"{name} does not lie inside the file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a safetensors file that can be read ({error}). Copy it again."
        ) from error
    return 8 + length, header
