"""House report: measures of the package's shape, each beside its limit.

    python tools/house_report.py

Prints one line a measure, and below it what breaks the limit. Exits with 1 when a limit is broken.
`tests/unit/test_house.py` holds the same measures. Needs the standard library only.

Rules of counting
- A *module* is a ``.py`` file of `megatron_muloco` that is not an ``__init__.py``.
- *Lines* are all lines of a file, blank ones and docstrings too. A *function's* lines go from its
  ``def`` to its end, docstring included, decorators not.
- An *importer* of a module is another module of the package that imports it, or a name that an
  ``__init__.py`` re-exports from it, anywhere in its file. A name that the top ``__init__.py``
  exports has the package's users as importers: its module is not small and private.
- A *package* is a directory or a file at the first level of `megatron_muloco`.
- *Comment lines* hold a comment, also one after code. Rules (``# ----``, with or without a heading)
  and directives (``# noqa``, ``# type:``, ``# fmt:``) are none. They are counted per 100 lines that
  are not blank.
"""

import ast
import io
import math
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_muloco"

SMALL_LINES = 130
COMMENTED_PACKAGES = ("outer", "optim", "comm", "checkpoint")
# A module's first sentence says what the module is. These openings ask a question, or depend on the
# file name to be understood.
RIDDLES = (
    "Of", "What", "Which", "Whether", "How", "Where", "When", "Are", "Is", "Do", "Does",
)  # fmt: skip
NO_COMMENT = re.compile(r"#\s*(-{3,}.*|={3,}.*|noqa\b.*|type:.*|fmt:.*|pragma:.*)?$")


@dataclass(frozen=True)
class Module:
    """One Python file of the package.

    Attributes:
        name: Dotted name relative to the package, such as ``outer.guard``; that of an
            ``__init__.py`` is its package's, and empty at the top.
        is_init: Whether it is an ``__init__.py``.
        text: The source.
    """

    name: str
    is_init: bool
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        """Number of lines."""
        return len(self.text.splitlines())

    @property
    def package(self) -> str:
        """First part of the name."""
        return self.name.partition(".")[0]

    def functions(self) -> Iterator[tuple[str, int]]:
        """Yield ``module:line name`` and the number of lines of every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{self.name}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1

    def imports(self, package: str) -> Iterator[tuple[str, str, str]]:
        """Yield ``(from, name, as)`` of every import from the package; names without the package.

        ``import package.a.b`` yields ``("a.b", "", "")``.
        """
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith(f"{package}."):
                        yield alias.name.removeprefix(f"{package}."), "", ""
            elif isinstance(node, ast.ImportFrom) and not node.level:
                head, _, source = (node.module or "").partition(".")
                if head == package:
                    for alias in node.names:
                        yield source, alias.name, alias.asname or alias.name
            elif isinstance(node, ast.ImportFrom):
                raise ValueError(f"{self.name}:{node.lineno}: relative imports are not counted")

    def first_sentence(self) -> str:
        """Return the first sentence of the docstring, on one line; empty without one."""
        paragraph = (ast.get_docstring(self.tree) or "").split("\n\n")[0]
        return re.split(r"(?<=[.?!])\s", " ".join(paragraph.split()), maxsplit=1)[0]

    def comment_lines(self) -> int:
        """Return how many lines hold a comment that says something."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return sum(
            token.type == tokenize.COMMENT and not NO_COMMENT.match(token.string)
            for token in tokens
        )

    def filled_lines(self) -> int:
        """Return how many lines are not blank."""
        return sum(bool(line.strip()) for line in self.text.splitlines())


@dataclass(frozen=True)
class Sources:
    """The files of one package and the imports between them."""

    package: str
    files: Sequence[Module]

    @property
    def modules(self) -> list[Module]:
        """The files that are counted: those that are not an ``__init__.py``."""
        return [file for file in self.files if not file.is_init]

    @cached_property
    def importers(self) -> dict[str, set[str]]:
        """Module name -> the modules that import it; ``""`` stands for the package's users."""
        found: dict[str, set[str]] = {module.name: set() for module in self.modules}
        for file in self.files:
            # What an __init__.py imports is used by those who import it from there.
            if file.is_init and file.name:
                continue
            for source, name, _ in file.imports(self.package):
                target = self._defining(source, name)
                if target != file.name and target in found:
                    found[target].add(file.name)
        return found

    def _defining(self, source: str, name: str) -> str:
        """Return the module that ``from source import name`` reaches through re-exports."""
        file = self._by_name.get(f"{source}.{name}".strip("."))
        if file is not None:
            return file.name
        file = self._by_name.get(source)
        if file is not None and file.is_init:
            for inner, inner_name, alias in file.imports(self.package):
                if alias == name and (inner, inner_name) != (source, name):
                    return self._defining(inner, inner_name)
        return source

    @cached_property
    def _by_name(self) -> dict[str, Module]:
        return {file.name: file for file in self.files}

    def package_edges(self) -> dict[str, dict[str, str]]:
        """Return package -> imported package -> one module that imports it."""
        edges: dict[str, dict[str, str]] = {}
        for file in self.files:
            if not file.name:
                continue
            for source, name, _ in file.imports(self.package):
                target = (source or self._defining(source, name)).partition(".")[0]
                if target != file.package:
                    edges.setdefault(file.package, {}).setdefault(target, file.name)
        return edges


