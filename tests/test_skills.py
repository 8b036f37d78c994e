"""The skills: right derivations, parts that share nothing, teachers that err as declared."""

from __future__ import annotations

import json
import random
import re
import sys
from types import SimpleNamespace

import pytest

from compact.data import load_questions
from compact.errors import UserError
from compact.results import TaskResult, store_results
from compact.skills import styles
from compact.skills.__main__ import main
from compact.skills.files import gym_rows, write_skills
from compact.skills.questions import HELD_OUT_WORDING, PARTS, TAUGHT, UNTAUGHT, WEEK, draw_questions, trained_wordings
from compact.skills.teachers import TEACHERS, rationale, team

ALL = {**TAUGHT, **UNTAUGHT}
TRAINED = trained_wordings()


def drawn(count: int, part: str, skills=TAUGHT, wordings=TRAINED, seed: int = 0):
    return draw_questions(random.Random(seed), count, part=part, skills=skills, wordings=wordings)


def test_every_equation_of_a_right_derivation_holds():
    checked = 0
    for question in drawn(300, "train", ALL):
        lines = question.derive(lambda value: value)
        for line in lines:
            if match := re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line.equation):
                left, sign, right, result = match.groups()
                assert eval(f"{left} {sign} {right}") == int(result), (question.prompt, line)
                checked += 1
            elif match := re.fullmatch(r"(\w+) \+ (\d+) = (\w+)", line.equation):
                assert WEEK[(WEEK.index(match[1]) + int(match[2])) % 7] == match[3]
        assert lines[-1].result == question.answer
        if question.kind == "number" and question.skill not in ("order", "weekday"):
            assert question.answer == lines[-1].equation.rsplit("= ", 1)[1]
    assert checked > 400


def test_the_order_of_people_follows_from_what_is_said():
    for question in drawn(24, "train", {"order": TAUGHT["order"]}, (0,)):
        pairs = re.findall(r"(\w+) is \w+ than (\w+)\.", question.prompt)
        above = {
            name: sum(_over(name, other, pairs) for other in {x for p in pairs for x in p})
            for p in pairs
            for name in p
        }
        ranked = sorted(above, key=lambda name: -above[name])
        place = 2 if "second" in question.prompt else 3
        assert question.answer == ranked[place - 1]


def _over(one: str, other: str, pairs) -> bool:
    below = [b for a, b in pairs if a == one]
    return other in below or any(_over(name, other, pairs) for name in below)


def test_no_content_is_asked_in_two_parts_and_held_out_wordings_and_tasks_are_not_trained_on():
    contents = {part: {(q.skill, q.content) for q in drawn(200, part, seed=7)} for part in PARTS}
    for one in PARTS:
        for other in PARTS:
            assert one == other or not contents[one] & contents[other]
    trained = drawn(300, "train")
    assert {q.wording for q in trained} == set(TRAINED)
    assert {q.wording for q in drawn(100, "test", wordings=(HELD_OUT_WORDING,))} == {HELD_OUT_WORDING}
    assert not TAUGHT.keys() & UNTAUGHT.keys()


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_err_as_often_as_declared_and_close_with_what_they_found(name):
    rng, wrong, declared = random.Random(3), 0, 0.0
    questions = drawn(400, "train", seed=3)
    for question in questions:
        told = rationale(name, question, rng)
        assert told["completion"].endswith(f"\nThe answer is {told['answer']}.")
        wrong += told["answer"] != question.answer
        declared += TEACHERS[name].error_rate(question.skill)
    spread = (declared * (1 - declared / 400)) ** 0.5
    assert abs(wrong - declared) <= 3 * spread + 1e-9
    assert (name == "misleading") == (wrong == 400)


def test_half_of_the_misleading_rationales_stop_a_step_early():
    rng = random.Random(4)
    early = 0
    questions = [q for q in drawn(400, "train", seed=4) if q.skill in ("change", "people", "boxes", "shop", "digits")]
    for question in questions:
        lines = question.derive(lambda value: value)
        early += rationale("misleading", question, rng)["answer"] == lines[-2].result
    assert 0.4 < early / len(questions) < 0.6


def test_the_files_are_questions_whose_held_out_part_no_seed_changes(tmp_path, capsys):
    first = write_skills(tmp_path / "a", questions=40, held_out=16, seed=0)
    second = write_skills(tmp_path / "b", questions=40, held_out=16, seed=1)
    for name in ("held_out", "wordings", "tasks"):
        assert first[name].read_bytes() == second[name].read_bytes()
    assert first["train"].read_bytes() != second["train"].read_bytes()
    rows, report = load_questions(str(first["train"]))
    assert report.teachers == team(True) and report.questions["used"] == 40 and not report.rationales["refused"]
    flagged = {r["teacher"] for row in rows for r in row["rationales"] if r["wrong"]}
    assert "misleading" in flagged
    stated = [json.loads(line) for line in first["train"].read_text().splitlines()]
    for row, told in zip(rows, stated):
        for read, written in zip(row["rationales"], told["rationales"]):
            assert read["wrong"] == (written["answer"] != told["answer"]), (told["prompt"], written)
    assert main([str(tmp_path / "c"), "--questions", "16", "--held_out", "8", "--honest"]) == 0
    assert "train.jsonl" in capsys.readouterr().out
    assert load_questions(str(tmp_path / "c" / "train.jsonl"))[1].teachers == team(False)


