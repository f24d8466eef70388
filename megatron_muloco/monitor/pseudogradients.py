"""`PseudogradientRecorder` writes pseudogradients of chosen rounds; `SavedRounds` reads them.

::

    DIR/manifest.json                                         run, layout, digest of the config
    DIR/round_00001/replica_003_rank_00_fragment_00.npz       shards of anchor - local, flat fp32
    DIR/round_00001/replica_003_rank_00_steps.npz             subtracted by each inner step, [H, n]

Every rank writes the shards that it synchronises, so nothing is gathered and any layout can be
saved. The reader puts them together and splits fused parameters into the matrices that Muon
updates. A file appears under its name when it is complete. A full disk costs the file, not the run.
Files are numpy archives and are read without pickle, so reading them runs no code.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.schema import RunConfig, SavePseudogradientsConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.console import Console
from megatron_muloco.optim.matrices import LayerShape, is_vector, split
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.params import ParamInfo, Shard
from megatron_muloco.topology import Coords, Topology

__all__ = [
    "MANIFEST_FILE",
    "PseudogradientRecorder",
    "SavedRound",
    "SavedRounds",
    "build_recorder",
    "whole_matrices",
]

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_METADATA = "metadata"  # key beside the parameters' names, none of which is one word


# ---- writing -------------------------------------------------------------------------------------


class PseudogradientRecorder:
    """Writes this rank's shards of the pseudogradients of chosen rounds; a `LaunchObserver`.

    Args:
        config: Which rounds, where, and whether with inner steps.
        shards: This rank's shards.
        schedule: Schedule of the outer steps.
        coords: Place of this rank.
        topology: Arrangement of all ranks.
        report: Called with a message if a file cannot be written.

    Memory: with ``steps``, one fp32 copy of this rank's matrices for each inner step of a saved
    round, in host memory, and one more.
    """

    def __init__(
        self,
        config: SavePseudogradientsConfig,
        shards: Sequence[Shard],
        schedule: SyncSchedule,
        coords: Coords,
        topology: Topology,
        report: Callable[[str], None],
    ) -> None:
        assert config.dir is not None, "a recorder needs a directory"
        self._config, self._directory, self._schedule = config, Path(config.dir), schedule
        self._shards = {shard.name: shard for shard in shards}
        self._coords, self._report = coords, report
        rank = topology.position(topology.rank(coords))
        self._stem = f"replica_{coords.replica:03d}_rank_{rank:02d}"
        self._before: dict[str, Tensor] = {}
        self._steps: dict[str, list[Tensor]] = {}

    def _is_saved(self, round_index: int) -> bool:
        first, last = self._config.rounds
        return first <= round_index <= last and not (round_index - first) % self._config.interval

    def inner_step(
        self, step: int, masters: Mapping[str, Tensor], anchors: Mapping[str, Tensor]
    ) -> None:
        """Keep what inner step ``step`` subtracted from the matrices, where steps are saved.

        Args:
            step: The inner step just made.
            masters: Local parameters after it, before its outer steps.
            anchors: The anchor, which the first step of a round started from.
        """
        round_index = self._schedule.round(step)
        if not self._config.steps or not self._is_saved(round_index):
            return
        if step == 1 or self._schedule.round(step - 1) != round_index:
            self._steps = {}
            self._before = {name: anchors[name].cpu() for name in self._matrices(anchors)}
        for name, before in self._before.items():
            after = masters[name].detach().to("cpu", copy=True)
            self._steps.setdefault(name, []).append(before - after)
            self._before[name] = after

    def _matrices(self, names: Mapping[str, Tensor]) -> list[str]:
        return [name for name in names if not is_vector(self._shards[name].param)]

    def launch(
        self, step: int, fragment: int, pseudogradients: Mapping[str, Tensor], *, finite: bool
    ) -> None:
        """Write a fragment's pseudogradient, if its round is saved.

        Args:
            step: The inner step of the launch.
            fragment: Index of the fragment.
            pseudogradients: ``theta - theta_k`` of this rank's shards, flat fp32; read only.
            finite: Whether all of the replica's pseudogradient is finite; nothing is written if
                not.
        """
        round_index = self._schedule.round(step)
        if not self._is_saved(round_index):
            return
        steps, self._steps, self._before = self._steps, {}, {}
        if not finite:
            self._report(
                f"monitor.save_pseudogradients: replica {self._coords.replica} is not finite in "
                f"round {round_index}. Nothing is saved of it"
            )
            return
        facts = {"round": round_index, "step": step, "fragment": fragment}
        name = f"{self._stem}_fragment_{fragment:02d}.npz"
        self._write(name, round_index, facts, pseudogradients)
        made = {name: torch.stack(each) for name, each in steps.items()}
        if self._config.steps and all(
            len(each) == self._schedule.steps_of_round(round_index) for each in made.values()
        ):  # a run that was resumed inside the round has only seen its end
            self._write(f"{self._stem}_steps.npz", round_index, facts, made)

    def _write(
        self, name: str, round_index: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Write a file under a temporary name, then rename it; report an error and go on."""
        path = _round_directory(self._directory, round_index) / name
        temporary = path.with_name(f".tmp-{name}")
        metadata = {
            **facts,
            "replica": self._coords.replica,
            "tensor_rank": self._coords.tp,
            "shards": {name: asdict(self._shards[name]) for name in tensors},
        }
        contents: dict[str, Any] = {_METADATA: np.array(json.dumps(metadata))}
        contents |= {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(file, **contents)
            temporary.replace(path)
        except OSError as error:  # training is worth more than its record
            self._report(
                f"monitor.save_pseudogradients: cannot write {path}: {error}. Training goes on"
            )
            try:
                temporary.unlink(missing_ok=True)
            except OSError:
                return


def build_recorder(
    config: RunConfig,
    shards: Sequence[Shard],
    schedule: SyncSchedule,
    coords: Coords,
    topology: Topology,
) -> PseudogradientRecorder | None:
    """Return this rank's recorder, or ``None`` where the run saves no pseudogradients.

    The first rank of replica 0 writes the manifest.

    Raises:
        ConfigError: The directory holds rounds of another run. Nothing has been trained.
    """
    saved = config.monitor.save_pseudogradients
    if saved.dir is None:
        return None
    directory, console = Path(saved.dir), Console()
    manifest = {
        "format": _FORMAT,
        "config_digest": config.digest(),
        "inner": config.inner.kind,
        "topology": asdict(topology),
        "fragments": 1 if isinstance(config.outer, NoOuter) else config.outer.fragments.count,
        "config": config.model_dump(mode="json"),
    }
    path = directory / MANIFEST_FILE
    if path.is_file() and _read_json(path).get("config_digest") != manifest["config_digest"]:
        raise ConfigError(
            f"monitor.save_pseudogradients.dir: {directory} holds pseudogradients of a run with "
            "another configuration, and rounds of two runs would be mixed. Name another directory, "
            "or delete this one."
        )
    if coords == Coords(replica=0, pp=0, dp=0, cp=0, tp=0):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".tmp-{MANIFEST_FILE}")
            temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            console.stamped(
                f"monitor.save_pseudogradients: cannot write {path}: {error}. Training goes on"
            )
    return PseudogradientRecorder(saved, shards, schedule, coords, topology, console.stamped)