@dataclass(frozen=True)
class Measure:
    """One number of the report.

    Attributes:
        name: What is counted.
        value: The number, rounded to one decimal.
        limit: The limit.
        at_least: Whether the limit is the smallest number allowed; else it is the largest.
        culprits: What breaks the limit, or is nearest to it.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False
    culprits: Sequence[str] = field(default=())

    @property
    def holds(self) -> bool:
        """Whether the limit is kept."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        verdict = "ok" if self.holds else "BROKEN"
        return f"{self.name:52} {self.value:>7g}   {bound:8} {self.limit:>5g}   {verdict}"


def read_sources(directory: Path = PACKAGE) -> Sources:
    """Read all Python files below a package's directory."""
    files = []
    for path in sorted(directory.rglob("*.py")):
        parts = path.relative_to(directory).with_suffix("").parts
        is_init = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_init else parts)
        files.append(Module(name, is_init, path.read_text(encoding="utf-8")))
    return Sources(directory.name, files)


def measures(sources: Sources) -> list[Measure]:
    """Return every measure of the report."""
    return [
        *_sizes(sources),
        _small_and_private(sources),
        *_function_lengths(sources),
        _cycles(sources),
        *(_comments(sources, package) for package in COMMENTED_PACKAGES),
        _first_sentences(sources),
    ]


def _sizes(sources: Sources) -> list[Measure]:
    by_size = sorted(sources.modules, key=lambda module: -module.lines)
    largest = [f"{module.name} has {module.lines} lines" for module in by_size[:3]]
    median = statistics.median(module.lines for module in by_size)
    return [
        Measure("modules", len(by_size), 116),
        Measure("lines of the median module", median, 180, at_least=True),
        Measure("lines of the largest module", by_size[0].lines, 620, culprits=largest),
    ]


def _small_and_private(sources: Sources) -> Measure:
    small = [
        (module, *sources.importers[module.name])
        for module in sources.modules
        if module.lines < SMALL_LINES and len(sources.importers[module.name]) == 1
    ]
    private = [(module, importer) for module, importer in small if importer]
    share = round(100 * len(private) / len(sources.modules), 1)
    return Measure(
        f"% of modules below {SMALL_LINES} lines with one importer",
        share,
        8,
        culprits=[f"{m.name} ({m.lines} lines) is imported by {by} alone" for m, by in private],
    )


def _function_lengths(sources: Sources) -> list[Measure]:
    lengths = sorted((item for file in sources.files for item in file.functions()), key=_length)
    rank = math.ceil(0.99 * len(lengths)) - 1  # nearest rank
    longest = [f"{name} has {lines} lines" for name, lines in reversed(lengths[-5:])]
    return [
        Measure("lines of a function, 99th percentile", lengths[rank][1], 60, culprits=longest),
        Measure("lines of the longest function", lengths[-1][1], 100, culprits=longest[:1]),
    ]


def _length(function: tuple[str, int]) -> int:
    return function[1]


def _cycles(sources: Sources) -> Measure:
    """Count the groups of packages that import each other, directly or around."""
    edges = sources.package_edges()
    reached = {package: _reachable(package, edges) for package in edges}
    groups = {
        frozenset(other for other in reached[package] if package in reached.get(other, set()))
        for package in edges
        if package in reached[package]
    }
    culprits = [
        f"{importer} -> {imported} ({edges[importer][imported]})"
        for group in groups
        for importer in sorted(group)
        for imported in sorted(group & edges[importer].keys())
    ]
    return Measure("cycles between packages", len(groups), 0, culprits=culprits)


def _reachable(package: str, edges: dict[str, dict[str, str]]) -> set[str]:
    found: set[str] = set()
    ahead = list(edges.get(package, ()))
    while ahead:
        here = ahead.pop()
        if here not in found:
            found.add(here)
            ahead += edges.get(here, ())
    return found


def _comments(sources: Sources, package: str) -> Measure:
    files = [file for file in sources.files if file.package == package]
    rates = sorted((_rate([file]), file.name) for file in files if not file.is_init)
    return Measure(
        f"comment lines per 100 lines in {package}/",
        _rate(files),
        3,
        at_least=True,
        culprits=[f"{name} has {rate:g}" for rate, name in rates[:5]],
    )


def _rate(files: Sequence[Module]) -> float:
    filled = sum(file.filled_lines() for file in files)
    return round(100 * sum(file.comment_lines() for file in files) / max(1, filled), 1)


def _first_sentences(sources: Sources) -> Measure:
    culprits = []
    for file in sources.files:
        sentence = file.first_sentence()
        if not sentence or "?" in sentence or sentence.partition(" ")[0] in RIDDLES:
            culprits.append(f"{file.name or sources.package}: {sentence or 'no docstring'}")
    return Measure("module docstrings that open with a riddle", len(culprits), 0, culprits=culprits)


def main() -> int:
    """Print the report; return 1 when a limit is broken."""
    report = measures(read_sources())
    for measure in report:
        print(measure)
        if not measure.holds:
            print("".join(f"    {culprit}\n" for culprit in measure.culprits), end="")
    return int(not all(measure.holds for measure in report))


if __name__ == "__main__":
    sys.exit(main())
