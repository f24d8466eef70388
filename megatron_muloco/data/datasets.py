"""`build_datasets` builds training and held-out datasets from weighted indexed datasets.

Megatron draws samples of ``seq_length + 1`` tokens from the concatenated, shuffled documents and
caches its three index arrays. This module adds two things. The cache directory depends on the
contents of the indexed files; Megatron's own key depends on their paths only, so it would read a
dataset that was prepared again with the old index. And a single process can blend several sources,
which Megatron 0.16.1 does only with torch.distributed initialised.
"""

import contextlib
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_muloco.data.batches import SampleDataset
from megatron_muloco.data.checks import check_sources
from megatron_muloco.data.indexed import bin_path, idx_path
from megatron_muloco.data.tokenizer import Tokenizer
from megatron_muloco.errors import ConfigError

__all__ = ["Datasets", "Source", "build_datasets"]

# Bytes hashed at each end of an index; they hold the lengths of the first and last documents.
_HASHED_BYTES = 1024 * 1024


class Source(Protocol):
    """One entry of ``data.train``, ``data.valid`` or ``data.test``."""

    @property
    def path(self) -> str:
        """Prefix of the indexed dataset."""
        ...

    @property
    def weight(self) -> float:
        """Share of the samples, relative to the other entries."""
        ...


@dataclass(frozen=True, slots=True)
class Datasets:
    """Samples in their global order.

    Attributes:
        train: Training samples.
        valid: Held-out samples; ``None`` without held-out data.
        test: Held-out samples for the end of the run; ``None`` without them.
    """

    train: SampleDataset
    valid: SampleDataset | None
    test: SampleDataset | None = None


def build_datasets(
    *,
    train: Sequence[Source],
    valid: Sequence[Source],
    train_samples: int,
    valid_samples: int,
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer,
    cache_dir: str | None = None,
    test: Sequence[Source] = (),
    test_samples: int = 0,
) -> Datasets:
    """Return datasets of at least the requested numbers of samples.

    A source with fewer samples is repeated, in a new order each time.

    Args:
        train: Sources to learn from, with their weights.
        valid: Held-out sources; may be empty.
        train_samples: Samples of the whole run (steps times global batch).
        valid_samples: Samples of one evaluation.
        seq_length: Tokens of a sample.
        seed: Seed of the order; the only source of randomness.
        tokenizer: From `tokenizer.load_tokenizer`.
        cache_dir: Directory of the index arrays, which all ranks must see; beside the first source
            by default.
        test: Held-out sources for the end of the run; may be empty.
        test_samples: Samples of their evaluation.

    Raises:
        ConfigError: A source cannot be read or is shorter than one sample, or the cache cannot be
            written.

    Collectives: barriers over WORLD inside Megatron, two per dataset: every rank calls this, once,
    at the same point. Rank 0 writes the cache, the others read it. Without torch.distributed the
    calling process does all of it.
    """
    samples = (train_samples, valid_samples, test_samples)
    splits = [
        [*sources] if count > 0 else []
        for sources, count in zip((train, valid, test), samples, strict=True)
    ]
    used = [source for split in splits for source in split]
    if problems := check_sources([source.path for source in used], seq_length):
        raise ConfigError(problems)
    with warnings.catch_warnings():
        # About optional GPU packages, and about pad ids, which complete samples never contain.
        warnings.simplefilter("ignore", UserWarning)
        cache = _cache_directory(used, cache_dir)
        return _build(splits, samples, seq_length, seed, tokenizer, cache)


def _build(
    splits: Sequence[Sequence[Source]],
    samples: Sequence[int],
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer,
    cache: Path,
) -> Datasets:
    """Return the datasets of the three splits, training first; see `build_datasets`."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[_blend(sources) for sources in splits],
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [*samples], lambda: True, config)
    alone = max(len(sources) for sources in splits) > 1 and not torch.distributed.is_initialized()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _one_rank_world() if alone else contextlib.nullcontext():
            built = builder.build()
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {cache} cannot be written ({error}). Name a directory that every "
            f"rank can write to."
        ) from error
    return Datasets(*built)


def _blend(sources: Sequence[Source]) -> tuple[list[str], list[float] | None] | None:
    """Return Megatron's form of a blend, in which a single source has no weight."""
    if not sources:
        return None
    weights = [source.weight for source in sources] if len(sources) > 1 else None
    return [source.path for source in sources], weights


def _cache_directory(sources: Sequence[Source], cache_dir: str | None) -> Path:
    """Return the cache directory for the current contents of the indexed files.

    Hashing the ``.idx`` files is enough: the index arrays depend on the documents' lengths only.
    """
    base = Path(cache_dir) if cache_dir else Path(sources[0].path).parent / "index_cache"
    key = 0
    for source in sources:
        path = idx_path(source.path)
        with path.open("rb") as file:
            key = zlib.crc32(file.read(_HASHED_BYTES), key)
            file.seek(max(0, path.stat().st_size - _HASHED_BYTES))
            key = zlib.crc32(file.read(), key)
        sizes = f"{path.stat().st_size} {bin_path(source.path).stat().st_size}"
        key = zlib.crc32(sizes.encode(), key)
    return base / f"{key:08x}"


@contextlib.contextmanager
def _one_rank_world() -> Iterator[None]:
    """Initialise a world of one rank while Megatron blends: 0.16.1 reads its rank there."""
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # not in its __all__
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
