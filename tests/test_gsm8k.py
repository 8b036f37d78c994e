import json
import random
import re
from pathlib import Path

import pytest

import compact
from compact.answers import extract, same_answer, strip_closing
from compact.data import load_questions
from compact.gsm8k import convert, convert_file, main, one_paragraph
from compact.slips import KINDS, NOTE, slip

COMMITTED = Path(compact.__file__).parent / "recipes" / "data" / "gsm8k_four_teachers_32.jsonl"
QUESTION = "A box has 3 rows of 12 eggs. Tom takes 4 and gives each of 2 friends the same. How many does each get?"
SOLUTION = (
    "There are 3*12 = <<3*12=36>>36 eggs.\nWith 36 eggs, 36-4 = <<36-4=32>>32 are left.\n"
    "Each friend gets 32/2 = <<32/2=16>>16 eggs\n#### 16"
)
UPSTREAM = {"question": QUESTION, "answer": SOLUTION}


def teachers(row):
    return {rationale["teacher"]: rationale for rationale in row["rationales"]}


def test_upstream_row_gets_four_teachers():
    row = convert(UPSTREAM, seed=0, identifier="gsm8k-1")
    assert (row["id"], row["prompt"], row["answer"]) == ("gsm8k-1", QUESTION, "16")
    found = teachers(row)
    assert list(found) == ["human", "paragraph", "equations", "slip"]
    assert found["human"]["completion"] == re.sub("<<.*?>>", "", SOLUTION)
    assert found["paragraph"]["completion"] == (
        "There are 3*12 = 36 eggs. With 36 eggs, 36-4 = 32 are left. "
        "Each friend gets 32/2 = 16 eggs. So the answer is 16."
    )
    assert found["equations"]["completion"] == "3*12 = 36\n36-4 = 32\n32/2 = 16\n#### 16"
    assert not same_answer(found["slip"]["answer"], "16", "number")


def test_row_of_our_form_keeps_id_paragraph_and_answer():
    row = convert(
        {"id": "t-1", "question": QUESTION, "solution": SOLUTION, "paragraph": "In short, 16.", "answer": "16"}, 0, "-"
    )
    assert row["id"] == "t-1" and row["answer"] == "16"
    assert teachers(row)["paragraph"]["completion"] == "In short, 16."


def test_slip_is_carried_through_every_later_step():
    seen = set()
    for seed in range(60):
        found = slip(QUESTION, SOLUTION, random.Random(seed))
        notes = NOTE.findall(found.text)
        values = [int(result) for _, result in notes]
        seen.add((found.kind, found.note))
        slipped = found.note - 1
        truth = [36, 32, 16]
        assert values[:slipped] == truth[:slipped] and values[slipped] != truth[slipped]
        assert (found.before, found.after) == (str(truth[slipped]), str(values[slipped]))
        # From there on the arithmetic is right, in the notes and in words, and goes on from the wrong number.
        assert notes[1][0] == f"{values[0]}-4" and notes[2][0] == f"{values[1]}/2"
        for index, (expression, result) in enumerate(notes):
            assert (eval(expression) == int(result)) is (index != slipped)
        assert f"With {values[0]} eggs, {values[0]}-4 =" in found.text
        assert found.answer == str(values[2]) != "16" and found.text.endswith(f"#### {values[2]}")
        assert found.carried == 2 - slipped
    assert {kind for kind, _ in seen} == set(KINDS) and {note for _, note in seen} == {1, 2, 3}


@pytest.mark.parametrize(
    "kind, values",
    [("off_by_one", {"35", "37"}), ("carry", {"26", "46"}), ("transposed", {"63"}), ("shifted", {"360"})],
)
def test_kinds_of_slips_are_what_they_say(kind, values):
    solution = "There are 3*12 = <<3*12=36>>36 eggs.\n#### 36"
    found = [slip(QUESTION, solution, random.Random(seed)) for seed in range(100)]
    assert {one.after for one in found if one.kind == kind} == values


def test_slip_keeps_the_way_numbers_are_written():
    solution = "It costs $<<2*750=1500>>1,500.\nWith tax $1,500*1.1 = $<<1500*1.1=1650.00>>1,650.00\n#### 1,650"
    found = slip("What?", solution, random.Random(3))
    assert re.search(r"With tax \$\d,\d{3}\*1\.1 = \$<<\d{4}\*1\.1=\d+\.\d\d>>\d,\d{3}\.\d\d\n", found.text)
    assert same_answer(found.answer, found.text.rpartition("####")[2], "number")


@pytest.mark.parametrize(
    "solution",
    [
        "No notes at all, so 5.\n#### 5",
        "Half of <<10/2=5>>5 and then 9 more is 14\n#### 14",  # no note gives the answer
        "It is <<0-5=-5>>-5\n#### -5",
        "No answer <<1+1=2>>2",
    ],
)
def test_row_that_allows_no_slip_has_none(solution):
    assert slip("What?", solution, random.Random(0)) is None


def test_conversion_depends_on_seed_and_id_alone():
    assert convert(UPSTREAM, 0, "x") == convert(dict(UPSTREAM), 0, "x")
    assert len({json.dumps(convert(UPSTREAM, seed, "x")) for seed in range(8)}) > 2


def test_derived_paragraph_ends_every_sentence():
    assert one_paragraph("One\nTwo.\n\nThree:\n", "4") == "One. Two. Three: So the answer is 4."


def test_command_prints_a_summary_and_names_what_it_refuses(tmp_path, capsys):
    source, out = tmp_path / "gsm8k.jsonl", tmp_path / "deep" / "four.jsonl"
    rows = [UPSTREAM, {"question": "?", "answer": "none"}, {"question": "Is it?", "answer": "Just 5.\n#### 5"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([str(source), str(out), "--seed", "4"])
    printed = capsys.readouterr().out
    assert "2 questions, seed 4" in printed and "equations 1, slip 1" in printed
    assert f"{source}:2: field 'answer' holds no worked solution" in printed
    dataset, report = load_questions(out)
    assert report.teachers == ["human", "paragraph", "equations", "slip"] and report.rationales["wrong"] == 1
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nowhere.jsonl"), str(out)])
    assert stop.value.code == 2 and "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(source), str(source)])
    assert "take the place of its source" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.part"))


def test_limit_stops_after_so_many_questions(tmp_path):
    source = tmp_path / "gsm8k.jsonl"
    source.write_text("".join(json.dumps(UPSTREAM) + "\n" for _ in range(5)))
    assert convert_file(str(source), str(tmp_path / "out.jsonl"), limit=2)["questions"] == 2
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_committed_rows_load_whole_and_their_slips_are_wrong():
    dataset, report = load_questions(COMMITTED)
    assert report.questions == {"read": 32, "used": 32, "refused": 0, "all_wrong": 0}
    assert report.teachers == ["human", "paragraph", "equations", "slip"]
    assert report.rationales["unrecognised_closings"] == report.rationales["refused"] == 0
    for row in dataset:
        for rationale in row["rationales"]:
            assert rationale["wrong"] is (rationale["teacher"] == "slip")
    raw = [json.loads(line) for line in COMMITTED.read_text().splitlines()]
    for row in raw:
        for name, rationale in teachers(row).items():
            stated = strip_closing(rationale["completion"])[1]
            assert same_answer(stated, rationale.get("answer", row["answer"]), "number")
            if name != "paragraph":
                assert same_answer(extract(rationale["completion"], "number", True), stated, "number")
    assert (COMMITTED.parent / "LICENSE-GSM8K").read_text().startswith("MIT License")
    assert "never to be set beside" in " ".join((COMMITTED.parent / "README.md").read_text().split())
