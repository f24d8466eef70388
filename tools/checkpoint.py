"""List, verify, compare, prune and show checkpoints, without a GPU, a launcher or the run.

::

    python tools/checkpoint.py list DIR            what is there, and which one a run resumes from
    python tools/checkpoint.py verify PATH         read every tensor and compare the digests
    python tools/checkpoint.py diff A B            keys, kinds of tensors and values that differ
    python tools/checkpoint.py prune DIR --keep N  delete all but the N newest
    python tools/checkpoint.py show PATH           provenance, digests and resolved configuration

PATH is one checkpoint or a directory of them. `verify` and `diff` read the tensors in pieces, one
stored chunk at a time, in this process.

Exit codes: 0 nothing is wrong; 1 verify found damage, or diff a difference; 2 bad input.
"""

import argparse
import io
import math
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from tqdm import tqdm

from megatron_muloco.runtime.distributed import silence_known_warnings

silence_known_warnings()  # those of Megatron, which the next lines import

from megatron_muloco.checkpoint import layout
from megatron_muloco.checkpoint.directory import missing_bytes, read_index
from megatron_muloco.checkpoint.lease import Lease
from megatron_muloco.checkpoint.sharding import digest_sum, render
from megatron_muloco.checkpoint.state import ANCHOR, Description, is_shared, read_description
from megatron_muloco.errors import CheckpointError, ConfigError, run_tool
from megatron_muloco.params import ParamInfo, Shard
from megatron_muloco.planning.report import human_bytes

_WIDTH = 80
_FOUND = 1  # exit code: damage or differences
_MOST_LINES = 20  # of one part of `diff`


