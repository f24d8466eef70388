"""Checks of a run's data and tokenizer before anything is built; no torch, no Megatron."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_muloco.config.messages import Problem
from megatron_muloco.data.indexed import (
    Manifest,
    bin_path,
    check_indexed,
    file_digest,
    idx_path,
    open_indexed,
    read_manifest,
)
from megatron_muloco.data.tokenizer import (
    check_tokenizer,
    check_vocab_size,
    load_encoder,
    tokenizer_digest,
)
from megatron_muloco.errors import ConfigError

if TYPE_CHECKING:
    from megatron_muloco.config.schema import DataConfig, RunConfig

__all__ = ["check_data", "check_run_data", "check_sources"]

# Tokenizers that can be loaded without Megatron and its libraries.
_LIGHT_TOKENIZERS = frozenset({"sentencepiece", "byte-level"})

# Token files up to this size are read as a whole at every start, which takes a tenth of a second.
# Of larger ones the manifest is believed, and every microbatch is checked (`batches.IdRange`).
_SCANNED_BYTES = 64 * 1024 * 1024


def check_run_data(config: "RunConfig") -> list[str]:
    """Return every problem of a run's data and tokenizer, with the location of its key."""
    return check_data(
        config.data,
        model_vocab_size=config.model.vocab_size,
        seq_length=config.model.seq_length,
        where=config.where,
    )


def check_data(
    data: "DataConfig",
    *,
    model_vocab_size: int | None = None,
    seq_length: int = 0,
    where: Callable[[str], str] | None = None,
) -> list[str]:
    """Return every problem of the data section, each a sentence that says what to do.

    Args:
        data: The config's data section.
        model_vocab_size: Rows of the embedding; a larger vocabulary is a problem.
        seq_length: Tokens of a sample; a dataset must hold at least one sample.
        where: Function that returns the ``file:line`` of a dotted key; without it, messages begin
            with the key.
    """
    sources = _first_keys(data)
    tokenizer_type, tokenizer_model = data.tokenizer_type, data.tokenizer_model
    tokenizer_problems = check_tokenizer(tokenizer_type, tokenizer_model)
    too_small: list[str] = []
    if not tokenizer_problems and tokenizer_type in _LIGHT_TOKENIZERS:
        try:
            vocab_size = load_encoder(tokenizer_type, tokenizer_model).vocab_size
        except ConfigError as error:
            tokenizer_problems = list(error.problems)
        else:
            if model_vocab_size is not None:
                too_small = check_vocab_size(vocab_size, model_vocab_size)
    # A vocabulary that is too small is one problem, not one of every dataset as well.
    rows = None if too_small else model_vocab_size
    problems = [
        Problem(key, text)
        for path, key in sources.items()
        for text in check_sources([path], seq_length) or _check_contents(path, rows)
    ]
    problems += [Problem("model.vocab_size", text) for text in too_small]
    problems += [Problem("data.tokenizer_model", text) for text in tokenizer_problems]
    if not tokenizer_problems:
        problems += _check_same_tokenizer(sources, tokenizer_type, tokenizer_model)
    cache = Path(data.cache_dir) if data.cache_dir else None
    if cache is not None and cache.exists() and not cache.is_dir():
        problems.append(Problem("data.cache_dir", f"{cache} is a file. Name a directory."))
    return [_located(problem, where or _nowhere) for problem in problems]


def _first_keys(data: "DataConfig") -> dict[str, str]:
    """Return path -> the first key that names it, so that each dataset is checked once."""
    keys: dict[str, str] = {}
    for name, sources in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        for index, source in enumerate(sources):
            keys.setdefault(source.path, f"data.{name}.{index}.path")
    return keys


def _nowhere(key: str) -> str:
    return ""


def _located(problem: Problem, where: Callable[[str], str]) -> str:
    """Return the message after its location and key, which some of the sentences begin with."""
    text = problem.text.removeprefix(f"{problem.key}: ")
    return Problem(problem.key, text).format(where)


def check_sources(prefixes: Sequence[str], seq_length: int = 0) -> list[str]:
    """Return why any of these indexed datasets cannot be used; each prefix is checked once.

    Args:
        prefixes: Paths without suffix.
        seq_length: When given, a dataset too short for one sample is a problem.
    """
    return [
        problem
        for prefix in dict.fromkeys(prefixes)
        for problem in check_indexed(prefix, min_tokens=seq_length + 1)
    ]


def _check_contents(prefix: str, model_vocab_size: int | None) -> list[str]:
    """Return what is wrong with the tokens of a dataset whose files fit together.

    They have to be those that its manifest describes, where it has one, and ids of the model.
    """
    try:
        manifest = read_manifest(prefix)
        files = open_indexed(prefix)
    except ConfigError:
        return []  # a manifest of another kind, which the comparison of tokenizers reports
    scanned = files.tokens.nbytes <= _SCANNED_BYTES
    if manifest is not None and _changed(prefix, manifest, scanned):
        return [
            f"dataset {prefix}: its files are not those that {prefix}.json describes; one of them "
            f"was replaced or has changed. Run tools/prepare_data.py again with --overwrite, or "
            f"copy all three files again."
        ]
    low, high = 0, (manifest and manifest.largest_id) or 0
    if scanned:
        low, high = int(files.tokens.min()), int(files.tokens.max())
    if low >= 0 and (model_vocab_size is None or high < model_vocab_size):
        return []
    has = "ids from 0 on"
    if model_vocab_size is not None:
        has = f"0 to {model_vocab_size - 1} (model.vocab_size)"
    return [
        f"dataset {prefix}: its ids go from {low} to {high}, but the model has embeddings for "
        f"{has}. Use a larger vocabulary, or prepare the data again with the tokenizer of this run."
    ]


def _changed(prefix: str, manifest: Manifest, scanned: bool) -> bool:
    """Whether files are others than their manifest describes; `check_indexed` has the counts."""
    return manifest.idx_digest not in ("", file_digest(idx_path(prefix))) or (
        scanned and manifest.bin_digest not in ("", file_digest(bin_path(prefix)))
    )


def _check_same_tokenizer(
    sources: Mapping[str, str], tokenizer_type: str, tokenizer_model: str | None
) -> list[Problem]:
    """Compare the tokenizer that made each dataset (path -> key) with the one in the config."""
    digest = tokenizer_digest(tokenizer_type, tokenizer_model)
    problems: list[Problem] = []
    for prefix, key in sources.items():
        try:
            manifest = read_manifest(prefix)
        except ConfigError:  # a problem of the dataset, which `check_sources` reports
            continue
        if manifest is not None and manifest.tokenizer_digest != digest:
            problems.append(
                Problem(
                    key,
                    f"dataset {prefix}: its tokens were made by a {manifest.tokenizer_type} "
                    f"tokenizer of {manifest.vocab_size} ids with digest "
                    f"{manifest.tokenizer_digest[:12]}, but {tokenizer_model or tokenizer_type} "
                    f"has {digest[:12]}, so ids would mean other text. Run tools/prepare_data.py "
                    "again, or name the tokenizer it was made with.",
                )
            )
    return problems
