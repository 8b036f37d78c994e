"""Typed options: dataclasses whose fields are keys of a YAML file and flags of a command line.

A field declares everything about its key at once: type (choices as ``Literal``), default, meaning and range. Help,
parsing, checks and error messages all read that declaration.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

from compact.errors import UserError

OWN_CLASS = "MODULE:CLASS"  # among a Literal's choices: a class of the user's own, by where it is imported from
NOTHING_NEAR = "; --help lists all keys, and what transformers.TrainingArguments has is training.NAME"
COMPARE = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def option(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field with its meaning and its range.

    Args:
        default: the value, or a function that makes it (a type of options, or for a list or dict).
        help: one line.
        bounds: ``ge``, ``gt``, ``le``, ``lt``; for lists and dicts they hold for every entry.
    """
    metadata = {"help": help, "bounds": bounds}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Given:
    """A value as somebody gave it (plain, a list, or a dict of Given) and where: file and line, or flag."""

    value: Any
    place: str = ""


class Required(str):
    """`!required what is wanted` in a recipe: a value that only the user can give."""


def refuse(given: Given, key: str, problem: str) -> NoReturn:
    """Raise the UserError that names place, key and problem."""
    raise UserError(": ".join(part for part in (given.place, key if key not in given.place else "", problem) if part))


def hints(cls: type) -> dict[str, Any]:
    """Resolved annotations of a dataclass's fields."""
    return typing.get_type_hints(cls)


def optional(hint: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), X as (X, False)."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not types.NoneType]
        if len(inner) == 1:
            return inner[0], True
    return hint, False


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean …?', or nothing when no name is near. A full key is also found by its last part."""
    names = list(names)
    last = name.split(".")[-1]
    near = (
        [other for other in names if other.split(".")[-1] == last]
        or difflib.get_close_matches(name, names, n=1)
        or [other for other in names if difflib.get_close_matches(last, [other.split(".")[-1]], cutoff=0.75)]
    )
    return f"; did you mean {near[0]}?" if near else ""


# --- reading ---------------------------------------------------------------------------------------------------------


def build(cls: type, given: Given, key: str = "") -> Any:
    """An instance of the dataclass `cls` from a Given dict; what is absent keeps its default.

    Raises:
        UserError: an unknown key, a wrong type or a value out of range, with its place and the way out.
    """
    if not isinstance(given.value, dict):
        refuse(given, key, f"expected keys and values, got {given.value!r}")
    types_ = hints(cls)
    known = {f.name: f for f in fields(cls)}
    arguments = {}
    for name, item in given.value.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in known:
            names = [
                *(f"{key}.{other}" if key else other for other in known),
                *(path for path, _, _ in walk(cls, key)),
            ]
            refuse(item, path, f"unknown key{nearest(path, names) or NOTHING_NEAR}")
        arguments[name] = coerce(types_[name], item, path, known[name])
    return cls(**arguments)


def coerce(hint: Any, given: Given, key: str, spec: Field | None = None) -> Any:
    """The value as the type `hint` asks for; a whole number may stand for a float, and nothing else is guessed."""
    inner, may_be_null = optional(hint)
    value = given.value
    if isinstance(value, Required):
        refuse(given, key, f"is yours to give ({value}): --{key} VALUE")
    if value is None:
        if may_be_null:
            return None
        refuse(given, key, f"expected {describe(inner)}, got null")
    if is_dataclass(inner):
        return build(inner, given, key)  # type: ignore[arg-type]
    bounds = spec.metadata.get("bounds", {}) if spec else {}
    return convert(inner, given, key, bounds)


def convert(hint: Any, given: Given, key: str, bounds: dict[str, float]) -> Any:
    value, origin = given.value, get_origin(hint)
    if hint in (object, Any):
        return plain(given)
    if origin is list and isinstance(value, (list, tuple)):
        return [convert(get_args(hint)[0], Given(item, given.place), key, bounds) for item in value]
    if origin is dict and isinstance(value, dict):
        entry = get_args(hint)[1]
        items = {str(name): as_given(item, given.place) for name, item in value.items()}
        return {name: convert(entry, item, f"{key}.{name}", bounds) for name, item in items.items()}
    if origin is Literal:
        if value in get_args(hint) and type(value) is type(get_args(hint)[0]):
            return value
        if OWN_CLASS in get_args(hint) and isinstance(value, str) and re.fullmatch(r"[\w.]+:\w+", value):
            return value
        near = nearest(str(value), map(str, get_args(hint)))
        refuse(given, key, f"{value!r} is not one of {', '.join(map(str, get_args(hint)))}{near}")
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and (hint is float or value == int(value)):
            if not all(COMPARE[bound](value, limit) for bound, limit in bounds.items()):
                refuse(given, key, f"{value} is out of range: {describe_bounds(bounds)}")
            return hint(value)
    way_out = ""
    if not isinstance(value, (dict, list)):
        way_out = "; put quotes around it" if hint is str else f"; write [{value}]" if origin is list else ""
    refuse(given, key, f"expected {describe(hint)}, got {plain(given)!r}{way_out}")


def as_given(value: Any, place: str = "") -> Given:
    """Plain Python values as Given, all from one place; what is Given already stays."""
    if isinstance(value, Given):
        return value
    if isinstance(value, dict):
        return Given({name: as_given(item, place) for name, item in value.items()}, place)
    return Given(value, place)


def plain(given: Given) -> Any:
    """The value without its places."""
    if isinstance(given.value, dict):
        return {name: plain(as_given(item)) for name, item in given.value.items()}
    return given.value


def check(options: Any, key: str = "", names: Collection[str] | None = None) -> None:
    """Every field of a dataclass made in Python, or those of `names`, as if it had been read from a file.

    Raises:
        UserError: a wrong type or a value out of range.
    """
    types_ = hints(type(options))
    for spec in fields(options):
        if names is not None and spec.name not in names:
            continue
        value, path = getattr(options, spec.name), f"{key}.{spec.name}" if key else spec.name
        inner, _ = optional(types_[spec.name])
        if is_dataclass(inner) and value is not None:
            if not isinstance(value, inner):  # type: ignore[arg-type]
                refuse(Given(value), path, f"expected {inner.__name__}, got {value!r}")  # type: ignore[union-attr]
            check(value, path)
        else:
            coerce(types_[spec.name], as_given(value), path, spec)


# --- describing ------------------------------------------------------------------------------------------------------


def walk(cls: type, key: str = "") -> Iterator[tuple[str, Any, Field]]:
    """(full key, type, field) of every option, depth first."""
    types_ = hints(cls)
    for spec in fields(cls):
        path = f"{key}.{spec.name}" if key else spec.name
        inner, may_be_null = optional(types_[spec.name])
        if not is_dataclass(inner) or may_be_null:
            yield path, types_[spec.name], spec
        if is_dataclass(inner):
            yield from walk(inner, path)  # type: ignore[arg-type]


def describe(hint: Any) -> str:
    inner, may_be_null = optional(hint)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", object: "any value"}
    if get_origin(inner) is Literal:
        text = " | ".join(map(str, get_args(inner)))
    elif get_origin(inner) is list:
        text = f"a list ({describe(get_args(inner)[0])} each)"
    elif get_origin(inner) is dict:
        text = f"names with {describe(get_args(inner)[1])} each"
    elif is_dataclass(inner):
        text = "the keys below"
    else:
        text = names.get(inner, str(inner))
    return f"{text}, or null" if may_be_null else text


def describe_bounds(bounds: dict[str, float]) -> str:
    return " and ".join(f"{BOUNDS[bound]} {limit}" for bound, limit in bounds.items())
