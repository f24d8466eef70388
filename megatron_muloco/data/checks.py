"""What is wrong with a run's data, found before anything is built; neither torch nor Megatron."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_muloco.data.indexed import check_indexed, read_manifest
from megatron_muloco.data.tokenizer import (
    check_tokenizer,
    check_vocab_size,
    load_encoder,
    tokenizer_digest,
)
from megatron_muloco.errors import ConfigError

if TYPE_CHECKING:
    from megatron_muloco.config.schema import DataConfig

__all__ = ["check_data", "check_sources"]

# Tokenizers that can be opened without Megatron and the libraries behind it.
_LIGHT_TOKENIZERS = frozenset({"sentencepiece", "byte-level"})


def check_data(
    data: "DataConfig", *, model_vocab_size: int | None = None, seq_length: int = 0
) -> list[str]:
    """Return every problem of the data section as a sentence that says what to do.

    Args:
        data: The section of the config.
        model_vocab_size: Rows of the embedding; a larger vocabulary is a problem.
        seq_length: Tokens of a sample; a dataset must hold at least one.
    """
    paths = [source.path for source in (*data.train, *data.valid)]
    problems = check_sources(paths, seq_length)
    tokenizer_type, tokenizer_model = data.tokenizer_type, data.tokenizer_model
    tokenizer_problems = check_tokenizer(tokenizer_type, tokenizer_model)
    if not tokenizer_problems and tokenizer_type in _LIGHT_TOKENIZERS:
        try:
            vocab_size = load_encoder(tokenizer_type, tokenizer_model).vocab_size
        except ConfigError as error:
            tokenizer_problems = list(error.problems)
        else:
            if model_vocab_size is not None:
                problems += check_vocab_size(vocab_size, model_vocab_size)
    problems += tokenizer_problems
    if not tokenizer_problems:
        problems += _check_same_tokenizer(paths, tokenizer_type, tokenizer_model)
    cache = Path(data.cache_dir) if data.cache_dir else None
    if cache is not None and cache.exists() and not cache.is_dir():
        problems.append(f"data.cache_dir: {cache} is a file. Name a directory.")
    return problems


def check_sources(prefixes: Sequence[str], seq_length: int = 0) -> list[str]:
    """Return why any of these indexed datasets cannot be used; each prefix is looked at once.

    Args:
        prefixes: Paths without suffix.
        seq_length: When given, a dataset too short for one sample is a problem.
    """
    return [
        problem
        for prefix in dict.fromkeys(prefixes)
        for problem in check_indexed(prefix, min_tokens=seq_length + 1)
    ]


def _check_same_tokenizer(
    prefixes: Sequence[str], tokenizer_type: str, tokenizer_model: str | None
) -> list[str]:
    """Compare the tokenizer that made each dataset with the one in the config."""
    digest = tokenizer_digest(tokenizer_type, tokenizer_model)
    problems: list[str] = []
    for prefix in dict.fromkeys(prefixes):
        try:
            manifest = read_manifest(prefix)
        except ConfigError as error:
            problems += error.problems
            continue
        if manifest is not None and manifest.tokenizer_digest != digest:
            problems.append(
                f"dataset {prefix}: its tokens were made by a {manifest.tokenizer_type} tokenizer "
                f"of {manifest.vocab_size} ids with digest {manifest.tokenizer_digest[:12]}, but "
                f"{tokenizer_model or tokenizer_type} has {digest[:12]}, so ids would mean other "
                f"text. Run tools/prepare_data.py again, or name the tokenizer it was made with."
            )
    return problems