def _round_directory(directory: Path, round_index: int) -> Path:
    return directory / f"round_{round_index:05d}"


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedRound:
    """The pseudogradients of one round, put together.

    Attributes:
        round_index: The round.
        matrices: Of each replica, the matrices that Muon updates, by ``parameter::part``; fp32.
        vectors: Of each replica, the other parameters by name; fp32.
        steps: Of each replica, what the inner steps subtracted, ``[H, rows, columns]`` by matrix;
            empty where steps were not saved.
    """

    round_index: int
    matrices: tuple[dict[str, Tensor], ...]
    vectors: tuple[dict[str, Tensor], ...]
    steps: tuple[dict[str, Tensor], ...]


class SavedRounds:
    """The rounds that a run has saved.

    Args:
        directory: ``monitor.save_pseudogradients.dir`` of the run.

    Attributes:
        config: The run's configuration.
        topology: The arrangement of its ranks.

    Raises:
        ConfigError: There is no manifest, or one of another format.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / MANIFEST_FILE
        if not path.is_file():
            raise ConfigError(
                f"{directory} has no {MANIFEST_FILE}. Give the monitor.save_pseudogradients.dir of "
                "a run."
            )
        manifest = _read_json(path)
        if manifest.get("format") != _FORMAT:
            raise ConfigError(
                f"{path} has format {manifest.get('format')}, and this version reads {_FORMAT}."
            )
        self._directory, self._fragments = directory, int(manifest["fragments"])
        self.config = RunConfig.model_validate_json(json.dumps(manifest["config"]))
        self.topology = Topology(**manifest["topology"])

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds with at least one file, in order."""
        found = self._directory.glob("round_*/*.npz")
        return sorted({int(path.parent.name.removeprefix("round_")) for path in found})

    def load(self, round_index: int) -> SavedRound:
        """Return a round.

        Raises:
            ConfigError: Files are missing or damaged.
        """
        replicas = range(self.topology.num_replicas)
        whole = [self._replica(round_index, replica, "fragment_*") for replica in replicas]
        steps = [self._replica(round_index, replica, "steps") for replica in replicas]
        complete = all(matrices for matrices, _ in steps)
        return SavedRound(
            round_index,
            tuple(matrices for matrices, _ in whole),
            tuple(vectors for _, vectors in whole),
            tuple(matrices for matrices, _ in steps) if complete else (),
        )

    def _replica(
        self, round_index: int, replica: int, kind: str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return matrices and vectors of one replica from its files of a kind."""
        directory = _round_directory(self._directory, round_index)
        paths = sorted(directory.glob(f"replica_{replica:03d}_rank_*_{kind}.npz"))
        wanted = self.topology.replica_size * (1 if kind == "steps" else self._fragments)
        if kind == "steps" and not paths:
            return {}, {}
        if len(paths) != wanted:
            raise ConfigError(
                f"{directory} has {len(paths)} of {wanted} files of replica {replica}. Either the "
                "run did not reach the end of the round, or the replica was not finite, or a disk "
                "was full; the run's output says which. Analyse another round."
            )
        pieces: dict[tuple[str, int], list[tuple[Shard, Tensor]]] = {}
        for path in paths:
            for tensor_rank, shard, tensor in _read_shards(path):
                pieces.setdefault((shard.name, tensor_rank), []).append((shard, tensor))
        locals_ = {place: _joined(place[0], found) for place, found in pieces.items()}
        return whole_matrices(locals_, LayerShape.from_config(self.config.model))


def whole_matrices(
    pieces: Mapping[tuple[str, int], tuple[ParamInfo, Tensor]], layer: LayerShape
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the matrices that Muon updates by ``parameter::part``, and the other parameters.

    Args:
        pieces: Tensor-parallel pieces of a replica's parameters, by name and tensor rank; leading
            dimensions before those of the parameter are kept.
        layer: Sizes of a decoder layer.
    """
    matrices: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for name, _ in pieces):
        ranks = sorted(rank for each, rank in pieces if each == name)
        param = pieces[name, ranks[0]][0]
        tensors = [pieces[name, rank][1] for rank in ranks]
        dim = (param.partition_dim or 0) - len(param.local_shape)
        if is_vector(param):
            vectors[name] = torch.cat(tensors, dim)
            continue
        for matrix in split(param, layer, tensor_size=len(ranks)):
            rows = [
                torch.cat([t[..., start:end, :] for start, end in matrix.local_rows], -2)
                for t in tensors
            ]
            matrices[matrix.name] = torch.cat(rows, dim)
    return matrices, vectors


