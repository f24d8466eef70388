"""`Document`: a config file as plain values, with file and line of every key.

Reading refuses repeated keys. Merging follows one rule: mappings merge, everything else is
replaced, and ``null`` resets a key to its default.
"""

import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_muloco.errors import ConfigError

__all__ = [
    "OVERRIDE",
    "Document",
    "merge",
    "parse_override",
    "place_of",
    "read_document",
    "without_nulls",
]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 loader that reads ``1e-4`` as a number; PyYAML alone reads it as a string."""


_FLOAT = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
         |[0-9][0-9_]*[eE][-+]?[0-9]+
         |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
         |\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


OVERRIDE = "--set "

# Far more than any config has. Aliases can make a short file hold billions of values, and PyYAML
# follows nested brackets by recursion.
_MOST_BYTES = 2**20
_MOST_VALUES = 20_000
_DEEPEST = 20


@dataclass
class Document:
    """Nested values of a config file.

    Attributes:
        values: Nested mappings, as in the file.
        places: ``file:line`` of every dotted key.
        tuned_for: The ``inner.kind`` under which ``inner.lr`` was written; ``None`` if unknown.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    tuned_for: str | None = None

    @property
    def inner_kind(self) -> str | None:
        """``inner.kind``, ``None`` where it is not written."""
        inner = self.values.get("inner")
        return inner.get("kind") if isinstance(inner, dict) else None


@dataclass
class _Reader:
    """Converts the YAML nodes of one file to values and collects all problems.

    Attributes:
        label: File name, or the ``--set`` text.
        loader: Loader that constructs scalars.
        places: ``file:line`` of every dotted key read so far.
        problems: Messages collected so far.
        open_nodes: Ids of the nodes being converted, to find aliases that contain themselves.
        values: Number of values read so far; an alias counts what it repeats.
    """

    label: str
    loader: yaml.SafeLoader
    places: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    open_nodes: list[int] = field(default_factory=list)
    values: int = 0

    def place(self, node: yaml.Node) -> str:
        """Return ``file:line`` of the start of a node."""
        return _place(self.label, node.start_mark.line)

    def value(self, node: yaml.Node, key: str) -> Any:
        """Return the node's value and record the place of every key inside it."""
        if id(node) in self.open_nodes:
            self.problems.append(f"{self.place(node)}  {key}: this alias contains itself")
            return None
        self.values += 1
        if self.values > _MOST_VALUES:
            raise ConfigError(
                f"{self.place(node)}  the config has more than {_MOST_VALUES} values, those that "
                "aliases repeat included.\n  Remove aliases (*name) of large sections."
            )
        if len(self.open_nodes) > _DEEPEST:
            raise ConfigError(_too_deep(self.place(node)))
        self.open_nodes.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, key)
            if isinstance(node, yaml.SequenceNode):
                return [self.item(child, f"{key}.{i}") for i, child in enumerate(node.value)]
            return self.scalar(node, key)
        finally:
            self.open_nodes.pop()

    def item(self, node: yaml.Node, key: str) -> Any:
        """Return the value of one list entry."""
        self.places[key] = self.place(node)
        return self.value(node, key)

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        """Return a mapping; repeated keys and keys that are not plain words are problems."""
        result: dict[str, Any] = {}
        first_place: dict[str, str] = {}
        for key_node, value_node in node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if name is None or name == "<<":
                self.problems.append(
                    f"{self.place(key_node)}  {prefix or 'config'}: a key must be a plain "
                    "word. To share values between files, use extends."
                )
                continue
            dotted = f"{prefix}.{name}" if prefix else name
            if name in result:
                here = self.place(key_node)
                first = first_place[name]
                before = "twice on this line" if first == here else f"first written at {first}"
                self.problems.append(
                    f"{here}  {dotted}: repeated; {before}.\n"
                    "  Only one of the two values can be used. Delete one of them."
                )
                continue
            first_place[name] = self.places[dotted] = self.place(key_node)
            result[name] = self.value(value_node, dotted)
        return result

    def scalar(self, node: yaml.Node, key: str) -> Any:
        """Return a number, string, boolean or null."""
        try:
            value = self.loader.construct_object(node)
            if isinstance(value, str):
                value.encode()
        except (yaml.YAMLError, ValueError) as error:
            self.problems.append(f"{self.place(node)}  {key}: {_one_line(error)}")
            return None
        if isinstance(value, str) and "\0" in value:
            self.problems.append(
                f"{self.place(node)}  {key}: {value!r} holds a NUL character, which no file name "
                "or text may have. Remove it."
            )
        return value


def _too_deep(place: str) -> str:
    return (
        f"{place}  nested more than {_DEEPEST} levels deep, but a config has at most five.\n"
        "  Check brackets and indentation."
    )


def _place(label: str, line: int) -> str:
    """Return ``file:line``, or the label alone for a ``--set`` text, which has no lines."""
    return label if label.startswith(OVERRIDE) else f"{label}:{line + 1}"