class _Found(Exception):
    """The command has done its work, and the answer is exit code 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)

    def body() -> None:
        try:
            arguments.run(arguments)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error

    try:
        return run_tool(body)
    except _Found:
        return _FOUND


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="List, verify, compare, prune and show checkpoints.",
        epilog="There is no command that converts a checkpoint: tensors are stored whole, under "
        "model-wide names, so every tp, pp, cp and dp size loads every checkpoint.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="what is in a directory of checkpoints")
    listing.add_argument("directory", type=Path, help="checkpoint.dir of a run")
    listing.set_defaults(run=_list)
    verify = commands.add_parser("verify", help="read every tensor and compare the digests")
    verify.add_argument("path", type=Path, help="a checkpoint, or a directory of them")
    verify.set_defaults(run=_verify)
    diff = commands.add_parser("diff", help="keys, kinds and values that differ")
    diff.add_argument("one", type=Path, help="a checkpoint")
    diff.add_argument("other", type=Path, help="another one")
    diff.set_defaults(run=_diff)
    prune = commands.add_parser("prune", help="delete all but the newest checkpoints")
    prune.add_argument("directory", type=Path, help="checkpoint.dir of a run that is not running")
    prune.add_argument("--keep", type=int, required=True, help="number of newest ones to keep")
    prune.add_argument("--dry-run", action="store_true", help="print them, delete nothing")
    prune.set_defaults(run=_prune)
    show = commands.add_parser("show", help="provenance, digests and resolved configuration")
    show.add_argument("path", type=Path, help="a checkpoint, or a directory of them (the latest)")
    show.set_defaults(run=_show)
    return parser


# ---- one checkpoint -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor that is stored in one piece.

    Attributes:
        key: Key of the tensor.
        offsets: First index of each dimension.
        sizes: Length of each dimension.
        place: Offset by which the index finds the piece.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: torch.Size

    def overlap(self, other: "_Chunk") -> list[tuple[int, int]] | None:
        """Return the range of each dimension that lies in both, or ``None`` if one is empty."""
        ranges = [
            (max(a, b), min(a + m, b + n))
            for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        return ranges if all(start < end for start, end in ranges) else None

    def inside(self, ranges: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
        """Return where some ranges of the tensor lie in the chunk."""
        return tuple(
            slice(start - first, end - first)
            for first, (start, end) in zip(self.offsets, ranges, strict=True)
        )


@dataclass
class _Checkpoint:
    """One checkpoint directory, opened for reading.

    Attributes:
        path: Its directory.
        description: Content of its JSON file.
        index: Places of all stored chunks.
    """

    path: Path
    description: Description
    index: Metadata

    @classmethod
    def open(cls, path: Path) -> "_Checkpoint":
        """Read description and index, and check that every byte range is there.

        Raises:
            CheckpointError: A file is missing, too short, or cannot be read.
        """
        description = read_description(path)
        index = read_index(path, description.index_digest)
        if problems := missing_bytes(path, index):
            raise CheckpointError(f"{path} is incomplete: {'; '.join(problems)}")
        return cls(path, description, index)

    @property
    def keys(self) -> list[str]:
        """Keys of all tensors, random number states included."""
        return sorted(self.index.state_dict_metadata)

    def kinds(self) -> dict[str, str]:
        """Return kind of tensor -> digest that was saved."""
        return _kinds(self.description)

    def kind_of(self, key: str) -> str | None:
        """Return the kind that a key belongs to; ``None`` for one that has no digest."""
        return next((kind for kind in self.kinds() if key.startswith(f"{kind}.")), None)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        stored: Any = self.index.state_dict_metadata[key]
        return tuple(stored.size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        stored: Any = self.index.state_dict_metadata[key]
        dtype: torch.dtype = stored.properties.dtype
        return dtype

    def chunks(self, key: str) -> list[_Chunk]:
        """Return the stored chunks of a tensor."""
        stored: Any = self.index.state_dict_metadata[key]
        return [
            _Chunk(key, tuple(chunk.offsets), tuple(chunk.sizes), chunk.offsets)
            for chunk in stored.chunks
        ]

    def read(self, chunk: _Chunk) -> Tensor:
        """Return the values of a chunk, in its shape.

        Raises:
            CheckpointError: It cannot be read, or has another shape or dtype than the index says.
        """
        try:
            place = self.index.storage_data[MetadataIndex(chunk.key, chunk.place)]
            with (self.path / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                record = io.BytesIO(file.read(place.length))
            # torch writes a zip archive with checksums, and does not compare them when it loads.
            with zipfile.ZipFile(record) as archive:
                if archive.testzip() is not None:
                    raise ValueError("its bytes do not have their checksum")
            record.seek(0)
            values: Any = torch.load(record, map_location="cpu", weights_only=True)
        # Reading a damaged file can raise anything.
        except Exception as error:
            raise CheckpointError(f"{chunk.key}: cannot be read ({_first_line(error)})") from error
        dtype = self.dtype(chunk.key)
        if not isinstance(values, Tensor) or (tuple(values.shape), values.dtype) != (
            chunk.sizes, dtype,
        ):  # fmt: skip
            raise CheckpointError(f"{chunk.key}: holds another tensor than the index says")
        return values

    def nbytes(self, keys: Iterable[str]) -> int:
        """Return the bytes of some tensors."""
        return sum(math.prod(self.shape(key)) * self.dtype(key).itemsize for key in keys)


def _kinds(description: Description) -> dict[str, str]:
    """Return kind of tensor -> digest that was saved, of all replicas."""
    return {
        kind: digest
        for replica in description.replicas
        for kind, digest in replica["digests"].items()
    }


def _digest_of(chunk: _Chunk, kind: str, shape: tuple[int, ...], values: Tensor) -> int:
    """Return what a chunk of whole rows or columns adds to the digest of its kind."""
    cut = [dim for dim, size in enumerate(shape) if dim and chunk.sizes[dim] != size]
    dim = cut[0] if cut else 0
    width = chunk.sizes[dim] if cut else shape[0]
    if len(cut) > 1 or shape[dim] % width or (cut and chunk.offsets[dim] % width):
        raise CheckpointError(f"{chunk.key}: has a chunk that no layout of ranks writes")
    piece = (shape[0], *(chunk.sizes[1:]))
    # A slice of columns is what one tensor-parallel rank holds, as `Cut` describes it.
    param = ParamInfo(
        chunk.key.removeprefix(f"{kind}."), piece, dim if cut else None, True, None, None
    )
    start = chunk.offsets[0] * math.prod(piece[1:])
    total = digest_sum(
        [(Shard(param, start, start + values.numel()), values.reshape(-1))],
        tensor_rank=chunk.offsets[dim] // width if cut else 0,
        tensor_size=shape[dim] // width if cut else 1,
        device=torch.device("cpu"),
    )
    return int(total.item())


def _bar(total: int, what: str) -> "tqdm[Any]":
    return tqdm(
        total=total, unit="B", unit_scale=True, desc=what, ncols=_WIDTH, file=sys.stderr,
        disable=None, leave=False,
    )  # fmt: skip


# ---- list -----------------------------------------------------------------------------------


def _published(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory, oldest step first."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory.")
    found = [path for path in directory.glob("iter_*") if path.is_dir()]
    return sorted((p for p in found if p.name[5:].isdecimal()), key=layout.step_of)


def _list(arguments: argparse.Namespace) -> None:
    directory: Path = arguments.directory
    found = _published(directory)
    if not found:
        raise ConfigError(f"{directory} holds no checkpoint: no iter_* directory.")
    named, note = None, ""
    try:
        latest = layout.find_latest(directory)
    except CheckpointError as error:
        note = str(error)
    else:
        named, note = (latest.path, latest.note) if latest else (None, "")
    rows = [("step", "size", "saved", "K", "layout", "method", "state")]
    rows += [_row(path, latest=path == named) for path in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {0, 1, 3}
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    if note:
        print(f"\n{note}")


def _row(path: Path, *, latest: bool) -> tuple[str, ...]:
    """Return one line of the table about a checkpoint."""
    step, size = str(layout.step_of(path)), human_bytes(_bytes_in(path))
    try:
        opened = _Checkpoint.open(path)
    except CheckpointError as error:
        saved = datetime.fromtimestamp(path.stat().st_mtime)
        what = "incomplete" if "missing" in str(error) or "incomplete" in str(error) else "damaged"
        return step, size, f"{saved:%Y-%m-%d %H:%M}", "n/a", "n/a", "n/a", what
    description = opened.description
    saved = datetime.fromtimestamp((path / layout.STATE_FILE).stat().st_mtime)
    state = "whole, latest" if latest else "whole"
    return (
        step, size, f"{saved:%Y-%m-%d %H:%M}", str(len(description.replicas)),
        _layout_words(description.topology), _method_words(description.config), state,
    )  # fmt: skip


def _layout_words(topology: Mapping[str, int]) -> str:
    """Return the sizes of a replica's axes that are not 1, such as ``tp 2 dp 4``."""
    short = {"tensor": "tp", "pipeline": "pp", "context": "cp", "data": "dp"}
    sizes = [f"{short[axis]} {topology[axis]}" for axis in short if topology.get(axis, 1) > 1]
    return " ".join(sizes) or "1 rank"


