"""The schema as data: every key with its section, type, default and description.

Error messages and the reference page are made from it.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_muloco.config.schema import RunConfig
from megatron_muloco.config.section import Section

__all__ = ["Location", "SchemaField", "is_tagged", "locate", "schema_fields", "section_types"]


@dataclass(frozen=True)
class SchemaField:
    """One key of the schema.

    Attributes:
        key: Dotted name; list entries are written ``[]``.
        variant: ``section.kind: value`` where only some kinds of the section have the key, else "".
        definitions: What pydantic knows about it, by variant: several where kinds define the key
            differently.
    """

    key: str
    variant: str
    definitions: Mapping[str, FieldInfo]

    @property
    def info(self) -> FieldInfo:
        """What pydantic knows about it, in the first of the kinds that have it."""
        return next(iter(self.definitions.values()))


@dataclass(frozen=True)
class Location:
    """What a pydantic error location points at.

    Attributes:
        key: Dotted name without the union tags that pydantic adds.
        owner: The section that has, or should have had, the last name.
        info: The field itself; None for a name that is not in the schema.
    """

    key: str
    owner: type[Section]
    info: FieldInfo | None


def section_types(annotation: Any) -> tuple[type[Section], ...]:
    """Return the section classes inside an annotation; several for a discriminated union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (annotation,)
    origin = get_origin(annotation)
    if origin in (Annotated, tuple):
        return section_types(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(kind for arg in get_args(annotation) for kind in section_types(arg))
    return ()


def is_tagged(annotation: Any) -> bool:
    """Return whether pydantic's error locations name the member of a union, by its ``kind``."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return False
    members = [arg for arg in get_args(annotation) if arg is not types.NoneType]
    return len(members) > 1 and bool(section_types(annotation))


def _tag(section: type[Section]) -> str:
    """Return the value of ``kind`` that selects a section of a union."""
    annotation = section.model_fields["kind"].annotation
    if get_origin(annotation) is not Literal:
        raise TypeError(f"{section.__name__}.kind must be a Literal")
    return str(get_args(annotation)[0])


def schema_fields(
    sections: Sequence[type[Section]] = (RunConfig,), prefix: str = "", variant: str = ""
) -> Iterator[SchemaField]:
    """Yield every key, depth first; keys shared by several kinds of a section come once."""

    def variant_of(owners: Sequence[type[Section]]) -> str:
        if len(owners) == len(sections):
            return variant
        return f"{prefix}kind: {' or '.join(map(_tag, owners))}"

    seen: set[str] = set()
    for section in sections:
        kind_first = sorted(section.model_fields.items(), key=lambda item: item[0] != "kind")
        for name, info in kind_first:
            if name in seen:
                continue
            seen.add(name)
            owners = [other for other in sections if name in other.model_fields]
            own_variant = variant_of(owners)
            definitions = {
                variant_of(alike): alike[0].model_fields[name] for alike in _alike(owners, name)
            }
            yield SchemaField(f"{prefix}{name}", own_variant, definitions)
            inner = section_types(info.annotation)
            brackets = "[]" if get_origin(info.annotation) is tuple else ""
            if inner:
                yield from schema_fields(inner, f"{prefix}{name}{brackets}.", own_variant)


def _alike(owners: Sequence[type[Section]], name: str) -> list[list[type[Section]]]:
    """Group sections that define a key in the same way; every section's ``kind`` is its own."""
    groups: list[list[type[Section]]] = []
    for owner in owners:
        for group in groups:
            if name == "kind" or _meaning(group[0], name) == _meaning(owner, name):
                group.append(owner)
                break
        else:
            groups.append([owner])
    return groups


def _meaning(section: type[Section], name: str) -> tuple[object, ...]:
    info = section.model_fields[name]
    return (info.annotation, info.get_default(), info.metadata, info.description)


def locate(loc: Sequence[str | int]) -> Location:
    """Return what a pydantic error location means in the words of a config file."""
    owner: type[Section] = RunConfig
    names: list[str] = []
    info: FieldInfo | None = None
    choices: tuple[type[Section], ...] = (RunConfig,)
    tagged = False
    for item in loc:
        if isinstance(item, int):
            names.append(str(item))
        elif tagged:
            choices = tuple(choice for choice in choices if _tag(choice) == item)
            tagged = False
        else:
            owner = choices[0] if choices else owner
            names.append(item)
            info = owner.model_fields.get(item)
            choices = section_types(info.annotation) if info else ()
            tagged = info is not None and is_tagged(info.annotation)
    return Location(".".join(names), owner, info)
