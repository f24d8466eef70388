"""Collects English text that is already on the machine: the docstrings of installed packages.

The demo needs several megabytes of real prose without a download. The packages that training
requires contain it: their docstrings are read with `ast` (nothing is imported or run), cleaned and
grouped into documents.

A document is a run of neighbouring definitions of one module (functions, and classes with their
methods), each headed by its dotted name, as many as it takes to reach 800 characters. A docstring
alone is too short for a language model to use its context (median 60 tokens); a whole module
(up to 20,000 tokens) would make the held-out text come from few places. Runs have a few hundred
tokens (median 400, mean 580) and read from beginning to end.

The result depends on the installed versions only: packages in the order given, files sorted,
repeated docstrings kept once, and the split decided by a hash of the text.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import multiprocessing
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_muloco.errors import ConfigError

__all__ = [
    "DEFAULT_PACKAGES",
    "Corpus",
    "Document",
    "collect",
    "definitions",
    "is_held_out",
    "package_versions",
]

# Packages of the training environment by size of their prose; `stdlib` is the standard library.
DEFAULT_PACKAGES = ("torch", "sympy", "networkx", "numpy", "stdlib", "megatron", "deepspeed")

# The distribution that provides an import package, where the names differ.
_DISTRIBUTIONS = {"megatron": "megatron-core"}

# Tests have few docstrings and much source; site-packages lies inside the standard library.
_SKIPPED_DIRECTORIES = frozenset(
    {"dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"}
)

# Shorter ones are labels ("Abstract method", "See base class") rather than prose.
_SHORTEST_DOCSTRING = 40

# Files handed to a worker at once: large enough to hide the pipe, small enough to share evenly.
_FILES_PER_TASK = 16

_T = TypeVar("_T")
_R = TypeVar("_R")

# About 250 tokens; the definition that crosses it is kept whole, so documents are mostly longer.
_DOCUMENT_CHARACTERS = 800

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, slots=True)
class Document:
    """Text of neighbouring definitions and their module (``package/relative/file.py``)."""

    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in their one order, split by a hash of each text.

    Attributes:
        train: Documents to learn from.
        held_out: Documents that no training step may see; about the fraction asked for.
        versions: Version of each package the text was read from.
        digest: SHA-256 over all documents in order, so that two runs can tell whether they saw the
            same text.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    versions: dict[str, str]
    digest: str

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(len(doc.text.encode()) for doc in (*self.train, *self.held_out))


def collect(
    packages: Sequence[str] = DEFAULT_PACKAGES,
    *,
    held_out_fraction: float = 0.04,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Return the docstrings of the installed packages as documents.

    Args:
        packages: Import names; ``stdlib`` stands for the standard library.
        held_out_fraction: Share of the documents that is kept from training.
        workers: Processes that parse source files; the result does not depend on it.
        progress: Called with (files done, files in all).

    Raises:
        ConfigError: A package is not installed.
    """
    files = [
        (f"{name}/{file}", root / file) for name, root in _roots(packages) for file in _files(root)
    ]
    tasks = [files[i : i + _FILES_PER_TASK] for i in range(0, len(files), _FILES_PER_TASK)]
    seen: set[bytes] = set()
    documents: list[Document] = []
    done = 0
    for task, found in zip(tasks, _map(_read_files, tasks, workers), strict=True):
        for source, pieces in found:
            text = _join_new(pieces, seen)
            if text:
                documents.append(Document(source, text))
        done += len(task)
        if progress is not None:
            progress(done, len(files))
    return _split(documents, held_out_fraction, package_versions(packages))


def definitions(source_code: str) -> list[list[tuple[str, str]]]:
    """Return the documents of one module as lists of (heading, docstring).

    The heading is the dotted name with the argument names, empty for a module's own docstring.
    Source that does not parse with this Python has no documents.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's string literals
            module = ast.parse(source_code)
    except (SyntaxError, ValueError):
        return []
    pieces = [("", text) for text in _docstring(module)]
    groups: list[list[tuple[str, str]]] = []
    for node in _nested(module):
        pieces += _walk(node, "")
        if sum(len(text) for _, text in pieces) >= _DOCUMENT_CHARACTERS:
            groups.append(pieces)
            pieces = []
    return [*groups, pieces] if pieces else groups


def is_held_out(text: str, fraction: float) -> bool:
    """Return whether a document is kept from training; depends on its text alone."""
    leading = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(leading, "big") < fraction * 2**64


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the version of each package that a corpus would be read from.

    Raises:
        ConfigError: A package is not installed.
    """
    return {name: _version(name) for name, _ in _roots(packages)}


