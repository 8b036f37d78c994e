"""Flags that set the keys of nested options: `--student.lora.rank 8`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

import yaml

from compact.errors import UserError
from compact.options import NOTHING_NEAR, Given, describe, describe_bounds, hints, nearest, optional, refuse, walk
from compact.yamlfile import read_text


def set_flags(cls: type, tree: Given, argv: Sequence[str]) -> None:
    """Put flags into a Given tree of the options `cls`; a later flag beats an earlier one.

    A flag is a key with dots, `--key value` or `--key=value`. The value is YAML; where the key wants text it is taken
    as it is, unless it begins with a quote. `true` may be left out.

    Raises:
        UserError: an unknown key (with the nearest), a missing value, or broken YAML.
    """
    words = list(argv)
    while words:
        flag, equals, rest = words.pop(0).partition("=")
        if not flag.startswith("--"):
            raise UserError(f"{flag}: expected a flag such as --seed 1; one recipe at most, and it comes first")
        keys, hint = find(cls, flag)
        if equals and not rest:
            raise UserError(f"{flag}: needs a value: {describe(hint)}")
        if equals:
            value = parse(hint, rest, flag)
        elif words and not words[0].startswith("--"):
            value = parse(hint, words.pop(0), flag)
        elif hint is bool:
            value = Given(True, flag)
        else:
            raise UserError(f"{flag}: needs a value: {describe(hint)}")
        node = tree.value
        for key in keys[:-1]:
            if key not in node or not isinstance(node[key].value, dict):
                node[key] = Given({}, flag)
            node = node[key].value
        node[keys[-1]] = value


def find(cls: type, flag: str) -> tuple[list[str], Any]:
    """The keys that a flag walks through and the type at its end; what follows a dict's key is one key of the dict.

    What may be anything may be a dict.
    """
    path = flag.removeprefix("--").split(".")
    hint: Any = cls
    for index, name in enumerate(path):
        inner, _ = optional(hint)
        if get_origin(inner) is dict or inner is object:
            return [*path[:index], ".".join(path[index:])], (get_args(inner) or (str, object))[1]
        if not is_dataclass(inner) or name not in hints(inner):  # type: ignore[arg-type]
            near = nearest(".".join(path), (key for key, _, _ in walk(cls))) or NOTHING_NEAR
            refuse(Given(None, flag), "", f"unknown key{near}")
        hint = hints(inner)[name]  # type: ignore[arg-type]
    return path, hint


def parse(hint: Any, text: str, flag: str) -> Given:
    """The value of a flag whose key has the type `hint`."""
    inner, may_be_null = optional(hint)
    if (inner is str or get_origin(inner) is Literal) and text[:1] not in ("'", '"'):
        return Given(None if may_be_null and text == "null" else text, flag)
    value = read_text(text, flag)
    if is_dataclass(inner) and value.value is not None:
        example = f"{flag}.{fields(inner)[0].name}"
        raise UserError(f"{flag}: has keys of its own, such as {example}" + (", or is null" if may_be_null else ""))
    return value


def help_lines(cls: type) -> Iterator[str]:
    """Two lines a key: its flag with its default, then its meaning, type and range."""
    for key, hint, spec in walk(cls):
        value = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        kind = ", ".join(filter(None, (describe(hint), describe_bounds(spec.metadata["bounds"]))))
        yield f"  --{key} {'' if is_dataclass(value) else show(value)}".rstrip()
        yield f"      {spec.metadata['help']} [{kind}]"


def show(value: Any) -> str:
    """A value on one line, as YAML takes it back."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def positive(text: str) -> int:
    """A flag's whole number, at least 1: a type for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value
