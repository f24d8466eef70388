"""`Study`: a declared sweep, read from a YAML file and checked before anything runs.

A study has sizes, methods and slices. A *slice* asks one question: which values of its `Axis` are
best in each of its *cells*. A cell is a size, a method, a number of replicas, one value of every
``over`` key, and a variant. ``configs/studies/cpu.yaml`` is an example.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from megatron_muloco.config.document import Document, place_of, read_document
from megatron_muloco.errors import ConfigError

__all__ = ["TOKENS", "Axis", "Cell", "Slice", "Study", "Used", "read_study"]

TOKENS = "tokens_per_parameter"
"""Key of the token budget, which is no key of a run's config in a study."""

_STUDY_KEYS = {
    "study", "base", "table", "launch", TOKENS, "parameters", "steps_multiple", "warmup_fraction",
    "set", "sizes", "methods", "slices",
}  # fmt: skip
_SLICE_KEYS = {
    "sizes", "methods", "replicas", "seed", "report_seeds", "steps_multiple", "grid", "over",
    "variants", "use", "set",
}  # fmt: skip
_USE_KEYS = {"slice", "methods_as", "replicas_as"}
_AXIS_KEYS = {"start", "factor", "limits", "values"}
_DIGITS = 10  # of a generated value: sqrt(2) grids have the same values in every slice


@dataclass(frozen=True)
class Axis:
    """A key whose best value is searched on a ladder of values.

    Attributes:
        key: Key of the run's config.
        ladder: All values that may be tried, ascending. Its ends are the stated limits.
        start: Method -> values that are always tried; key ``""`` is for all other methods.
    """

    key: str
    ladder: tuple[float, ...]
    start: Mapping[str, tuple[float, ...]]

    def start_of(self, method: str) -> tuple[float, ...]:
        """Return the values that are tried first."""
        return self.start.get(method, self.start.get("", ()))


@dataclass(frozen=True)
class Used:
    """Best values of an earlier slice that another slice takes over.

    Attributes:
        slice: Name of the earlier slice.
        methods_as: Method -> the method whose best values are taken; itself by default.
        replicas_as: K -> the K whose best values are taken; itself by default.
    """

    slice: str
    methods_as: Mapping[str, str] = field(default_factory=dict)
    replicas_as: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """One question of a study; see the module.

    Attributes:
        name: Name in the file.
        sizes: Names of sizes.
        methods: Names of methods.
        replicas: Values of K. Methods without an outer step take part with K = 1 only.
        seed: Seed of the search.
        report_seeds: Seeds with which the best point is run; empty for none but ``seed``.
        axes: What is searched; without any, each cell is one run.
        over: Key -> values that span cells.
        variants: Name -> settings; ``{"": {}}`` where there are none.
        use: Earlier slices whose best values are taken over, later ones last.
        settings: Settings of all runs of the slice.
        steps_multiple: Multiple to which the steps of its runs are rounded; ``None``: the study's.
    """

    name: str
    sizes: tuple[str, ...]
    methods: tuple[str, ...]
    replicas: tuple[int, ...]
    seed: int
    report_seeds: tuple[int, ...]
    axes: tuple[Axis, ...]
    over: Mapping[str, tuple[Any, ...]]
    variants: Mapping[str, Mapping[str, Any]]
    use: tuple[Used, ...]
    settings: Mapping[str, Any]
    steps_multiple: int | None = None


