"""`load_config`: reads YAML files and ``--set`` values into a checked `RunConfig`."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from megatron_muloco.config.document import (
    OVERRIDE,
    Document,
    merge,
    parse_override,
    place_of,
    read_document,
    without_nulls,
)
from megatron_muloco.config.messages import (
    Problem,
    locate,
    schema_fields,
    validation_problems,
)
from megatron_muloco.config.outer import LossyCompression, NoOuter
from megatron_muloco.config.rules import find_problems
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.errors import ConfigError

__all__ = ["load_config", "load_document", "with_compression"]


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration in a file, after every check that needs no world size.

    Args:
        path: YAML file. File names under its ``extends`` are relative to it; later ones win.
        overrides: Texts ``section.key=value``, applied last; values are parsed as YAML.

    Raises:
        ConfigError: All problems found, each with file, line, key, value, reason and remedy.
    """
    document = load_document(path, overrides)
    values = without_nulls(document.values, {entry.key for entry in schema_fields()})
    try:
        config = RunConfig.model_validate(values)
        config = config.with_sources(document.places, warnings=_warnings(document))
    except ValidationError as error:
        problems, only_unknown = validation_problems(error)
        if only_unknown:
            problems += _problems_without(values, error)
        raise ConfigError(_formatted(problems, document, str(path))) from None
    problems = find_problems(config)
    if problems:
        raise ConfigError(_formatted(problems, document, str(path)))
    return config


def with_compression(config: RunConfig, compression: LossyCompression) -> RunConfig:
    """Return the same run with a compression that no file can name.

    Files name only the compressions of this package. A program with its own codec loads a config
    and then replaces ``outer.compression`` here. Everything after that (rules, plan, optimizer,
    digests, checkpoints) treats the section like those of the package.

    Args:
        config: A checked config with an outer step.
        compression: Section whose kind was registered with `compress.codecs.register_codec`.

    Raises:
        ConfigError: There is no outer step, or the section does not fit the rest of the run.
    """
    if isinstance(config.outer, NoOuter):
        raise ConfigError(
            "outer.kind: none has no outer step, so nothing is sent that could be compressed.\n"
            "  Use outer.kind nesterov or average."
        )
    outer = config.outer.model_copy(update={"compression": compression})
    changed = config.model_copy(update={"outer": outer})
    problems = find_problems(changed)
    if problems:
        raise ConfigError([problem.format(changed.where) for problem in problems])
    return changed


def load_document(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Document:
    """Return the merged values of a file, its ``extends`` and the overrides, unchecked."""
    document = _with_parents(os.fspath(path), (), {})
    problems: list[str] = []
    for text in overrides:
        try:
            document = merge(document, parse_override(text))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if document.places.get("inner.lr", "").startswith(OVERRIDE):
        document.tuned_for = document.inner_kind  # whichever of the two was given first
    return document


def _warnings(document: Document) -> Iterator[str]:
    """Yield what a run should say about its configuration at start, a message each.

    These are values that are allowed and probably not meant; what cannot be meant is refused.
    """
    before, now = document.tuned_for, document.inner_kind
    if before is not None and before != now:
        keys = ("inner.lr", "inner.kind")
        lr, kind = (f"{key} ({place_of(document.places, key)})" for key in keys)
        yield (
            f"{lr} was written for {before}, but {kind} is {now}. A learning rate of one is "
            "rarely right for the other.\n"
            f"  Set inner.lr too, or extend a file of configs/methods/ with {now}."
        )


_LONGEST_CHAIN = 30


def _with_parents(
    path: str, including: tuple[str, ...], merged_before: dict[str, Document]
) -> Document:
    """Return one file merged over the files it extends.

    ``including`` lists the files that led to this one, to find a file that extends itself.
    ``merged_before`` has the result of every file that was read already: files that several others
    extend would otherwise be read once for every way that leads to them.
    """
    identity = os.path.realpath(path)
    if identity in merged_before:
        return merged_before[identity]
    if len(including) > _LONGEST_CHAIN:
        raise ConfigError(
            f"{path}: at the end of a chain of more than {_LONGEST_CHAIN} files that extend each "
            "other.\n  Name some of them together, in one list under extends."
        )
    if identity in (os.path.realpath(name) for name in including):
        chain = " extends ".join([*including, path])
        raise ConfigError(f"{path}: extends itself ({chain}).\n  Remove one extends.")
    document = read_document(path)
    parents = document.values.pop("extends", None) or []
    names = [parents] if isinstance(parents, str) else parents
    place = document.places.pop("extends", path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{place}  extends: expected a file name or a list of file names.")
    merged = Document()
    for name in names:
        parent = os.path.normpath(os.path.join(os.path.dirname(path), name))
        if not os.path.exists(parent):
            raise ConfigError(
                f"{place}  extends: {name} does not exist (looked for {parent}).\n"
                "  File names after extends are relative to the file that contains the extends."
            )
        merged = merge(merged, _with_parents(parent, (*including, path), merged_before))
    merged_before[identity] = merge(merged, document)
    return merged_before[identity]


def _problems_without(values: dict[str, Any], error: ValidationError) -> list[Problem]:
    """Return the problems that remain once the unknown keys are removed.

    Rules need a parsed config, and the user should see unknown keys and broken rules in one report.
    """
    for detail in error.errors(include_url=False):
        _delete(values, locate(detail["loc"]).key)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError:
        return []
    return find_problems(config)


def _delete(values: Any, key: str) -> None:
    """Remove the entry at a dotted key."""
    *parents, last = key.split(".")
    for name in parents:
        values = values[int(name)] if isinstance(values, list) else values[name]
    del values[last]


def _formatted(problems: list[Problem], document: Document, path: str) -> list[str]:
    """Return the messages, each with file and line."""
    return [
        problem.format(lambda key: place_of(document.places, key) or path) for problem in problems
    ]
