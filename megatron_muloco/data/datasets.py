"""Train and held-out datasets, built by Megatron from weighted indexed datasets.

Megatron draws samples of ``seq_length + 1`` tokens from the concatenated, shuffled documents and
keeps its three index arrays in a cache. Two things are added here: the cache is kept apart by what
the indexed files contain (Megatron's own key has their paths only, so a dataset that was prepared
again would be read with the old index), and a single process can blend several sources, which
0.16.1 does only where torch.distributed is initialised.
"""

import contextlib
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch

from megatron_muloco.data.batches import SampleDataset
from megatron_muloco.data.checks import check_sources
from megatron_muloco.data.indexed import bin_path, idx_path
from megatron_muloco.data.tokenizer import Tokenizer
from megatron_muloco.errors import ConfigError

__all__ = ["Datasets", "Source", "build_datasets"]

# Bytes of an index that are hashed at either end; the lengths of the first and last documents.
_HASHED_BYTES = 1024 * 1024


class Source(Protocol):
    """One entry of ``data.train`` or ``data.valid``."""

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
    """Samples in their global order; ``valid`` is ``None`` without held-out data."""

    train: SampleDataset
    valid: SampleDataset | None


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
) -> Datasets:
    """Return datasets of at least the asked numbers of samples.

    Text is repeated, shuffled anew each time, where it holds fewer samples than asked.

    Args:
        train: Sources to learn from, with their weights.
        valid: Held-out sources; may be empty.
        train_samples: Samples of the whole run (steps times global batch).
        valid_samples: Samples of one evaluation.
        seq_length: Tokens of a sample.
        seed: Decides the order; nothing else random is read.
        tokenizer: From `tokenizer.load_tokenizer`.
        cache_dir: Where index arrays are kept; beside the first source by default. All ranks must
            see it.

    Raises:
        ConfigError: A source cannot be read or is shorter than one sample, or the cache cannot be
            written.

    Collectives: barriers over WORLD inside Megatron, two per dataset: every rank calls this, once,
    at the same point. Rank 0 writes the cache, the others read it. Without torch.distributed the
    calling process does all of it.
    """
    held_out = [*valid] if valid_samples > 0 else []
    if problems := check_sources([source.path for source in (*train, *held_out)], seq_length):
        raise ConfigError(problems)
    with warnings.catch_warnings():
        # About optional GPU packages, and about pad ids, which whole samples never contain.
        warnings.simplefilter("ignore", UserWarning)
        built = _build(train, held_out, train_samples, valid_samples, seq_length, seed, tokenizer,
                       _cache_directory([*train, *held_out], cache_dir))  # fmt: skip
    return Datasets(built[0], built[1])


def _build(
    train: Sequence[Source],
    valid: Sequence[Source],
    train_samples: int,
    valid_samples: int,
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer,
    cache: Path,
) -> tuple[SampleDataset, SampleDataset | None]:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[_blend(train), _blend(valid), None],
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [train_samples, valid_samples, 0], lambda: True, config
    )
    alone = max(len(train), len(valid)) > 1 and not torch.distributed.is_initialized()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _one_rank_world() if alone else contextlib.nullcontext():
            built = builder.build()
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {cache} cannot be written ({error}). Name a directory that every "
            f"rank can write to."
        ) from error
    return cast(tuple[SampleDataset, SampleDataset | None], (built[0], built[1]))


def _blend(sources: Sequence[Source]) -> tuple[list[str], list[float] | None] | None:
    """Return Megatron's form of a blend; a single source has no weight there."""
    if not sources:
        return None
    weights = [source.weight for source in sources] if len(sources) > 1 else None
    return [source.path for source in sources], weights


def _cache_directory(sources: Sequence[Source], cache_dir: str | None) -> Path:
    """Return a directory of its own for what the indexed files contain now.

    The index arrays depend on the documents' lengths only, which the ``.idx`` file lists.
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
    """Be the only rank of a world while Megatron blends: 0.16.1 asks for its rank there."""
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # not in its __all__
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
