"""`build_datasets` builds training and held-out datasets from weighted indexed datasets.

Megatron draws samples of ``seq_length + 1`` tokens from the concatenated, shuffled documents, and
builds index arrays that say where each sample is. `IndexCache` keeps these arrays; Megatron's own
cache is not used. That one unpickles its files, is written in place, so that a kill leaves half a
file that every later start fails on, and knows its sources by their paths only.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_muloco.data.batches import SampleDataset
from megatron_muloco.data.checks import check_sources
from megatron_muloco.data.indexed import bin_path, file_digest, idx_path
from megatron_muloco.data.tokenizer import Tokenizer
from megatron_muloco.errors import ConfigError

__all__ = ["Datasets", "IndexCache", "Source", "build_datasets"]

_LOG = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]


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
            written, or this rank does not see what rank 0 wrote there.

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
        cache = IndexCache(used, cache_dir)
        return _build(splits, samples, seq_length, seed, tokenizer, cache)


def _build(
    splits: Sequence[Sequence[Source]],
    samples: Sequence[int],
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer,
    cache: "IndexCache",
) -> Datasets:
    """Return the datasets of the three splits, training first; see `build_datasets`."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[_blend(sources) for sources in splits],
        path_to_cache="",  # none: Megatron would choose a place for None
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return Datasets(*_builder(cache, [*samples], config).build())


def _builder(cache: "IndexCache", samples: list[int], config: Any) -> Any:
    """Return Megatron's builder of datasets that keep their index arrays in ``cache``."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    class CachedDataset(GPTDataset):
        def _build_document_sample_shuffle_indices(self) -> Any:
            build = super()._build_document_sample_shuffle_indices
            names = ("document", "sample", "shuffle")
            split = self.index_split.name
            return cache.get(f"samples-{split}", self.unique_description, names, build)

    class CachedBlend(BlendedDataset):
        def _build_indices(self) -> Any:
            build, names = super()._build_indices, ("dataset", "sample")
            return cache.get(f"blend-{self.split.name}", self.unique_description, names, build)

    class Builder(BlendedMegatronDatasetBuilder):
        @staticmethod
        def build_generic_dataset(cls: Any, *args: Any) -> Any:
            kind = CachedBlend if cls is BlendedDataset else cls
            return BlendedMegatronDatasetBuilder.build_generic_dataset(kind, *args)

    return Builder(CachedDataset, samples, lambda: True, config)


def _blend(sources: Sequence[Source]) -> tuple[list[str], list[float] | None] | None:
    """Return Megatron's form of a blend, in which a single source has no weight."""
    if not sources:
        return None
    weights = [source.weight for source in sources] if len(sources) > 1 else None
    return [source.path for source in sources], weights


# ---- index arrays on disk ------------------------------------------------------------------------


class IndexCache:
    """Index arrays in a directory that all ranks see, each set bound to its origin and contents.

    A set is a JSON file, written last, and one ``.npy`` file for each array, with names that begin
    alike. The JSON file has the digest of what the arrays were built from and of each array's file.
    A set with any difference is not used: rank 0 builds it again.

    Args:
        sources: The indexed datasets of all splits.
        directory: Where to keep the sets; beside the first source by default.
    """

    def __init__(self, sources: Sequence[Source], directory: str | None = None) -> None:
        parent = Path(directory) if directory else Path(sources[0].path).parent / "index_cache"
        origin = _digest_of_sources(sources)
        self.directory, self._origin = parent / origin[:16], origin

    def get(
        self,
        name: str,
        description: str,
        keys: Sequence[str],
        build: Callable[[], Sequence[npt.NDArray[Any]]],
    ) -> tuple[npt.NDArray[Any], ...]:
        """Return a set of arrays, mapped from disk; rank 0 builds and stores it if need be.

        Args:
            name: Beginning of the file names.
            description: All that decides the arrays, beside the contents of the sources.
            keys: Names of the arrays.
            build: Function that returns them.

        Raises:
            ConfigError: The set cannot be written, or rank 0 wrote it and this rank sees another.

        Collectives: none. Ranks other than 0 call it after rank 0 has returned, which is
        Megatron's barrier.
        """
        origin = hashlib.sha256(f"{self._origin}\n{description}".encode()).hexdigest()
        base = f"{name}-{origin[:16]}"
        arrays, problem = self._load(base, origin, keys)
        if arrays is None and not _builds():
            raise ConfigError(
                f"data.cache_dir: {self.directory}: {problem}, although rank 0 has just written or "
                "verified it. Name a directory that every rank can see."
            )
        if arrays is None:
            if (self.directory / f"{base}.json").exists():
                _LOG.warning("%s: %s; building it again", self.directory, problem)
            with _without_cache_warnings():
                built = dict(zip(keys, build(), strict=True))
            try:
                self._store(base, origin, built)
            except OSError as error:
                raise ConfigError(
                    f"data.cache_dir: {self.directory} cannot be written ({error}). Name a "
                    "directory that every rank can write to."
                ) from error
            arrays, problem = self._load(base, origin, keys)
            if arrays is None:
                raise ConfigError(
                    f"data.cache_dir: {self.directory}: {problem} right after it was written. "
                    "Check the disk, or name another directory."
                )
        return tuple(arrays[key] for key in keys)

    def _load(self, base: str, origin: str, keys: Sequence[str]) -> tuple[Arrays | None, str]:
        """Return the arrays, or ``None`` and what is wrong with them."""
        path = self.directory / f"{base}.json"
        try:
            if not path.exists():
                return None, f"there is no {path.name}"
            stored = json.loads(path.read_bytes())
            if stored["origin"] != origin:
                return None, f"{path.name} was made from other data"
            arrays = {}
            for key in keys:
                file = self._file(base, key)
                if file_digest(file) != stored["digests"][key]:
                    return None, f"{file.name} has changed since it was written"
                arrays[key] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            return None, f"{path.name} or an array of it cannot be read ({type(error).__name__})"
        return arrays, ""

    def _store(self, base: str, origin: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write a set; until its last file is there, no digest fits its arrays."""
        self.directory.mkdir(parents=True, exist_ok=True)
        digests = {}
        for key, array in arrays.items():
            with _replacing(self._file(base, key)) as partial:
                with partial.open("wb") as stream:
                    np.save(stream, array, allow_pickle=False)
                digests[key] = file_digest(partial)
        with _replacing(self.directory / f"{base}.json") as partial:
            partial.write_text(json.dumps({"origin": origin, "digests": digests}, indent=1) + "\n")

    def _file(self, base: str, key: str) -> Path:
        return self.directory / f"{base}-{key}.npy"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name, whose file is synced and renamed to ``path`` if nothing fails.

    The name is this process's own, since another job may build the same set at the same time.
    """
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _without_cache_warnings() -> Iterator[None]:
    """Hide what Megatron says about arrays that it does not save."""
    loggers = [
        logging.getLogger(f"megatron.core.datasets.{name}")
        for name in ("gpt_dataset", "blended_dataset")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _builds() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _digest_of_sources(sources: Sequence[Source]) -> str:
    """Return a digest of what the index arrays depend on.

    That is the documents' lengths, so the ``.idx`` files and the sizes of the ``.bin`` files.
    """
    digest = hashlib.sha256()
    for prefix in dict.fromkeys(source.path for source in sources):
        with idx_path(prefix).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        digest.update(f"{bin_path(prefix).stat().st_size}\n".encode())
    return digest.hexdigest()