def _version(name: str) -> str:
    if name == "stdlib":
        return platform.python_version()
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, docstring) of a definition and of those directly inside its class body."""
    assert isinstance(node, _DEFINITIONS)
    name = prefix + node.name
    for text in _docstring(node):
        yield f"{'class ' if isinstance(node, ast.ClassDef) else ''}{name}{_arguments(node)}", text
    if isinstance(node, ast.ClassDef):
        for inner in _nested(node):
            yield from _walk(inner, f"{name}.")


def _nested(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the definitions in a body, also under ``if`` and ``try``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            yield child
        elif isinstance(child, (ast.If, ast.Try, ast.ExceptHandler, ast.With)):
            yield from _nested(child)


def _docstring(
    node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
) -> list[str]:
    """Return the cleaned docstring if it is long enough to be prose, else nothing."""
    raw = ast.get_docstring(node, clean=False)
    if raw is None or len(raw) < _SHORTEST_DOCSTRING:
        return []
    lines = (line.rstrip() for line in inspect.cleandoc(raw).splitlines())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    # Lone surrogates can be written as escapes but not encoded.
    text = text.encode("utf-8", "ignore").decode()
    return [text] if len(text) >= _SHORTEST_DOCSTRING else []


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return ""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return f"({', '.join(name for name in names if name not in ('self', 'cls'))})"


def _join_new(pieces: Iterable[tuple[str, str]], seen: set[bytes]) -> str:
    """Join the docstrings that were not seen before; inherited copies are common."""
    parts = []
    for heading, text in pieces:
        key = hashlib.sha256(text.encode()).digest()
        if key not in seen:
            seen.add(key)
            parts.append(f"{heading}\n\n{text}" if heading else text)
    return "\n\n".join(parts)


def _read_files(
    files: Sequence[tuple[str, Path]],
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Worker: return (source, pieces) of every definition in some files."""
    found = []
    for source, path in files:
        code = path.read_text(encoding="utf-8", errors="ignore")
        if '"""' in code or "'''" in code:  # parsing is the whole cost; most others have no prose
            found += [(source, pieces) for pieces in definitions(code)]
    return found


def _map(function: Callable[[_T], _R], tasks: Sequence[_T], workers: int) -> Iterator[_R]:
    if workers == 1:
        yield from map(function, tasks)
        return
    # spawn: the caller may have threads (torch), and a fork of those can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(function, tasks)


def _files(root: Path) -> list[Path]:
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    # By parts, not by string, so that the order does not depend on the path separator.
    kept = (path for path in relative if not _SKIPPED_DIRECTORIES & set(path.parts))
    return sorted(kept, key=lambda path: path.parts)


def _roots(packages: Sequence[str]) -> list[tuple[str, Path]]:
    roots = []
    missing = []
    for name in packages:
        if name == "stdlib":
            roots.append((name, Path(sysconfig.get_paths()["stdlib"])))
            continue
        spec = importlib.util.find_spec(name)  # a top-level name: finds, does not import
        places = spec.submodule_search_locations if spec is not None else None
        if places:
            roots.append((name, Path(next(iter(places)))))
        else:
            missing.append(name)
    if missing:
        raise ConfigError(
            f"corpus packages: {', '.join(missing)} not installed as packages, so their docstrings "
            f"cannot be read. Install them or leave them out of --packages."
        )
    return roots


def _split(documents: Sequence[Document], fraction: float, versions: dict[str, str]) -> Corpus:
    train = tuple(doc for doc in documents if not is_held_out(doc.text, fraction))
    held_out = tuple(doc for doc in documents if is_held_out(doc.text, fraction))
    digest = hashlib.sha256()
    for doc in documents:
        encoded = doc.text.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return Corpus(train, held_out, versions, digest.hexdigest())
