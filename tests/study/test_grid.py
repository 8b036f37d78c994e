"""Grids of studies: their mistakes, their cells in order, folds, and the grids of the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compact import options
from compact.data import load_questions
from compact.errors import UserError
from compact.study import runner
from compact.study.data import check_folds, recipe_of
from compact.study.grid import embedded_grids, load_grid
from tests.study_cases import grid_file
from tests.toy_run import toy_rows, write_rows


def test_a_grid_may_put_a_method_s_seeds_first(toy, tmp_path):
    path = grid_file(tmp_path, toy, methods=["uniform", "compact"], seeds=[1, 0], order="methods")
    names = [one.name for one in load_grid([str(path)])[1]]
    assert names == [f"few/{method}/seed-{seed}" for method in ("uniform", "compact") for seed in (1, 0)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"methods": ["compcat", "uniform"]}, r"grid.yaml:\d+: methods: 'compcat' is no known method.*mean compact\?"),
        ({"methods": {"mine": {"strtegy": "uniform"}, "uniform": None}}, r"grid.yaml:\d+: .*strtegy.*mean strategy"),
        (
            {"methods": {"mine": 0.3, "uniform": None}},
            r"grid.yaml:\d+: methods.mine: a method is a mapping, such as mine: {we",
        ),
        ({"sedes": [1]}, r"grid.yaml:\d+: sedes: unknown key.*mean seeds"),
        ({"baseline": "compcat"}, r"grid.yaml:\d+: baseline: 'compcat' is none of the methods"),
        ({"seeds": [0, 0]}, "seeds: .*each once"),
        ({"recipe": "skils"}, "skils: no such file.*mean skills"),
        ({"settings": {"a": {"skills": {"questoins": 9}}}}, "skills.questoins: unknown key.*skills.questions"),
        (
            {"settings": {"a.skills.questions": 9}},
            r"settings.a.skills.questions: .* such as a: {skills: {questions: 9}}",
        ),
        ({"settings": {"a": {"folds": 1}}}, "folds: 1 is not a whole number of at least 2"),
        ({"methods": []}, "methods: name at least one"),
        ({"methods": ["uniform", "uniform"]}, "methods: 'uniform' is there twice"),
        ({"methods": {"uniform": None, "a-b": {}, "a:b": {}}}, "methods: a-b and a:b would share the folder a-b"),
        ({"methods": {"uniform": {"merge": True}}}, "merge: True is not a whole number"),
        ({"methods": {"uniform": {"run": "x"}}}, r"grid.yaml:\d+: run: is not .* to set: study names the folder"),
        (
            {"settings": {"a": {"skills": {}, "data": {"train": "x.jsonl"}}}},
            r"grid.yaml:\d+: data.train: is not .* to set: skills makes it",
        ),
        (
            {"methods": {"uniform": None, "broken": {"weights.temperature": -1}}},
            r"few, broken: .*grid.yaml:\d+: weights.temperature: -1 is out of range",
        ),
        ({"set": {"weights.teacher": "terse"}}, "few, compact: weights.teacher: only strategy single reads it"),
        ({"settings": {}}, "settings: name at least one"),
        ({"methods": "compact"}, r"grid.yaml:\d+: methods: 'compact' is no list: write \[compact\]"),
        ({"set": {"demo.arms": ["uniform"]}}, "demo.arms: is not a grid's to set: methods names what is compared"),
        (
            {"settings": {"a": {"skills": {}, "folds": 2}}},
            "settings.a: skills makes the held-out questions, and so does",
        ),
    ],
)
def test_a_mistaken_grid_is_named_with_its_line(toy, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_grid([str(grid_file(tmp_path, toy, **changes))])


def test_what_only_the_user_can_give_is_asked_for_by_its_flag():
    with pytest.raises(UserError, match=r"skills.yaml:\d+: student.model: is yours .*: --set.student.model VALUE"):
        load_grid(["skills"])


@pytest.mark.parametrize("content", ["[]", "- a", "hello"])
def test_a_file_that_holds_no_keys_is_no_grid(tmp_path, content):
    (tmp_path / "grid.yaml").write_text(content)
    with pytest.raises(UserError, match=r"grid.yaml:1: expected keys and values"):
        load_grid([str(tmp_path / "grid.yaml")])
    with pytest.raises(UserError, match="is a folder: name a grid"):
        load_grid([str(tmp_path)])


def test_names_on_the_command_line_choose_from_the_grid(toy, tmp_path):
    mine = {"weights": {"temperature": 3}}
    path = grid_file(
        tmp_path, toy, methods={"uniform": None, "mine": mine}, settings={"a": {"skills": {}}, "b": {"skills": {}}}
    )
    _, cells, tree = load_grid([str(path), "--methods", "[mine, compact]", "--settings", "[b]", "--baseline", "mine"])
    assert [one.name for one in cells] == ["b/mine/seed-0", "b/compact/seed-0"]
    assert options.plain(cells[0].tree)["weights"]["temperature"] == 3
    assert options.plain(tree)["methods"] == {"mine": mine, "compact": None}
    with pytest.raises(UserError, match=r"--settings: 'bb' is no setting of the grid \(a, b\); did you mean b\?"):
        load_grid([str(path), "--settings", "[bb]"])
    for flags, said in [
        (["--methods", "[{mine: 3}]"], "--methods: .* is no known method"),
        (["--methods", "mine"], r"--methods: 'mine' is no list: write \[mine\]"),
        (["--settings", "b"], r"--settings: 'b' is no list: write \[b\]"),
        (["--seeds", "0"], r"--seeds: expected a list .*, got 0; write \[0\]"),
        (
            ["--settings.b.data.holdout", "0.2"],
            "a setting is a mapping, such as --settings.b '{data: {holdout: 0.2}}'",
        ),
        (["--methods.cold.weights.temperature", "3"], "such as --methods.cold '{weights: {temperature: 3}}'"),
    ]:
        with pytest.raises(UserError, match=said):
            load_grid([str(path), *flags])


@pytest.mark.parametrize("methods", [["uniform", "compact"], {"uniform": None, "compact": {}}])
def test_a_flag_adds_a_method_to_those_of_the_grid(toy, tmp_path, methods):
    path = grid_file(tmp_path, toy, methods=methods)
    _, cells, _ = load_grid([str(path), "--methods.cold", "{weights.temperature: 0.3}"])
    assert [one.method for one in cells] == ["uniform", "compact", "cold"]
    assert options.plain(cells[2].tree)["weights"]["temperature"] == 0.3


def test_the_untrained_student_is_asked_once_whatever_methods_and_seeds_come_later(toy, tmp_path):
    grid, cells, _ = load_grid([str(grid_file(tmp_path, toy, methods=["uniform"]))])
    assert [job.name for job in runner._jobs(grid, cells, Path(grid.study))] == ["base of few", "few/uniform/seed-0"]
    other, cells, _ = load_grid([str(grid_file(tmp_path, toy, methods=["no_consensus", "uniform"])), "--seeds", "[5]"])
    again = runner._jobs(other, cells, Path(grid.study))
    assert [job.name for job in again] == ["base of few", "few/no_consensus/seed-5", "few/uniform/seed-5"]
    assert all(job.needs is again[0] for job in again[1:])


def test_keys_under_a_known_method_are_put_over_its_own(toy, tmp_path):
    methods = {
        "uniform": {"sft_reduction": "token"},
        "mind": {"mind": {"threshold": 0.5}},
        "single:verbose": {"sft_reduction": "sum"},
    }
    path = grid_file(tmp_path, toy, methods=methods)
    of = {one.method: options.plain(one.tree) for one in load_grid([str(path)])[1]}
    assert of["uniform"]["strategy"] == "uniform" and of["uniform"]["divergence"]["weight"] == 0
    assert of["uniform"]["sft_reduction"] == "token"
    assert of["mind"]["strategy"] == "mind" and of["mind"]["mind"]["threshold"] == 0.5
    assert of["single:verbose"]["weights"]["teacher"] == "verbose" and of["single:verbose"]["sft_reduction"] == "sum"
    with pytest.raises(UserError, match=r"grid.yaml:\d+: seed: is not a grid's to set: seeds names them"):
        load_grid([str(grid_file(tmp_path, toy, methods={"uniform": {"seed": 1}}))])
    with pytest.raises(UserError, match=r"evaluation.limit: is not a grid's to set: skills makes it"):
        load_grid([str(path), "--set.evaluation.limit", "3"])
    merged = {"uniform": None, "merged": {"strategy": "mind", "merge": 1}}
    with pytest.raises(UserError, match="strategy: merge trains a student for each teacher alone"):
        load_grid([str(grid_file(tmp_path, toy, methods=merged))])
    embedded = {"recipe": "demo", "settings": {"embedded": {}}, "methods": ["uniform", "merge_of_thought"]}
    with pytest.raises(UserError, match="embedded, merge_of_thought: merge needs a file of questions, data.train"):
        load_grid([str(grid_file(tmp_path, toy, **embedded))])


@pytest.mark.parametrize(
    "methods, said",
    [
        (
            {"uniform": {}, "mind_half": {"mind.threshold": 0.5}},
            r"grid.yaml:\d+: mind.threshold: strategy compact, which ",
        ),
        ({"uniform": {}, "mine": {"strategy": "nowhere_at_all:X"}}, "strategy: there is no module nowhere_at_all"),
    ],
)
def test_what_a_method_is_not_is_said_before_anything_runs(toy, tmp_path, methods, said):
    with pytest.raises(UserError, match=said):
        load_grid([str(grid_file(tmp_path, toy, methods=methods))])


def test_a_teacher_named_as_on_the_hub_has_a_folder(toy, tmp_path):
    cells = load_grid([str(grid_file(tmp_path, toy, methods=["uniform", "single:org/wordy"]))])[1]
    assert cells[1].name == "few/single-org-wordy/seed-0" and cells[1].method == "single:org/wordy"


def test_a_task_does_not_take_the_place_of_one_that_skills_makes(toy, tmp_path):
    path = grid_file(tmp_path, toy, set={"evaluation.tasks.wordings": "mine.jsonl"})
    with pytest.raises(UserError, match="evaluation.tasks.wordings: skills makes a task of that name"):
        recipe_of(load_grid([str(path)])[1][0], tmp_path / "study")


def test_a_section_is_put_over_key_by_key_and_a_mapping_of_names_as_a_whole(toy, tmp_path):
    given = {"evaluation.tasks.svamp": "s.jsonl", "weights.fixed": {"a": 1, "b": 1}, "training": {"max_steps": 3}}
    given["strategy"] = "fixed"
    methods = {"two": {"divergence.weight": 0}, "one": {"weights": {"fixed": {"a": 1}}, "evaluation.tasks": {}}}
    path = grid_file(tmp_path, toy, set=given, methods=methods, baseline="two")
    two, one = (options.plain(cell.tree) for cell in load_grid([str(path)])[1])
    assert two["weights"]["fixed"] == {"a": 1, "b": 1} and two["evaluation"]["tasks"] == {"svamp": "s.jsonl"}
    assert one["weights"]["fixed"] == {"a": 1} and one["evaluation"]["tasks"] == {}
    for tree in (two, one):
        assert tree["training"]["max_steps"] == 3 and tree["training"]["per_device_train_batch_size"] == 2


def test_a_line_of_yaml_adds_a_method_and_flags_reach_every_cell(toy, tmp_path):
    path = grid_file(tmp_path, toy, methods={"uniform": None, "hot": {"weights": {"temperature": 3}}})
    grid, cells, _ = load_grid([str(path), "--seeds", "[3, 4]", "--set.training.learning_rate", "0.5"])
    assert [cell.name for cell in cells] == [f"few/{m}/seed-{s}" for s in (3, 4) for m in ("uniform", "hot")]
    recipe = recipe_of(cells[1], tmp_path / "study")
    assert recipe.weights.temperature == 3 and recipe.training["learning_rate"] == 0.5 and recipe.seed == 3
    assert Path(recipe.data.train).name == "train-3.jsonl"
    held_out = Path(recipe.data.held_out).read_bytes()
    assert held_out == Path(recipe_of(cells[3], tmp_path / "study").data.held_out).read_bytes()


def test_folds_hold_every_question_out_once(toy, tmp_path):
    write_rows(tmp_path / "questions.jsonl", toy_rows(11))
    path = grid_file(
        tmp_path,
        toy,
        settings={"f": {"folds": 3}},
        methods=["uniform"],
        set={"data.train": str(tmp_path / "questions.jsonl")},
    )
    _, cells, _ = load_grid([str(path)])
    held = []
    for one in cells:
        recipe = recipe_of(one, tmp_path / "study")
        parts = [
            [json.loads(line)["prompt"] for line in Path(file).read_text().splitlines()]
            for file in (recipe.data.train, recipe.data.held_out)
        ]
        assert not set(parts[0]) & set(parts[1]) and len(parts[0]) + len(parts[1]) == 11
        held += parts[1]
    assert len(cells) == 3 and sorted(held) == sorted(row["prompt"] for row in toy_rows(11))


def test_folds_of_the_long_form_keep_a_question_s_rationales_together(toy, tmp_path):
    rows = toy_rows(11)
    long = [{**r, "prompt": row["prompt"], "answer": row["answer"]} for row in rows for r in row["rationales"]]
    file = write_rows(tmp_path / "questions.jsonl", long)
    path = grid_file(tmp_path, toy, settings={"f": {"folds": 3}}, methods=["uniform"], set={"data.train": str(file)})
    held = []
    for one in load_grid([str(path)])[1]:
        recipe = recipe_of(one, tmp_path / "study")
        held += load_questions(recipe.data.held_out)[0].to_list()
        assert recipe.evaluation.limit == 400 and len(load_questions(recipe.data.train)[0]) in (7, 8)
    assert sorted(row["prompt"] for row in held) == sorted(row["prompt"] for row in rows)
    assert sum(len(row["rationales"]) for row in held) == len(long)


def test_a_limit_below_what_a_fold_holds_out_is_refused_where_the_grid_gives_it(toy, tmp_path):
    file = write_rows(tmp_path / "questions.jsonl", toy_rows(11))
    given = {"settings": {"f": {"folds": 2}}, "methods": ["uniform"]}
    data = {"data.train": str(file)}

    def check(**limit):
        grid, cells, _ = load_grid([str(grid_file(tmp_path, toy, set={**data, **limit}, **given))])
        check_folds(grid, cells)

    check(**{"evaluation.limit": 6})
    with pytest.raises(
        UserError, match=r"grid.yaml:\d+: evaluation.limit: 5 is less than the 6 questions that a fold"
    ):
        check(**{"evaluation.limit": 5})
    write_rows(file, toy_rows(1000))
    check()  # the recipe's own is 400


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"questions.jsonl:2: "),
        ('{"rationales": []}', r"folds: .*questions.jsonl:2 must be one question, with its prompt"),
        ('{"prompt": "q?"}', r"folds: .*questions.jsonl:2 must be one question, with its prompt"),
    ],
)
def test_a_row_that_no_fold_can_have_is_named(toy, tmp_path, line, said):
    file = write_rows(tmp_path / "questions.jsonl", toy_rows(3))
    first, second, third = file.read_text().splitlines()
    file.write_text("\ufeff" + "\n".join([first, line, third]) + "\n")
    path = grid_file(tmp_path, toy, settings={"f": {"folds": 2}}, methods=["uniform"], set={"data.train": str(file)})
    grid, cells, _ = load_grid([str(path)])
    with pytest.raises(UserError, match=said):
        check_folds(grid, cells)
    with pytest.raises(UserError, match=said):
        recipe_of(cells[0], tmp_path / "study")
    file.write_text("\ufeff" + "\n".join([first, second, third]) + "\n")
    assert recipe_of(cells[0], tmp_path / "study").data.held_out is not None


@pytest.mark.parametrize("name", embedded_grids())
def test_the_grids_of_the_package_are_grids(name, tmp_path):
    flags = ["--set.student.model", "x", *(["--set.data.train", "y.jsonl"] if name == "gsm8k" else [])]
    _, cells, _ = load_grid([name, *flags])
    assert cells and all(cell.tree.value["student"].value["model"].value == "x" for cell in cells)
