"""A grid: what YAML says of a study, and the cells it means. Every mistake is named with its line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal

from compact import options
from compact.commandline import find, set_flags
from compact.config import Recipe, checked, embedded_recipes, read_recipe
from compact.errors import UserError
from compact.options import Given, as_given, option, refuse
from compact.strategies import STRATEGIES, own_strategy
from compact.yamlfile import read_file

GRIDS = Path(__file__).parent.parent / "grids"


@dataclass
class Grid:
    """The keys of a grid."""

    study: str = option("runs/study", "the study's folder; nothing is written outside it")
    recipe: str = option("gsm8k", "a recipe's file, or the name of an embedded one")
    set: dict[str, object] = option(dict, "recipe keys of every cell")
    settings: dict[str, object] = option(
        lambda: {"default": {}}, "name: recipe keys of a setting; skills: and folds: make its data"
    )
    methods: object = option(list, "names of known methods, or name: recipe keys; single:TEACHER is known")
    seeds: list[int] = option(lambda: [0], "of the runs", ge=0)
    order: Literal["seeds", "methods"] = option(
        "seeds",
        "seeds: all methods with the first seed, then the next; methods: the first method with all its seeds, …",
    )
    baseline: str = option("uniform", "the method that the others are compared with")
    parallel: int | None = option(None, "cells at once on a GPU; null: as many as fit", ge=1)
    keep_students: bool = option(
        True, "false: a finished cell's student is deleted, the first seed's after compact.analyze has seen it"
    )


@dataclass
class SkillsConfig:
    """`skills:` of a setting: questions by :mod:`compact.skills`."""

    questions: int = option(1000, "to train on", ge=8)
    held_out: int = option(400, "in each held-out file", ge=1)
    part: Literal["test", "validation"] = option("test", "validation: for choices that the test must not see")
    misleading: bool = option(True, "whether one of the four teachers misleads")
    one_style: bool = option(False, "whether all of them write in the same style")
    held_out_wording: int = option(3, "of each skill's four wordings, 0 to 3", ge=0, le=3)
    gym: int = option(0, "questions by reasoning-gym; 0: none", ge=0)
    fresh: bool = option(True, "whether each seed has training questions of its own")


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    setting: str
    method: str
    seed: int
    fold: int | None
    tree: Given  # the recipe's, without what depends on files of the study
    skills: SkillsConfig | None
    folds: int
    merge: int  # rounds of branches that are merged; 0: an ordinary run

    @property
    def name(self) -> str:
        fold = "" if self.fold is None else f"-fold-{self.fold}"
        return f"{self.setting}/{_folder(self.method)}/seed-{self.seed}{fold}"


def _folder(method: str) -> str:
    return method.replace(":", "-").replace("/", "-")  # a teacher may be named as on the hub


def known_methods() -> dict[str, Given]:
    """The catalogue, compact/grids/methods.yaml: name → recipe keys."""
    return read_file(GRIDS / "methods.yaml").value


def embedded_grids() -> list[str]:
    return sorted(path.stem for path in GRIDS.glob("*.yaml") if path.stem != "methods")


def load_grid(argv: list[str]) -> tuple[Grid, list[Cell], Given]:
    """The grid of a command line `GRID [--key value …]`, its cells in the order in which they are run, and its tree.

    Raises:
        UserError: an unknown key, method or recipe key, with file, line and the nearest name.
    """
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name a grid: a YAML file, or one of {', '.join(embedded_grids())}")
    path = Path(argv[0])
    if not path.is_file() and argv[0] in embedded_grids():
        path = GRIDS / f"{argv[0]}.yaml"
    if path.is_dir():
        raise UserError(f"{argv[0]} is a folder: name a grid, a YAML file; a study's folder is given with --study")
    if not path.is_file():
        near = options.nearest(argv[0], embedded_grids())
        raise UserError(f"{argv[0]}: no such file, nor an embedded grid ({', '.join(embedded_grids())}){near}")
    tree = read_file(path)
    if isinstance(tree.value.get("methods", Given(None)).value, list):  # so that a flag can add one
        tree.value["methods"] = _named("methods", tree.value["methods"])
    own = dict(tree.value)
    set_flags(Grid, tree, argv[1:])  # --set.KEY value gives a recipe key to every cell
    for key in ("methods", "settings"):
        _choose(tree, own, key)
    grid = options.build(Grid, tree)
    methods = _methods(tree.value.get("methods", Given([])))
    if grid.baseline not in methods:
        place = tree.value.get("baseline", Given(None, str(path)))
        refuse(place, "baseline", f"{grid.baseline!r} is none of the methods: {', '.join(methods)}")
    if not grid.seeds or len(set(grid.seeds)) < len(grid.seeds):
        refuse(tree.value["seeds"], "seeds", f"{grid.seeds}: at least one, each once")
    if not grid.settings:
        refuse(tree.value["settings"], "settings", "name at least one, or leave the key out")
    for name in (*methods, *grid.settings):
        if ("/" in name and not name.startswith("single:")) or name.startswith("."):
            refuse(tree, name, "is a folder's name too: letters, digits, : . _ -")
    by_folder: dict[str, str] = {}
    for name in methods:
        if (other := by_folder.setdefault(_folder(name), name)) != name:
            problem = f"{other} and {name} would share the folder {_folder(name)}: rename one"
            refuse(tree.value["methods"], "methods", problem)
    cells = _cells(grid, tree, methods)
    _check(cells)
    return grid, cells, tree


def _choose(tree: Given, own: Mapping[str, Given], key: str) -> None:
    """Names on the command line of what the grid's own file says under `key` choose from it."""
    given = tree.value.get(key, Given(None))
    if isinstance(given.value, str):
        refuse(given, key, f"{given.value!r} is no list: write [{given.value}]")
    there = own[key].value if key in own else {}
    if not isinstance(given.value, list) or not isinstance(there, dict):
        return
    there = {str(name): item for name, item in there.items()}
    names = [str(name) for name in given.value]  # whatever was given: it may be no name
    for name in names:
        if key == "settings" and name not in there:
            near = options.nearest(name, there)
            refuse(given, key, f"{name!r} is no setting of the grid ({', '.join(there) or 'it has none'}){near}")
    named = _named(key, given).value
    tree.value[key] = Given({name: there.get(name, nothing) for name, nothing in named.items()}, given.place)


