"""The embedded default: its questions, teachers and student, and a small run of it with its arms."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from compact.config import from_dict, load_recipe
from compact.demo import build
from compact.demo.arms import arms_table, compare_arms, run_arms
from compact.demo.pretraining import document
from compact.demo.questions import draw_problems
from compact.demo.teachers import LARGEST_SLIP, SLIP, TEACHERS, rationales, slip
from compact.errors import UserError
from compact.train import run


def problems(count: int, *, held: bool, seed: int = 0):
    return list(draw_problems(random.Random(seed), count, held=held))


def test_held_out_questions_share_no_calculation_with_those_trained_on_whatever_the_seeds():
    trained_on = {problem.content for seed in range(3) for problem in problems(300, held=False, seed=seed)}
    held_out = {problem.content for seed in range(3) for problem in problems(100, held=True, seed=seed)}
    assert trained_on and held_out and not trained_on & held_out


def test_three_teachers_calculate_rightly_and_the_misleading_one_ends_in_a_wrong_number():
    rng = random.Random(1)
    for problem in problems(200, held=False):
        told = {entry["teacher"]: entry["completion"] for entry in rationales(problem, rng)}
        assert list(told) == list(TEACHERS)
        for teacher, completion in told.items():
            stated = int(re.search(r"The answer is (-?\d+)\.$", completion)[1])
            assert (stated == problem.answer) == (teacher != "misleading")
            if teacher != "misleading":
                for left, sign, right, result in re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)", completion):
                    assert eval(f"{left}{sign}{right}") == int(result)


def test_slips_follow_the_declared_error_model():
    rng = random.Random(2)
    wrong = total = 0
    for problem in problems(400, held=False):
        for made in slip(problem, rng):
            right = eval(f"{made.left}{made.sign}{made.right}")
            wrong, total = wrong + (made.result != right), total + 1
            assert abs(made.result - right) <= LARGEST_SLIP
    assert SLIP < wrong / total < 1  # above SLIP: chains that end in the right number are drawn again


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    flags = ["--demo.questions", "24", "--demo.pretraining_steps", "10", "--evaluation.limit", "8"]
    flags += ["--evaluation.max_new_tokens", "8", "--demo.arms", "[uniform, misleading]", "--training.max_steps", "3"]
    recipe = load_recipe(["--run", str(folder), *flags])
    return folder, recipe, run_arms(recipe, run)


def test_the_default_ends_in_a_table_of_base_arms_and_itself(small, capsys):
    folder, recipe, content = small
    assert list(content["after"]) == ["compact", "uniform", "misleading"]
    assert json.loads((folder / "arms.json").read_text()) == json.loads(json.dumps(content))
    text = (folder / "arms.md").read_text()
    assert all(name in text for name in ("base", "equal weights", "misleading alone", "COMPACT", "Mean weights"))
    assert (folder / "arms" / "uniform" / "report.md").exists()
    student = build(recipe).student.model
    assert student.startswith(str(folder)) and build(recipe).evaluation.forgetting.keys() >= {"sums", "facts"}


def test_arms_can_be_added_to_a_finished_run_and_nothing_is_trained_twice(small):
    folder, recipe, content = small
    metrics = {file: file.stat().st_mtime_ns for file in folder.rglob("metrics.jsonl")}
    fewer = replace(recipe, demo=replace(recipe.demo, arms=["misleading"]))
    assert run_arms(fewer, run)["after"].items() <= content["after"].items()
    assert metrics == {file: file.stat().st_mtime_ns for file in folder.rglob("metrics.jsonl")}


def test_every_word_of_the_embedded_text_is_one_token_and_any_text_comes_back(small):
    _, recipe, _ = small
    tokenizer = AutoTokenizer.from_pretrained(build(recipe).student.model)
    rng = random.Random(3)
    for problem in problems(100, held=True):
        for text in (problem.prompt, *(entry["completion"] for entry in rationales(problem, rng))):
            assert len(tokenizer(text)["input_ids"]) == len(re.findall(r" ?[A-Za-z]+| ?[0-9]+|[^A-Za-z0-9]", text))
    strange = "Xylophones: 12345 (50%)\n  indented"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


def test_pretraining_asks_no_held_out_question():
    rng = random.Random(4)
    asked = {document(rng, lambda prompt, answer: (prompt, answer))[0] for _ in range(4000)}
    assert any("How many" in prompt for prompt in asked)
    assert not asked & {problem.prompt for problem in problems(4000, held=True)}


def test_the_table_says_what_was_not_reached():
    report = {
        "accuracy": {"held_out": {"n": 10, "split": "id", "before": 0.3, "after": 0.4, "changes": {}}},
        "alpha_mean": {"terse": 0.2, "misleading": 0.4, "verbose": 0.4},
    }
    report["accuracy"]["held_out"]["changes"] = {"standard_error": 0.1, "forgotten": 1}
    text = arms_table(compare_arms({"compact": report}))
    assert "**fewer than it should**" in text and "**is not the lowest" in text and "**above" in text
    report["accuracy"]["held_out"]["after"] = 0.6
    report["alpha_mean"] = {"terse": 0.5, "misleading": 0.1, "verbose": 0.4}
    assert "**" not in arms_table(compare_arms({"compact": report}))


def test_arms_of_other_questions_are_refused():
    with pytest.raises(UserError, match="demo.arms.*--demo.arms"):
        from_dict({"demo": {"arms": ["uniform"]}, "data": {"train": "mine.jsonl"}})