def _method_words(config: Mapping[str, Any]) -> str:
    return f"{config['inner']['kind']}, {config['outer']['kind']}"


def _bytes_in(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# ---- verify ---------------------------------------------------------------------------------


@dataclass
class _Report:
    """What `verify` found in one checkpoint.

    Attributes:
        problems: One line for each thing that is wrong.
        tensors: Number of tensors that were read.
        without_digest: Number of those that have no digest: states of generators.
    """

    problems: list[str] = field(default_factory=list)
    tensors: int = 0
    without_digest: int = 0


def _verify(arguments: argparse.Namespace) -> None:
    path: Path = arguments.path
    one = layout.is_complete(path) or (path / layout.STATE_FILE).exists() or _is_one(path)
    paths = [path] if one else _published(path)
    if not paths:
        raise ConfigError(f"{path} is not a checkpoint and holds none.")
    paths = [p for path in paths for p in (path, path / layout.FINAL_ANCHOR) if p.is_dir()]
    damaged = 0
    for checkpoint in paths:
        report = verify_checkpoint(checkpoint)
        damaged += bool(report.problems)
        if not report.problems:
            digests = report.tensors - report.without_digest
            print(f"{checkpoint}: whole, {report.tensors} tensors, {digests} with digests")
            continue
        print(f"{checkpoint}: DAMAGED")
        for problem in report.problems:
            print(f"  {problem}")
    if damaged:
        print(f"{damaged} of {len(paths)} checkpoints are damaged")
        raise _Found


def _is_one(path: Path) -> bool:
    """Whether a path is named like one checkpoint, whatever is in it."""
    return path.is_dir() and path.name.startswith("iter_") and path.name[5:].isdecimal()


def verify_checkpoint(path: Path) -> _Report:
    """Read every file of one checkpoint, and return what is wrong with it."""
    report = _Report()
    try:
        checkpoint = _Checkpoint.open(path)
    except CheckpointError as error:
        report.problems.append(str(error))
        return report
    report.problems += _small_files(checkpoint)
    totals = dict.fromkeys(checkpoint.kinds(), 0)
    unread: set[str] = set()
    with _bar(checkpoint.nbytes(checkpoint.keys), path.name) as bar:
        for key in checkpoint.keys:
            kind = checkpoint.kind_of(key)
            report.tensors += 1
            report.without_digest += kind is None
            if kind is None and not key.startswith("rng."):
                report.problems.append(f"{key}: {layout.STATE_FILE} has no digest of it")
            try:
                for chunk in checkpoint.chunks(key):
                    values = checkpoint.read(chunk)
                    bar.update(values.nbytes)
                    if kind is not None:
                        totals[kind] += _digest_of(chunk, kind, checkpoint.shape(key), values)
            except CheckpointError as error:
                report.problems.append(str(error))
                unread.add(kind or "")
    report.problems += _digest_problems(checkpoint, totals, unread)
    return report


def _small_files(checkpoint: _Checkpoint) -> list[str]:
    """Return what is wrong with the files beside tensors and description."""
    problems = []
    path, description = checkpoint.path, checkpoint.description
    if path.name.startswith("iter_") and layout.step_of(path) != description.step:
        problems.append(f"{layout.STATE_FILE}: it is of step {description.step}")
    for name in (layout.CONFIG_FILE, layout.COMMON_FILE, "metadata.json"):
        if not (path / name).is_file():
            problems.append(f"{name} is missing")
    try:
        text = (path / layout.CONFIG_FILE).read_text(encoding="utf-8")
        if yaml.safe_load(text) != description.config:
            problems.append(f"{layout.CONFIG_FILE}: not the configuration in {layout.STATE_FILE}")
    except FileNotFoundError:
        pass  # listed above
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{layout.CONFIG_FILE}: cannot be read ({_first_line(error)})")
    try:
        common = torch.load(path / layout.COMMON_FILE, weights_only=True)
        expected = {"iteration": description.step, "anchor_digest": description.anchor_digest}
        if {key: common.get(key) for key in expected} != expected:
            problems.append(f"{layout.COMMON_FILE}: of another checkpoint")
    except FileNotFoundError:
        pass
    # Reading a damaged file can raise anything.
    except Exception as error:  # noqa: BLE001
        problems.append(f"{layout.COMMON_FILE}: cannot be read ({_first_line(error)})")
    return problems


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _digest_problems(
    checkpoint: _Checkpoint, totals: Mapping[str, int], unread: set[str]
) -> list[str]:
    """Compare the digests of the tensors that were read with those that were saved."""
    problems = []
    description = checkpoint.description
    kinds = checkpoint.kinds()
    for kind, total in totals.items():
        saved = {replica["digests"].get(kind) for replica in description.replicas}
        if is_shared(kind) and len(saved) > 1:
            problems.append(f"{kind}: {layout.STATE_FILE} has different digests for replicas")
        if kind not in unread and render(total) != kinds[kind]:
            names = [key for key in checkpoint.keys if checkpoint.kind_of(key) == kind]
            problems.append(
                f"{kind}: its {len(names)} tensors have digest {render(total)}, saved was "
                f"{kinds[kind]}: at least one has changed or is missing"
            )
    if kinds.get(ANCHOR) != description.anchor_digest:
        problems.append(f"{layout.STATE_FILE}: two different digests of the anchor")
    return problems


# ---- diff -----------------------------------------------------------------------------------


def _diff(arguments: argparse.Namespace) -> None:
    one, other = (_Checkpoint.open(layout.resolve(p)) for p in (arguments.one, arguments.other))
    print(f"A  {one.path}: step {one.description.step}, {_shape_words(one)}")
    print(f"B  {other.path}: step {other.description.step}, {_shape_words(other)}")
    parts = {
        "configuration": _config_differences(one, other),
        "kinds": _kind_differences(one, other),
        "tensors": _tensor_differences(one, other),
    }
    for title, lines in parts.items():
        print(f"\n{title}")
        shown = lines[:_MOST_LINES] or ["no difference"]
        for line in shown:
            print(f"  {line}")
        if len(lines) > len(shown):
            print(f"  and {len(lines) - len(shown)} more")
    if any(parts.values()):
        raise _Found


def _shape_words(checkpoint: _Checkpoint) -> str:
    description = checkpoint.description
    replicas = len(description.replicas)
    return (
        f"K {replicas}, {_layout_words(description.topology)}, {_method_words(description.config)}"
    )


def _config_differences(one: _Checkpoint, other: _Checkpoint) -> list[str]:
    before, after = (dict(_leaves(c.description.config)) for c in (one, other))
    keys = dict.fromkeys([*before, *after])
    return [
        f"{key}: {_value(before, key)} -> {_value(after, key)}"
        for key in keys
        if before.get(key, _Found) != after.get(key, _Found)
    ]


def _value(values: Mapping[str, Any], key: str) -> str:
    text = repr(values[key]) if key in values else "n/a"
    return text if len(text) <= 30 else f"{text[:27]}..."


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _kind_differences(one: _Checkpoint, other: _Checkpoint) -> list[str]:
    before, after = one.kinds(), other.kinds()
    lines = [f"{kind}: only in A" for kind in before if kind not in after]
    lines += [f"{kind}: only in B" for kind in after if kind not in before]
    both = [kind for kind in before if kind in after]
    return lines + [
        f"{kind}: digest {before[kind]} -> {after[kind]}"
        for kind in both
        if before[kind] != after[kind]
    ]


def _tensor_differences(one: _Checkpoint, other: _Checkpoint) -> list[str]:
    """Compare the tensors of the kinds whose digests differ."""
    before, after = one.kinds(), other.kinds()
    changed = {kind for kind in before if kind in after and before[kind] != after[kind]}
    keys = [[key for key in c.keys if c.kind_of(key) in changed] for c in (one, other)]
    lines = [f"{key}: only in A" for key in keys[0] if key not in other.keys]
    lines += [f"{key}: only in B" for key in keys[1] if key not in one.keys]
    common = [key for key in keys[0] if key in other.keys]
    with _bar(one.nbytes(common), "comparing") as bar:
        for key in common:
            if one.shape(key) != other.shape(key):
                lines.append(f"{key}: shape {one.shape(key)} -> {other.shape(key)}")
                continue
            differing, largest = _gap(one, other, key, bar)
            if differing:
                share = differing / math.prod(one.shape(key))
                lines.append(f"{key}: {share:.2%} of the values, by up to {largest:.3g}")
    return lines


def _gap(one: _Checkpoint, other: _Checkpoint, key: str, bar: "tqdm[Any]") -> tuple[int, float]:
    """Return the number of values with other bits, and the largest difference."""
    differing, largest = 0, 0.0
    held: tuple[_Chunk, Tensor] | None = None  # of equal layouts, each chunk is read once
    for chunk in one.chunks(key):
        here = one.read(chunk)
        bar.update(here.nbytes)
        for opposite in other.chunks(key):
            ranges = chunk.overlap(opposite)
            if ranges is None:
                continue
            if held is None or held[0] != opposite:
                held = (opposite, other.read(opposite))
            a, b = here[chunk.inside(ranges)], held[1][opposite.inside(ranges)]
            # Bits: a NaN equals itself, and -0.0 is another value than 0.0.
            unequal = a.contiguous().view(torch.int32) != b.contiguous().view(torch.int32)
            if unequal.any():
                differing += int(unequal.sum())
                gaps = (a.double() - b.double()).abs()
                largest = max(largest, float(gaps.nan_to_num(nan=math.inf).max()))
    return differing, largest


# ---- prune and show -------------------------------------------------------------------------


def _prune(arguments: argparse.Namespace) -> None:
    directory: Path = arguments.directory
    if arguments.keep < 1:
        raise ConfigError(f"--keep {arguments.keep}: at least one checkpoint has to stay.")
    found = _published(directory)
    latest = layout.find_latest(directory)
    if latest is None:
        raise ConfigError(f"{directory} holds no checkpoint.")
    if latest.note:
        print(latest.note)
    config = read_description(latest.path).config
    rule = {
        "step": latest.step,
        "keep": arguments.keep,
        "retain_interval": config["checkpoint"].get("save_retain_interval"),
    }
    if arguments.dry_run:
        # The rule is tried on empty directories of the same names.
        with tempfile.TemporaryDirectory() as names:
            for path in found:
                (Path(names) / path.name).mkdir()
            gone = layout.prune(Path(names), **rule)
        print(f"would delete {len(gone)} of {len(found)} checkpoints")
    else:
        lease = Lease(directory, print)
        lease.acquire()
        try:
            gone = layout.prune(directory, **rule)
        finally:
            lease.release()
        print(f"deleted {len(gone)} of {len(found)} checkpoints")
    for path in gone:
        print(f"  {directory / path.name}")


def _show(arguments: argparse.Namespace) -> None:
    path = layout.resolve(arguments.path)
    description = read_description(path)
    topology = ", ".join(f"{axis} {size}" for axis, size in description.topology.items())
    print(f"checkpoint  {path}")
    print(f"step        {description.step}")
    print(f"tokens      {_tokens(description)}")
    print(f"method      {_method_words(description.config)}")
    print(f"layout      {topology}")
    print(f"format      {description.format}")
    for name, value in description.versions.items():
        print(f"written by  {name} {value}")
    print(f"masters     {'stored' if description.has_masters else 'equal to the anchor'}")
    print("digests")
    for kind, digest in {
        k: d for r in description.replicas for k, d in r["digests"].items()
    }.items():
        print(f"  {digest}  {kind}")
    print("configuration")
    text = yaml.safe_dump(description.config, sort_keys=False, width=_WIDTH - 2)
    print("".join(f"  {line}\n" for line in text.splitlines()), end="")


def _tokens(description: Description) -> str:
    samples = description.scalars.get("consumed_samples")
    length = description.config["model"].get("seq_length")
    if not isinstance(samples, int) or not isinstance(length, int):
        return "n/a"
    return f"{samples * length:,} ({samples:,} samples of {length:,})"


if __name__ == "__main__":
    sys.exit(main())
