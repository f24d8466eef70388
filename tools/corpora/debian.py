"""Extracts text from unpacked Debian documentation packages: 80 MB of English for longer CPU runs.

Four packages, chosen for size, licence and for being prose: the Python manual, the kernel's
documentation, the GNU Collaborative International Dictionary of English and the WordNet glosses.
`tools/fetch_corpus.py` downloads them; this module turns their files into documents.
"""

import gzip
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .docstrings import Document

__all__ = ["SOURCES", "DebianSource", "dictionary_documents", "gloss_documents", "real_package"]

# Entries of a dictionary are a line or two; neighbours share a document of about 250 tokens.
_DOCUMENT_CHARACTERS = 1000

# After most entries of the dictionary, naming the edition.
_EDITION = re.compile(
    r"^\s*\[(?:1913 Webster|Webster 1913 Suppl\.|PJC|WordNet 1\.5)\]\n", re.MULTILINE
)

# WordNet marks where an adjective may stand: "(p)", "(a)", "(ip)".
_ADJECTIVE_MARK = re.compile(r"\((?:a|p|ip)\)$")


@dataclass(frozen=True, slots=True)
class DebianSource:
    """A package and how its files become documents.

    Attributes:
        package: Name for apt; where the real name has a version in it, the one that depends on it.
        versioned: Pattern of the real name, ``None`` where ``package`` is the real one.
        documents: From the directory that the package was unpacked to.
    """

    package: str
    versioned: str | None
    documents: Callable[[Path], Iterator[Document]]


def real_package(source: DebianSource, depends: str) -> str | None:
    """Return the package that holds the files, from the output of ``apt-cache depends``."""
    if source.versioned is None:
        return source.package
    found = re.search(rf"^\s*\|?Depends: ({source.versioned})$", depends, re.MULTILINE)
    return found.group(1) if found else None


def dictionary_documents(text: str) -> Iterator[str]:
    """Yield groups of entries of a dict file: an entry starts in the first column."""
    entries = re.split(r"\n(?=\S)", _EDITION.sub("", text))
    yield from _grouped(re.sub(r"\n{2,}", "\n", entry).strip() for entry in entries)


def gloss_documents(lines: Iterable[str]) -> Iterator[str]:
    """Yield groups of WordNet glosses as ``words: gloss``."""
    yield from _grouped(
        _gloss(line) for line in lines if " | " in line and not line.startswith(" ")
    )


def _gloss(line: str) -> str:
    """Return one synset; fields are offset, file, type, word count (hex), then word and id pairs.

    Source: wndb(5WN).
    """
    fields, gloss = line.split(" | ", 1)
    columns = fields.split()
    words = columns[4 : 4 + 2 * int(columns[3], 16) : 2]
    names = (_ADJECTIVE_MARK.sub("", word).replace("_", " ") for word in words)
    return f"{', '.join(names)}: {gloss.strip()}"


def _grouped(entries: Iterable[str]) -> Iterator[str]:
    group: list[str] = []
    size = 0
    for entry in entries:
        if entry:
            group.append(entry)
            size += len(entry)
        if size >= _DOCUMENT_CHARACTERS:
            yield "\n\n".join(group)
            group, size = [], 0
    if group:
        yield "\n\n".join(group)


def _manual(root: Path) -> Iterator[Document]:
    """Yield the reStructuredText sources that Sphinx keeps beside its pages, English only."""
    for path in sorted(root.glob("usr/share/doc/*/html/_sources/**/*.rst.txt")):
        name = path.relative_to(root / "usr/share/doc")
        if "translations" not in name.parts:
            yield Document(str(name), path.read_text(encoding="utf-8", errors="ignore").strip())


def _dictionary(root: Path) -> Iterator[Document]:
    path = root / "usr/share/dictd/gcide.dict.dz"
    if path.is_file():
        with gzip.open(path) as file:  # dictzip is gzip with an index in a header field
            text = file.read().decode("utf-8", errors="ignore")
        for number, entries in enumerate(dictionary_documents(text)):
            yield Document(f"gcide/{number}", entries)


def _glosses(root: Path) -> Iterator[Document]:
    for path in sorted(root.glob("usr/share/wordnet/data.*")):
        with path.open(encoding="utf-8", errors="ignore") as file:
            for number, glosses in enumerate(gloss_documents(file)):
                yield Document(f"wordnet/{path.suffix[1:]}/{number}", glosses)


SOURCES = (
    DebianSource("python3-doc", r"python3\.\d+-doc", _manual),
    DebianSource("linux-doc", r"linux-doc-\d+\.\d+", _manual),
    DebianSource("dict-gcide", None, _dictionary),
    DebianSource("wordnet-base", None, _glosses),
)