def _named(key: str, names: Given) -> Given:
    """A mapping of a list of names, which say nothing."""
    if twice := [name for name in names.value if names.value.count(name) > 1]:
        refuse(names, key, f"{twice[0]!r} is there twice")
    return Given({str(name): Given(None, names.place) for name in names.value}, names.place)


def _meant(key: str, name: str, given: Given) -> str:
    """How a name in `methods` or `settings` that is followed by no mapping would be followed by one."""
    name, *path = name.split(".")
    keys = str(given.value) if path else "{weights.temperature: 0.3}"
    for part in reversed(path):
        keys = f"{{{part}: {keys}}}"
    return f"--{key}.{name} '{keys}'" if given.place.startswith("--") else f"{name}: {keys}"


def _methods(given: Given) -> dict[str, Given]:
    """Name → all recipe keys, a known method's own and those over them."""
    known, value = known_methods(), given.value
    if not isinstance(value, dict) or not value:
        refuse(given, "methods", "name at least one: a list of names, or name: recipe keys")
    methods = {}
    for name, keys in value.items():
        name, own = str(name), keys.value
        if own is not None and not isinstance(own, dict):
            refuse(keys, f"methods.{name}", f"a method is a mapping, such as {_meant('methods', name, keys)}")
        if name.startswith("single:"):
            teacher = name.partition(":")[2]
            base = as_given({"strategy": "single", "weights.teacher": teacher}, keys.place).value
        elif own is None and name not in known:
            near = options.nearest(name, known)
            refuse(keys, "methods", f"{name!r} is no known method ({', '.join(known)}, single:TEACHER){near}")
        else:
            base = known[name].value if name in known else {}
        methods[name] = Given({**base, **(own or {})}, keys.place)  # a known method's keys, and those over them
    return methods


def _cells(grid: Grid, tree: Given, methods: Mapping[str, Given]) -> list[Cell]:
    if grid.recipe not in embedded_recipes() and not Path(grid.recipe).is_file():
        read_recipe(grid.recipe)  # says what is wrong with the name
    common = tree.value.get("set", Given({}))
    settings = tree.value.get("settings", Given({"default": Given({})})).value
    cells = []
    for seed in grid.seeds:
        for setting, keys in settings.items():
            if not isinstance(keys.value, (dict, type(None))):
                refuse(
                    keys, f"settings.{setting}", f"a setting is a mapping, such as {_meant('settings', setting, keys)}"
                )
            own = dict(keys.value or {})
            skills = _skills(own.pop("skills", None))
            folds = _whole(own.pop("folds", None), "folds", least=2)
            if skills is not None and folds:
                refuse(keys, f"settings.{setting}", "skills makes the held-out questions, and so does folds: name one")
            _refuse_made(common.value, skills is not None, bool(folds))
            for fold in range(folds) if folds else [None]:
                for method, changes in methods.items():
                    theirs = dict(changes.value)
                    merge = _whole(theirs.pop("merge", None), "merge", least=1)
                    _refuse_made(own | theirs, skills is not None, bool(folds))
                    if merge and (strategy := theirs.get("strategy", Given("uniform"))).value != "uniform":
                        refuse(strategy, "strategy", "merge trains a student for each teacher alone; leave it out")
                    recipe = read_recipe(grid.recipe)
                    for overrides in (common.value, own, theirs, {"seed": Given(seed)}):
                        overlay(recipe, overrides)
                    _refuse_unread(theirs, recipe, method)
                    cells.append(Cell(str(setting), method, seed, fold, recipe, skills, folds, merge))
    if grid.order == "methods":  # stable: settings, seeds and folds stay in their order
        cells.sort(key=lambda cell: [*methods].index(cell.method))
    return cells