def _one_line(error: Exception) -> str:
    """Return an error's text in one line, without PyYAML's positions."""
    text = getattr(error, "problem", None) or str(error)
    return " ".join(str(text).split())


def _read_node(text: str, label: str, prefix: str = "") -> Document:
    """Parse ``text``; raise one ConfigError with all problems in it."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = _place(label, mark.line) if mark else label
        raise ConfigError(
            f"{place}  not valid YAML: {_one_line(error)}.\n"
            "  Check indentation, colons and quotes near that line."
        ) from None
    except RecursionError:
        raise ConfigError(_too_deep(label)) from None
    reader = _Reader(label, loader)
    value = {} if node is None else reader.value(node, prefix)
    loader.dispose()
    if reader.problems:
        raise ConfigError(reader.problems)
    return Document({"": value}, reader.places)


def read_document(path: str) -> Document:
    """Return the mapping in one YAML file, without following its ``extends``.

    Raises:
        ConfigError: When the file is missing, unreadable, empty, not a mapping, not YAML, or
            repeats a key.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(
                f"{path}: cannot be read: it is a directory, pipe or device. Give a YAML file that "
                "every rank can read."
            )
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise ConfigError(
                f"{path}: not a UTF-8 text file, so it cannot be a config file."
            ) from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{path}: cannot be read ({reason}).\n"
            f"  Paths are relative to the working directory, {os.getcwd()}; a file name after "
            "extends is relative to the file that contains it."
        ) from None
    if len(text) > _MOST_BYTES:
        raise ConfigError(
            f"{path}: more than {_MOST_BYTES} characters, so it cannot be a config file."
        )
    document = _read_node(text, path)
    values = document.values[""]
    if not values:
        raise ConfigError(
            f"{path}: the file is empty. A config needs the sections model, data, training, inner "
            "and outer. Start from one of the files in configs/."
        )
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}:1  the file holds a {type(values).__name__}, not sections such as model: and "
            "training:."
        )
    return Document(values, document.places)


def parse_override(text: str) -> Document:
    """Return the document of one ``--set a.b=value``; the value is parsed as YAML."""
    dotted, equals, value_text = text.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names) or len(names) > _DEEPEST:
        raise ConfigError(
            f"--set {text}: not of the form section.key=value, for example --set inner.lr=0.01."
        )
    key = ".".join(names)
    label = f"{OVERRIDE}{text}"
    parsed = _read_node(value_text, label, key)
    value: Any = None if parsed.values[""] == {} and not value_text.strip() else parsed.values[""]
    for name in reversed(names):
        value = {name: value}
    places = dict.fromkeys(parsed.places, label)
    places |= {".".join(names[: i + 1]): label for i in range(len(names))}
    return Document(value, places)


def merge(base: Document, over: Document) -> Document:
    """Return ``base`` with ``over`` on top; neither is changed."""
    replaced = set(_replaced(base.values, over.values, ""))
    places = {
        key: place for key, place in base.places.items() if not replaced.intersection(_above(key))
    }
    merged = Document(_merge_values(base.values, over.values), places | over.places)
    if "inner.lr" in over.places:
        merged.tuned_for = over.tuned_for or merged.inner_kind
    else:
        merged.tuned_for = base.tuned_for
    return merged


def _above(key: str) -> Iterator[str]:
    """Yield the dotted keys of the sections that a key is in."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _merge_values(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings; anything else in ``over`` replaces what was there."""
    result = dict(base)
    for name, value in over.items():
        below = base.get(name)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[name] = _merge_values(below, value) if both else value  # type: ignore[arg-type]
    return result


def _replaced(base: dict[str, Any], over: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield the dotted keys whose whole value ``over`` replaces."""
    for name, value in over.items():
        below = base.get(name)
        if isinstance(below, dict) and isinstance(value, dict):
            yield from _replaced(below, value, f"{prefix}{name}.")
        elif name in base:
            yield f"{prefix}{name}"


def place_of(places: Mapping[str, str], key: str) -> str:
    """Return ``file:line`` of a dotted key or of its nearest parent in the file, else ``""``."""
    while key not in places and "." in key:
        key = key.rpartition(".")[0]
    return places.get(key, "")


def without_nulls(value: Any, known: Collection[str] | None = None, key: str = "") -> Any:
    """Return ``value`` without the keys that are null, which then take their defaults.

    Args:
        value: Values of a document.
        known: Dotted keys of the schema, with ``[]`` after that of a list. Null stays at any other
            key, so that an unknown key is noticed whatever its value; by default all are known.
        key: Dotted key of ``value``.
    """
    if isinstance(value, dict):
        dotted = {name: f"{key}.{name}" if key else str(name) for name in value}
        return {
            name: without_nulls(item, known, dotted[name])
            for name, item in value.items()
            if item is not None or (known is not None and dotted[name] not in known)
        }
    if isinstance(value, list):
        return [without_nulls(item, known, f"{key}[]") for item in value]
    return value
