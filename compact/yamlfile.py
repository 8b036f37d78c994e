"""YAML in which every value remembers its line, 5e-5 is a number, `no` is text and a key given twice is an error."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from compact.errors import UserError
from compact.options import Given, Required, refuse

# PyYAML follows YAML 1.1: 5e-5 would be text, `save_strategy: no` a boolean, 010 eight and 1:00 sixty. YAML 1.2 reads
# them as people do.
BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"[-+]?\d+(_\d+)*$")
FLOAT = re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$")


class Loader(yaml.SafeLoader):
    """yaml.SafeLoader with the floats and booleans of YAML 1.2 and the tag !required."""


class Dumper(yaml.SafeDumper):
    """Quotes what Loader would read as a number."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))
for _side in (Loader, Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))
    _side.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))


def _whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _required(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Required:
    return Required(loader.construct_scalar(node))


Loader.add_constructor("tag:yaml.org,2002:int", _whole)
Loader.add_constructor("!required", _required)


def read_text(text: str, source: str) -> Given:
    """The values of a YAML text as Given; their places are `source:line`, or the source alone if it is a flag.

    Raises:
        UserError: not YAML, or a key given twice.
    """
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            return Given({}, source) if node is None else _given(loader, node, source)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = _place(source, mark) if mark else source
        raise UserError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _place(source: str, mark: yaml.Mark) -> str:
    return source if source.startswith("--") else f"{source}:{mark.line + 1}"


def _given(loader: Loader, node: yaml.Node, source: str) -> Given:
    place = _place(source, node.start_mark)
    if not isinstance(node, yaml.MappingNode):
        try:
            return Given(loader.construct_object(node, deep=True), place)
        except ValueError as error:  # a date that does not exist
            raise UserError(f"{place}: {node.value!r} is no value: {error}; put quotes around it") from None
    loader.flatten_mapping(node)
    values: dict[Any, Given] = {}
    for key_node, value_node in node.value:
        here = _place(source, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{here}: a key is expected, and there are brackets; was a template left unfilled?")
        key = loader.construct_object(key_node)
        if key in values:
            raise UserError(f"{here}: {key}: given twice, first at {values[key].place}")
        values[key] = Given(_given(loader, value_node, source).value, here)
    return Given(values, place)


def read_file(path: Path) -> Given:
    """As `read_text`, of a file that holds keys.

    Raises:
        UserError: also when the file cannot be read, or holds something else.
    """
    try:
        tree = read_text(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not isinstance(tree.value, dict):
        refuse(tree, "", f"expected keys and values, got {tree.value!r}")
    return tree


def write_file(values: dict[str, Any], path: Path) -> None:
    """Write plain values, in their order; the file is replaced whole or not at all."""
    text = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=119)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