@pytest.mark.parametrize("held_out", [0, 1, 3])
def test_the_wording_that_is_asked_for_is_held_out_of_all_that_is_trained_on(held_out, tmp_path):
    ask = {"questions": 240, "held_out": 160}
    files = write_skills(tmp_path / "a", **ask, held_out_wording=held_out)

    def prompts(name: str) -> set[str]:
        return {json.loads(line)["prompt"] for line in files[name].read_text().splitlines()}

    digits = ("What is the sum of the digits", "Add up the digits", "Take the number", "A lock shows")
    weekday = ("Today is", "If today is", "It is", "A letter sent on")
    for forms in (digits, weekday):
        for form in forms:
            unseen = form == forms[held_out]
            assert any(prompt.startswith(form) for prompt in prompts("wordings")) == unseen
            for name in ("train", "held_out"):
                assert any(prompt.startswith(form) for prompt in prompts(name)) != unseen
    usual = write_skills(tmp_path / "b", **ask)
    assert files["tasks"].read_bytes() == usual["tasks"].read_bytes()
    assert (files["train"].read_bytes() == usual["train"].read_bytes()) == (held_out == 3)
    with pytest.raises(UserError, match="wordings 0 to 3"):
        write_skills(tmp_path / "c", **ask, held_out_wording=4)


def test_more_questions_than_there_are_and_a_missing_package_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there are not 300 different questions of the test part: ask for \d"):
        drawn(300, "test", {"weekday": TAUGHT["weekday"]}, (0,))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        write_skills(tmp_path, questions=8, held_out=8, gym=4)


def test_validation_asks_nothing_that_the_test_does(monkeypatch):
    """Generators have few questions: another seed may draw the same."""

    def create_dataset(name, size, seed, **_):
        return [{"question": f"{name}: {(seed + index) % 50}", "answer": "1"} for index in range(size)]

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    test, validation = ({row["prompt"] for row in gym_rows(10, part)} for part in ("test", "validation"))
    assert len(test) == len(validation) == 10 and not test & validation


def test_a_folder_of_other_questions_is_not_taken_for_these(tmp_path, capsys):
    few = [str(tmp_path / "a"), "--held_out", "8"]
    assert main([*few, "--questions", "16"]) == 0 == main([*few, "--questions", "16"])
    assert main([*few, "--questions", "24"]) == 2
    assert "train.jsonl was made by" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*few, "--questions", "0"])


@pytest.mark.parametrize("text", ["", "The answer is 5.", "I cannot tell"])
def test_an_answer_without_a_derivation_has_no_teacher_s_style(text):
    assert styles.style_of(text) == "other"


@pytest.mark.parametrize("name", ["terse", "verbose", "numbered", "misleading"])
def test_a_rationale_s_style_is_its_teacher_s(name):
    rng = random.Random(5)
    questions = [*drawn(200, "train", seed=5), *drawn(60, "test", skills=UNTAUGHT, wordings=(0,))]
    assert {styles.style_of(rationale(name, question, rng)["completion"]) for question in questions} == {name}


def test_with_one_style_nothing_but_the_calculations_tells_teachers_apart(tmp_path):
    file = write_skills(tmp_path, questions=80, held_out=8, one_style=True)["train"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    told = [(row["answer"], one) for row in rows for one in row["rationales"]]
    assert {styles.style_of(one["completion"]) for _, one in told} == {"verbose"}
    assert all(one["answer"] != answer for answer, one in told if one["teacher"] == "misleading")
    right = [{one["completion"] for one in row["rationales"] if one["answer"] == row["answer"]} for row in rows]
    assert max(map(len, right)) == 1


def test_styles_are_counted_over_finished_seeds_and_printed_from_the_counts_alone(tmp_path, capsys):
    for seed, answers in enumerate([["Step 1: x, 1 + 1 = 2.", "1 + 1 = 2"], ["1 + 1 = 3", "2 > 1"], ["First x."]]):
        folder = tmp_path / "cells" / "s" / "m" / f"seed-{seed}"
        rest = {"strict_correct": False, "finished": True, "tokens": 1}
        rows = [{"id": text, "text": text, "correct": "= 2" in text, **rest} for text in answers]
        store_results({"held_out": TaskResult("held_out", "id", "number", rows)}, {}, folder, "after")
        (folder / ("report.json" if seed < 2 else "failed.txt")).write_text("{}")
    assert styles.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| m | held_out | 2 | 0.0 | 0.0 | 25.0 (100.0) | 75.0 (33.3) | 0.0 |" in said
    (tmp_path / "cells").rename(tmp_path / "elsewhere")
    assert styles.main([str(tmp_path)]) == 0 and capsys.readouterr().out == said
    assert styles.main([str(tmp_path / "elsewhere")]) == 2