def _refuse_unread(keys: Mapping[str, Given], recipe: Given, method: str) -> None:
    """A method's keys of MIND under another strategy: it would not be what it is called."""
    given = recipe.value.get("strategy")
    strategy = Recipe().strategy if given is None else given.value
    for key, item in keys.items():
        if key.partition(".")[0] == "mind" and strategy in STRATEGIES and strategy != "mind":
            refuse(item, key, f"strategy {strategy}, which {method} has, does not read it: add 'strategy: mind'")


def _refuse_made(given: Mapping[str, Given], skills: bool, folds: bool) -> None:
    """Keys that the study would put its own values in place of."""
    tree = Given({})
    overlay(tree, given)
    made = {"run": "study names the folder", "seed": "seeds names them", "demo.arms": "methods names what is compared"}
    made |= {key: "skills makes it" for key in ("data.train", "data.held_out", "evaluation.limit") if skills}
    made |= {"data.held_out": "folds makes it"} if folds else {}  # a limit of other tasks may be larger than a fold
    for key, why in made.items():
        if (item := at(tree, key)) is not None:
            refuse(item, key, f"is not a grid's to set: {why}")


def _check(cells: Sequence[Cell]) -> None:
    """Every recipe, as far as it is known before its data are made.

    Raises:
        UserError: what only the user can give and has not, a wrong type, a value out of range, or a contradiction.
    """
    kinds: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        kinds.setdefault((cell.setting, cell.method), cell)
    for cell in kinds.values():
        tree = _copy(cell.tree)
        if cell.skills is not None:
            overlay(tree, {"data.train": Given("train.jsonl"), "data.held_out": Given("held_out.jsonl")})
        for key, item in _leaves(tree):
            if isinstance(item.value, options.Required):
                refuse(item, key, f"is yours to give ({item.value}): --set.{key} VALUE")
        try:
            recipe = checked(tree)
        except UserError as error:
            raise UserError(f"{cell.setting}, {cell.method}: {error}") from None
        if ":" in recipe.strategy:
            own_strategy(recipe.strategy)
        if cell.merge and recipe.data.train is None:
            raise UserError(f"{cell.setting}, {cell.method}: merge needs a file of questions, data.train")


def _leaves(tree: Given, prefix: str = "") -> Iterator[tuple[str, Given]]:
    for name, item in tree.value.items():
        if isinstance(item.value, dict):
            yield from _leaves(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def at(tree: Given, key: str) -> Given | None:
    """What a tree holds at a key with dots."""
    found: Given | None = tree
    for name in key.split("."):
        found = found.value.get(name) if found is not None and isinstance(found.value, dict) else None
    return found


def overlay(tree: Given, overrides: Mapping[str, Given]) -> None:
    """Put recipe keys, with dots or nested, over a recipe's tree.

    Raises:
        UserError: a key that recipes do not have.
    """
    for name, item in overrides.items():
        try:
            keys, hint = find(Recipe, f"--{name}")
        except UserError as error:
            raise UserError(f"{item.place}: {str(error).removeprefix('--')}") from None
        node = tree.value
        for key in keys[:-1]:
            if key not in node or not isinstance(node[key].value, dict):
                node[key] = Given({}, item.place)
            node = node[key].value
        section = is_dataclass(options.optional(hint)[0]) or keys == ["training"]
        if isinstance(item.value, dict) and section:
            overlay(tree, {f"{name}.{inner}": value for inner, value in item.value.items()})
        else:
            node[keys[-1]] = _copy(item)


def _copy(given: Given) -> Given:
    """Cells must not share the dicts that later keys are put into."""
    if isinstance(given.value, dict):
        return Given({name: _copy(as_given(item)) for name, item in given.value.items()}, given.place)
    return given


def _skills(given: Given | None) -> SkillsConfig | None:
    if given is None:
        return None
    return options.build(SkillsConfig, Given(given.value or {}, given.place), "skills")


def _whole(given: Given | None, key: str, least: int) -> int:
    if given is None:
        return 0
    if not isinstance(given.value, int) or isinstance(given.value, bool) or given.value < least:
        refuse(given, key, f"{given.value!r} is not a whole number of at least {least}")
    return given.value


def grid_help() -> str:
    lines = [
        "python -m compact.study GRID [--price] [--minutes N] [--key value …]",
        "",
        "--price: run the first cell alone, and say what the others would take.",
        "--minutes N: start no cell that would not be finished by then; the same command goes on later.",
        f"GRID: a YAML file, or {', '.join(embedded_grids())}.",
    ]
    lines += [f"  {spec.name}: {spec.metadata['help']}{_default(spec)}" for spec in fields(Grid)]
    lines += ["", "Keys of a setting in the file: folds (held-out parts), recipe keys, and skills, whose own are:"]
    lines += [f"  {spec.name}: {spec.metadata['help']}{_default(spec)}" for spec in fields(SkillsConfig)]
    lines += ["", f"Known methods: {', '.join(known_methods())}, single:TEACHER."]
    return "\n".join(lines)


def _default(spec: Field) -> str:
    return "" if spec.default is MISSING or spec.default is None else f" ({json.dumps(spec.default)})"
