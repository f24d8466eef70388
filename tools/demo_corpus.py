"""Build the demo's data from the docstrings of the installed packages: no download, about 20 s.

Writes, under ``data/demo``: ``tokenizer.model``, and for ``train`` and ``valid`` the documents
(``.jsonl``) and the indexed dataset (``.bin .idx .json``). With ``--test-split`` half of the
held-out documents become ``test``. A second run does nothing, unless a package was updated or a
file is missing or damaged.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_muloco.data.indexed import Manifest, check_indexed, read_manifest, write_whole
from megatron_muloco.data.prepare import PrepareOptions, prepare
from megatron_muloco.data.tokenizer import tokenizer_digest, train_tokenizer
from megatron_muloco.errors import ConfigError, run_tool
from tools.corpora.docstrings import (
    DEFAULT_PACKAGES,
    Corpus,
    Document,
    collect,
    is_held_out,
    package_versions,
)
from tools.corpora.statistics import unigram_cross_entropy

# Increase it when the same packages give other files than before.
_RECIPE = 1

# Chosen by measuring on this corpus: 3.00 bytes a token with 4,096 ids, 2.65 with 2,048; a bigram
# model estimated from a million tokens needs 1.55 against 1.63 nats a byte. A power of two needs
# no padding of the embedding.
_VOCAB_SIZE = 4096

_HELD_OUT_FRACTION = 0.04

_MARKER = ".demo_corpus"  # a file in every directory that this tool writes to


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the demo's corpus, tokenizer and datasets.")
    parser.add_argument("--output-dir", default="data/demo", help="directory to write to")
    parser.add_argument(
        "--packages",
        nargs="+",
        default=list(DEFAULT_PACKAGES),
        help="packages whose docstrings are read",
    )
    parser.add_argument("--vocab-size", type=int, default=_VOCAB_SIZE, help="ids of the tokenizer")
    parser.add_argument(
        "--test-split",
        action="store_true",
        help="divide the held-out documents into valid and test",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    arguments = parser.parse_args(argv)
    return run_tool(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    directory = Path(arguments.output_dir)
    recipe = {
        "recipe": _RECIPE,
        "vocab_size": arguments.vocab_size,
        "held_out_fraction": _HELD_OUT_FRACTION,
        "packages": package_versions(arguments.packages),
    }
    if arguments.test_split:
        recipe["splits"] = ["train", "valid", "test"]
    if not _up_to_date(directory, recipe):
        _claim(directory, _splits(recipe))
        _build(directory, recipe, arguments.packages, arguments.workers)
    _summarise(directory, _splits(recipe))


def _splits(recipe: Mapping[str, Any]) -> list[str]:
    return list(recipe.get("splits", ["train", "valid"]))


def _up_to_date(directory: Path, recipe: dict[str, Any]) -> bool:
    """Return whether every file is whole and was made by this recipe from these packages."""
    model = directory / "tokenizer.model"
    if not model.is_file():
        return False
    digest = tokenizer_digest("sentencepiece", str(model))
    for name in _splits(recipe):
        prefix = str(directory / name)
        try:
            manifest = read_manifest(prefix)
        except ConfigError:
            return False
        if manifest is None or check_indexed(prefix) or manifest.tokenizer_digest != digest:
            return False
        if {key: manifest.origin.get(key) for key in {*recipe, "splits"}} != {
            "splits": None,
            **recipe,
        }:
            return False
    return True


def _claim(directory: Path, splits: Sequence[str]) -> None:
    """Mark a directory as this tool's; refuse one with files of these names that it did not write.

    Raises:
        ConfigError: A file would be replaced that belongs to somebody else.
    """
    marker = directory / _MARKER
    names = [f"{name}{suffix}" for name in splits for suffix in (".jsonl", ".json", ".bin", ".idx")]
    found = [name for name in ("tokenizer.model", *names) if (directory / name).exists()]
    if found and not marker.exists() and not any(_is_ours(directory / name) for name in splits):
        raise ConfigError(
            f"{directory} has {', '.join(found)}, which this tool did not write and would replace. "
            f"Use another --output-dir."
        )
    directory.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _is_ours(prefix: Path) -> bool:
    """Whether a dataset's manifest was written by this tool."""
    try:
        manifest = read_manifest(str(prefix))
    except ConfigError:
        return False
    return manifest is not None and "recipe" in manifest.origin


