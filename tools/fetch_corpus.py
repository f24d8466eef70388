"""Fetch about 80 MB of English from Debian documentation packages into one JSON lines file.

Packages are downloaded and unpacked into a temporary directory; nothing is installed.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from megatron_muloco.errors import ConfigError, run_tool
from tools.corpora.debian import SOURCES, DebianSource, real_package
from tools.corpora.docstrings import Document, is_held_out

_HELD_OUT_FRACTION = 0.01


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", default="data/debian/train.jsonl", help="file of the training documents"
    )
    parser.add_argument(
        "--held-out",
        help=f"second file, of held-out documents: {_HELD_OUT_FRACTION:.0%}% of the documents",
    )
    arguments = parser.parse_args(argv)
    return run_tool(lambda: _run(Path(arguments.output), arguments.held_out))


def _run(output: Path, held_out: str | None) -> None:
    missing = [name for name in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not found: this corpus comes from Debian packages and needs a "
            f"Debian or Ubuntu system. Any other text will do: give it to tools/train_tokenizer.py "
            f"and tools/prepare_data.py."
        )
    paths = [output, *([Path(held_out)] if held_out else [])]
    partials = [path.with_name(path.name + ".partial") for path in paths]
    counts = [0] * len(paths)
    with ExitStack() as stack:
        files: list[TextIO] = []
        for partial in partials:
            partial.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(partial.unlink, missing_ok=True)
            files.append(stack.enter_context(partial.open("w", encoding="utf-8")))
        seen: set[bytes] = set()
        size = 0
        for doc in _documents():
            key = hashlib.sha256(doc.text.encode()).digest()
            if key in seen or not doc.text:
                continue
            seen.add(key)
            which = 1 if held_out and is_held_out(doc.text, _HELD_OUT_FRACTION) else 0
            files[which].write(json.dumps({"source": doc.source, "text": doc.text}) + "\n")
            counts[which] += 1
            size += len(doc.text.encode())
        for file, partial, path in zip(files, partials, paths, strict=True):
            file.close()
            partial.replace(path)
    for path, count in zip(paths, counts, strict=True):
        print(f"{path}: {count:,} documents")
    print(f"{size / 1e6:.1f} MB of text in all")


def _documents() -> Iterator[Document]:
    with tempfile.TemporaryDirectory(prefix="debian-corpus-") as directory:
        for source in tqdm(SOURCES, "packages"):
            root = Path(directory) / source.package
            root.mkdir()
            package = _unpack(source, root)
            found = 0
            for doc in source.documents(root):
                found += 1
                yield doc
            if not found:
                raise ConfigError(
                    f"package {package} holds no text where it was expected; its "
                    f"layout has changed."
                )
            shutil.rmtree(root)


def _unpack(source: DebianSource, root: Path) -> str:
    """Download a package and unpack it below a directory; return its real name."""
    package = real_package(source, _output("apt-cache", "depends", source.package, cwd=root))
    if package is None:
        raise ConfigError(
            f"package {source.package} does not name the package with its files on this system. "
            f"Run apt-get update, or use a Debian system."
        )
    _output("apt-get", "download", package, cwd=root)
    archives = list(root.glob("*.deb"))
    if len(archives) != 1:
        raise ConfigError(
            f"apt-get download {package} left {len(archives)} archives; expected one."
        )
    _output("dpkg-deb", "-x", archives[0].name, ".", cwd=root)
    archives[0].unlink()
    return package


def _output(*command: str, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip() or result.stdout.strip()).splitlines()
        raise ConfigError(
            f"{' '.join(command)} failed ({reason[-1] if reason else result.returncode}). "
            f"Check the network, and run apt-get update if the package list is old or absent."
        )
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