@dataclass(frozen=True)
class Cell:
    """A part of a slice in which its axes have one best point.

    Attributes:
        part: The slice.
        size: Name of the size.
        method: Name of the method.
        replicas: K.
        over: Key -> value of this cell.
        variant: Name of the variant, ``""`` for none.
    """

    part: Slice
    size: str
    method: str
    replicas: int
    over: tuple[tuple[str, Any], ...]
    variant: str

    @property
    def name(self) -> str:
        """The cell as text."""
        values = [f"{key.rpartition('.')[2]}={value}" for key, value in self.over]
        words = [self.part.name, self.size, self.method, f"K={self.replicas}", *values]
        return " ".join([*words, *([self.variant] if self.variant else [])])


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        path: The file.
        name: Name of the study.
        base: Config file of all runs.
        table: CSV file of finished runs.
        launch: Command that starts the training program on the ranks of a run; empty to train all
            replicas of a run in one process on one core.
        tokens_per_parameter: Tokens of a run for each parameter, unless a slice says otherwise.
        count_embeddings: Whether these parameters include embedding and output head.
        steps_multiple: Multiple to which the steps of a run are rounded.
        warmup_fraction: Share of the steps in which the inner lr rises; ``None``: as in the base.
        settings: Settings of all runs.
        sizes: Name -> settings.
        methods: Name -> settings.
        slices: Name -> slice, in the order in which they run.
        places: ``file:line`` of each key, for messages.
    """

    path: Path
    name: str
    base: Path
    table: Path
    launch: tuple[str, ...]
    tokens_per_parameter: float
    count_embeddings: bool
    steps_multiple: int
    warmup_fraction: float | None
    settings: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    slices: Mapping[str, Slice]
    places: Mapping[str, str] = field(repr=False)

    @property
    def varied(self) -> list[str]:
        """Keys that differ between runs, other than size, method, K and seed: table columns."""
        keys = [TOKENS]
        for part in self.slices.values():
            keys += [axis.key for axis in part.axes] + list(part.over) + list(part.settings)
            keys += [key for variant in part.variants.values() for key in variant]
        for method in self.methods.values():
            keys += method
        return list(dict.fromkeys(keys))

    def cells(self, part: Slice) -> list[Cell]:
        """Return the cells of a slice, in the order in which they run."""
        overs = [[(key, value) for value in values] for key, values in part.over.items()]
        return [
            Cell(part, size, method, replicas, over, variant)
            for size in part.sizes
            for over in product(*overs)
            for variant in part.variants
            for replicas in part.replicas
            for method in part.methods
            if replicas == 1 or self.methods[method].get("outer.kind") != "none"
        ]


def read_study(path: Path) -> Study:
    """Read and check a study file; see the guide on sweeps for its keys.

    Raises:
        ConfigError: Every problem found, with file and line.
    """
    document = read_document(str(path))
    reader = _Reader(document, path)
    study = reader.study()
    if reader.problems:
        raise ConfigError(reader.problems)
    assert study is not None
    return study


class _Reader:
    """Makes a `Study` of a document and collects all problems on the way."""

    def __init__(self, document: Document, path: Path) -> None:
        self._values, self._places, self._path = document.values, document.places, path
        self.problems: list[str] = []

    def study(self) -> Study | None:
        values = self._values
        self._known(values, _STUDY_KEYS, "")
        for key in ("base", "table", "sizes", "methods", "slices"):
            if key not in values:
                self._problem(key, "missing; a study needs base, table, sizes, methods and slices")
        if self.problems:
            return None
        sizes, methods = self._named("sizes"), self._named("methods")
        slices: dict[str, Slice] = {}
        for name in self._mapping("slices"):
            part = self._slice(str(name), sizes, methods, slices)
            if part is not None:
                slices[str(name)] = part
        counted = values.get("parameters", "non_embedding")
        if counted not in ("non_embedding", "total"):
            self._problem("parameters", f"{counted}, but it is non_embedding or total")
        here = self._path.parent
        return Study(
            path=self._path,
            name=str(values.get("study", self._path.stem)),
            base=here / str(values["base"]),
            table=here / str(values["table"]),
            launch=self._command("launch", values.get("launch", [])),
            tokens_per_parameter=self._number(TOKENS, values.get(TOKENS, 20)),
            count_embeddings=counted == "total",
            steps_multiple=int(self._number("steps_multiple", values.get("steps_multiple", 1))),
            warmup_fraction=values.get("warmup_fraction"),
            settings=self._settings("set", values.get("set", {})),
            sizes=sizes,
            methods=methods,
            slices=slices,
            places=self._places,
        )

    # ---- parts -----------------------------------------------------------------------------

    def _slice(
        self,
        name: str,
        sizes: Mapping[str, Any],
        methods: Mapping[str, Any],
        before: Mapping[str, Slice],
    ) -> Slice | None:
        """Return one slice, or None after a problem that leaves nothing to check further."""
        where = f"slices.{name}"
        values = self._mapping(where)
        self._known(values, _SLICE_KEYS, where)
        chosen = {
            key: self._chosen(f"{where}.{key}", values.get(key, list(known)), known)
            for key, known in (("sizes", sizes), ("methods", methods))
        }
        replicas = values.get("replicas", [1])
        if not _all(replicas, int) or min(replicas) < 1:
            self._problem(
                f"{where}.replicas", f"{replicas}, but it is a list of whole numbers >= 1"
            )
            return None
        variants = values.get("variants", {"": {}})
        part = Slice(
            name=name,
            sizes=chosen["sizes"],
            methods=chosen["methods"],
            replicas=tuple(replicas),
            seed=int(values.get("seed", 1)),
            report_seeds=tuple(values.get("report_seeds", ())),
            axes=tuple(self._axes(f"{where}.grid", values.get("grid", {}), chosen["methods"])),
            over=self._over(f"{where}.over", values.get("over", {})),
            variants={
                str(key): self._settings(f"{where}.variants.{key}", settings or {})
                for key, settings in variants.items()
            },
            use=tuple(self._used(f"{where}.use", values.get("use", []))),
            settings=self._settings(f"{where}.set", values.get("set", {})),
            steps_multiple=int(values["steps_multiple"]) if "steps_multiple" in values else None,
        )
        self._check_use(where, part, methods, before)
        return part

    def _check_use(
        self,
        where: str,
        part: Slice,
        methods: Mapping[str, Mapping[str, Any]],
        before: Mapping[str, Slice],
    ) -> None:
        """Check that every cell finds the best values that it takes over."""
        for used in part.use:
            source = before.get(used.slice)
            if source is None:
                self._problem(
                    f"{where}.use", f"{used.slice} is no slice above; there are {_listed(before)}"
                )
                continue
            if source.over or list(source.variants) != [""]:
                self._problem(f"{where}.use", f"{used.slice} has over or variants: which is meant?")
            missing_sizes = [size for size in part.sizes if size not in source.sizes]
            if missing_sizes and len(source.sizes) > 1:
                self._problem(
                    f"{where}.use",
                    f"{used.slice} has no {_listed(missing_sizes)}, and of several sizes none is "
                    "the one to take over. Run it at one size or at all of them",
                )
            for method in part.methods:
                needed = [1] if methods[method].get("outer.kind") == "none" else part.replicas
                lacking = [k for k in needed if used.replicas_as.get(k, k) not in source.replicas]
                if used.methods_as.get(method, method) in source.methods and lacking:
                    self._problem(
                        f"{where}.use",
                        f"{used.slice} has no K = {_listed(lacking)}. Add it there, or say with "
                        "replicas_as whose values to take",
                    )

    def _axes(self, where: str, grid: Any, methods: Sequence[str]) -> Iterator[Axis]:
        if not isinstance(grid, Mapping):
            self._problem(where, f"{grid}, but it is a mapping of keys to axes")
            return
        for key, values in grid.items():
            place = f"{where}.{key}"
            if not isinstance(values, Mapping):
                self._problem(
                    place, "an axis has start with factor and limits, or start with values"
                )
                continue
            self._known(values, _AXIS_KEYS, place)
            start: Any = values.get("start")
            starts = start if isinstance(start, Mapping) else {"": start}
            if not all(_all(s, int, float) for s in starts.values()):
                self._problem(f"{place}.start", f"{start}, but it is a list of numbers")
                continue
            ladder = self._ladder(place, values, next(iter(starts.values()))[0])
            if ladder is None:
                continue
            off = {x for s in starts.values() for x in s if x not in ladder}
            if off:
                self._problem(
                    f"{place}.start",
                    f"{_listed(sorted(off))} not on the ladder {_listed(ladder)}; all starts are "
                    "steps of the factor from the first one",
                )
            without = [m for m in methods if m not in starts and "" not in starts]
            if without:
                self._problem(f"{place}.start", f"no values for {_listed(without)}")
            yield Axis(str(key), ladder, {str(m): tuple(s) for m, s in starts.items()})

    def _ladder(
        self, place: str, values: Mapping[str, Any], anchor: float
    ) -> tuple[float, ...] | None:
        """Return all values of an axis, ascending."""
        if "values" in values:
            ladder = values["values"]
            if not _all(ladder, int, float) or list(ladder) != sorted(set(ladder)):
                self._problem(
                    f"{place}.values", f"{ladder}, but it is an ascending list of numbers"
                )
                return None
            return tuple(ladder)
        factor: Any = values.get("factor")
        limits: Any = values.get("limits")
        if not _all([factor], int, float) or not factor > 1:
            self._problem(f"{place}.factor", f"{factor}, but it is a number above 1, such as 2")
            return None
        if not _all(limits, int, float) or len(limits) != 2 or not 0 < limits[0] <= limits[1]:
            self._problem(
                f"{place}.limits", f"{limits}, but it is [smallest, largest], both positive"
            )
            return None
        low = math.ceil(math.log(limits[0] / anchor) / math.log(factor) - 1e-6)
        high = math.floor(math.log(limits[1] / anchor) / math.log(factor) + 1e-6)
        return tuple(_rung(anchor, factor, exponent) for exponent in range(low, high + 1))

    def _over(self, where: str, over: Any) -> dict[str, tuple[Any, ...]]:
        if not isinstance(over, Mapping) or not all(isinstance(v, list) for v in over.values()):
            self._problem(where, f"{over}, but it is a mapping of keys to lists of values")
            return {}
        return {str(key): tuple(values) for key, values in over.items()}

    def _used(self, where: str, entries: Any) -> Iterator[Used]:
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, str):
                yield Used(entry)
            elif isinstance(entry, Mapping) and {"slice"} <= set(entry) <= _USE_KEYS:
                yield Used(
                    slice=str(entry["slice"]),
                    methods_as=dict(entry.get("methods_as", {})),
                    # Keys of a mapping are read as text.
                    replicas_as={int(k): v for k, v in entry.get("replicas_as", {}).items()},
                )
            else:
                self._problem(
                    where, f"{entry}, but it is a slice's name, or has {_listed(sorted(_USE_KEYS))}"
                )

    # ---- values ----------------------------------------------------------------------------

    def _named(self, key: str) -> dict[str, dict[str, Any]]:
        """Return name -> settings."""
        entries = self._mapping(key)
        if not entries:
            self._problem(key, "empty")
        return {str(n): self._settings(f"{key}.{n}", s or {}) for n, s in entries.items()}

    def _settings(self, where: str, values: Any) -> dict[str, Any]:
        """Return dotted key -> value, from dotted or nested keys."""
        if not isinstance(values, Mapping):
            self._problem(where, f"{values}, but it is a mapping of config keys to values")
            return {}
        return {str(key): value for key, value in values.items()}

    def _chosen(self, where: str, names: Any, known: Mapping[str, Any]) -> tuple[str, ...]:
        listed = names if isinstance(names, list) else [names]
        unknown = [name for name in listed if name not in known]
        if unknown:
            self._problem(where, f"{_listed(unknown)} unknown; there are {_listed(known)}")
        return tuple(str(name) for name in listed if name in known)

    def _mapping(self, key: str) -> Mapping[str, Any]:
        value: Any = self._values
        for name in key.split(".", 1):
            value = value.get(name) if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping):
            self._problem(key, "expected a mapping")
            return {}
        return value

    def _command(self, key: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            self._problem(key, f"{value}, but it is a list of words, such as [deepspeed, ...]")
            return ()
        return tuple(str(word) for word in value)

    def _number(self, key: str, value: Any) -> float:
        if not _all([value], int, float) or value <= 0:
            self._problem(key, f"{value}, but it is a positive number")
            return 1.0
        return float(value)

    def _known(self, values: Mapping[str, Any], known: set[str], where: str) -> None:
        for key in values:
            if key not in known:
                name = f"{where}.{key}" if where else str(key)
                self._problem(name, f"unknown; there are {_listed(sorted(known))}")

    def _problem(self, key: str, text: str) -> None:
        place = place_of(self._places, key) or str(self._path)
        self.problems.append(f"{place}  {key}: {text}.")


def _rung(anchor: float, factor: float, exponent: int) -> float:
    """Return a value of a geometric ladder; whole numbers stay whole."""
    value = anchor * factor**exponent
    if isinstance(anchor, int) and math.isclose(value, round(value)):
        return round(value)
    return anchor if exponent == 0 else float(f"{value:.{_DIGITS}g}")


def _all(values: Any, *kinds: type) -> bool:
    """Return whether it is a list, not empty, of numbers of these kinds."""
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)
    )


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names) or "none"