def _build(directory: Path, recipe: dict[str, Any], packages: Sequence[str], workers: int) -> None:
    with tqdm(desc="reading docstrings", unit="file") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        corpus = collect(
            packages, held_out_fraction=_HELD_OUT_FRACTION, workers=workers, progress=show
        )
    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(directory / "tokenizer.model", corpus, recipe["vocab_size"])
    for name, documents in _divided(corpus, recipe).items():
        _write_documents(directory / f"{name}.jsonl", documents)
        options = PrepareOptions(
            "sentencepiece", str(directory / "tokenizer.model"), workers=workers, overwrite=True,
            origin={**recipe, "digest": corpus.digest},
        )  # fmt: skip
        with tqdm(desc=f"tokenizing {name}", unit="B", unit_scale=True) as bar:
            prepare(
                [str(directory / f"{name}.jsonl")], str(directory / name), options,
                progress=lambda read, _, bar=bar: bar.update(read - bar.n),
            )  # fmt: skip


def _divided(corpus: Corpus, recipe: Mapping[str, Any]) -> dict[str, Sequence[Document]]:
    """Return the documents of each split; a held-out one goes to `test` by a hash of its text."""
    if "test" not in _splits(recipe):
        return {"train": corpus.train, "valid": corpus.held_out}
    # The same hash decides what is held out, so among held-out texts half of the fraction is half.
    in_test = [is_held_out(doc.text, _HELD_OUT_FRACTION / 2) for doc in corpus.held_out]
    pairs = list(zip(corpus.held_out, in_test, strict=True))
    return {
        "train": corpus.train,
        "valid": [doc for doc, test in pairs if not test],
        "test": [doc for doc, test in pairs if test],
    }


def _write_tokenizer(path: Path, corpus: Corpus, vocab_size: int) -> None:
    texts = tqdm((doc.text for doc in corpus.train), "training tokenizer", len(corpus.train))
    model = train_tokenizer(texts, vocab_size=vocab_size)
    write_whole(path, model)


def _write_documents(path: Path, documents: Sequence[Document]) -> None:
    lines = (json.dumps({"source": doc.source, "text": doc.text}) + "\n" for doc in documents)
    write_whole(path, "".join(lines).encode())


def _summarise(directory: Path, splits: Sequence[str]) -> None:
    manifests = {name: _manifest(directory / name) for name in splits}
    train, valid = manifests["train"], manifests["valid"]
    origin = train.origin
    versions = ", ".join(f"{name} {version}" for name, version in origin["packages"].items())
    baseline = unigram_cross_entropy(
        [str(directory / "train")], [str(directory / "valid")], train.vocab_size
    )
    print(f"corpus      docstrings of {versions}")
    megabytes = sum(manifest.text_bytes for manifest in manifests.values()) / 1e6
    print(f"            {megabytes:.1f} MB, digest {origin['digest'][:16]}")
    print(
        f"tokenizer   {directory / 'tokenizer.model'}: {train.vocab_size} ids, "
        f"{valid.text_bytes / (valid.tokens - valid.documents):.2f} bytes per token"
    )
    for name, manifest in manifests.items():
        print(f"{name:11} {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    print(f"baseline    unigram cross-entropy of the held-out text: {baseline:.3f} nats per token")


def _manifest(prefix: Path) -> Manifest:
    manifest = read_manifest(str(prefix))
    assert manifest is not None
    return manifest


if __name__ == "__main__":
    sys.exit(main())