def _joined(name: str, found: Sequence[tuple[Shard, Tensor]]) -> tuple[ParamInfo, Tensor]:
    """Return one tensor-parallel piece from its flat shards."""
    param = found[0][0].param
    ordered = sorted(found, key=lambda each: each[0].start)
    edges = [0, *(shard.end for shard, _ in ordered)]
    if [shard.start for shard, _ in ordered] != edges[:-1] or edges[-1] != math.prod(
        param.local_shape
    ):
        raise ConfigError(
            f"the saved shards of {name} do not cover it once. The files are of different runs, or "
            "one is missing."
        )
    flat = torch.cat([tensor for _, tensor in ordered], -1)
    return param, flat.reshape(*flat.shape[:-1], *param.local_shape)


def _read_shards(path: Path) -> Iterator[tuple[int, Shard, Tensor]]:
    """Yield the tensor rank, the place and the values of each shard of a file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            metadata = json.loads(str(archive[_METADATA]))
            for name, entry in metadata["shards"].items():
                param = dict(entry["param"])
                param["local_shape"] = tuple(param["local_shape"])
                shard = Shard(ParamInfo(**param), entry["start"], entry["end"])
                yield int(metadata["tensor_rank"]), shard, torch.from_numpy(archive[name])
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Analyse another round.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Delete the directory.") from error
    return content if isinstance(content, dict) else {}
