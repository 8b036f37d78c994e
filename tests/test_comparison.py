"""Runs side by side."""

from __future__ import annotations

import pytest

from compact.analyze import main
from compact.comparison import comparison
from compact.errors import UserError
from compact.results import TaskResult, load_results, store_results


def finished(folder, right: str, logprob: float, when: str = "after", offset: int = 0, asked: int = 0):
    """A run that answered question i rightly where right[i] is 1."""
    rows = [
        {
            **{
                "id": f"q{i + offset}",
                "prompt": f"{i + asked}?",
                "kind": "number",
                "options": 0,
                "correct": c == "1",
                "strict_correct": c == "1",
            },
            **{"answer_logprob": logprob + 0.1 * i, "suffix_logprob": -1.0, "solution_logprob": None},
            **{"tokens": 5, "finished": True},
        }
        for i, c in enumerate(right)
    ]
    store_results({"sums": TaskResult("sums", "id", "number", rows)}, {}, folder, when)
    return folder


def test_differences_are_paired_question_by_question(tmp_path, capsys):
    one = finished(tmp_path / "one", "1100", -2.0)
    finished(one, "0000", -3.0, when="before")
    two = finished(tmp_path / "two", "1011", -1.5)
    assert main([str(one), "--against", str(two)]) == 0
    lines = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["| one"].startswith("| one | 50.000 ± 28.868 |  | -1.850 ± 0.065 |  |")
    # differences 0, −1, +1, +1: mean 25, standard error √(275/4)/… of the four
    assert "| 75.000 ± 25.000 | +25.000 ± 47.871 | -1.350 ± 0.065 | +0.500 ± 0.000 | – | – |" in lines["| two"]
    assert "| 0.000 ± 0.000 | -50.000 ± 28.868 |" in lines["| before training"]


def test_tasks_that_not_all_runs_were_asked_are_named(tmp_path):
    one, two = (finished(tmp_path / name, "10", -2.0) for name in ("one", "two"))
    results, _ = load_results(two, "after")
    store_results(
        {**results, "more": TaskResult("more", "ood", "number", results["sums"].predictions)}, {}, two, "after"
    )
    assert comparison([one, two]).endswith("two was asked more, and one was not.")
    assert comparison([two, one]).endswith("two was asked more, and one was not.")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [finished(tmp_path / method / "seed-0", "10", -2.0) for method in ("mine", "theirs")]
    table = comparison(runs)
    assert "from mine/seed-0, question" in table and "\n| mine/seed-0 |" in table and "\n| theirs/seed-0 |" in table


def test_a_difference_says_of_how_many_questions_it_is(tmp_path):
    one, two = finished(tmp_path / "one", "1100", -2.0), finished(tmp_path / "two", "011", -2.0)
    assert "| 66.667 ± 33.333 (n = 3) | +0.000 ± 57.735 (n = 3) |" in comparison([one, two])


def test_a_task_without_a_common_question_has_no_difference_and_the_others_have(tmp_path):
    runs = [finished(tmp_path / name, "10", -2.0) for name in ("one", "two")]
    for run, asked in zip(runs, (0, 9)):
        other, _ = load_results(finished(tmp_path / f"other-{asked}", "01", -2.0, asked=asked), "after")
        results, _ = load_results(run, "after")
        store_results({**results, "more": other["sums"]}, {}, run, "after")
    sums, more = comparison(runs).split("**more**")
    assert "| two | 50.000 ± 50.000 | +0.000 ± 0.000 |" in sums
    assert "| two | 50.000 ± 50.000 | – |" in more


def test_questions_whose_ids_all_differ_are_known_by_their_prompts(tmp_path):
    one, two = finished(tmp_path / "one", "11", -2.0), finished(tmp_path / "two", "10", -2.0, offset=9)
    assert "| two | 50.000 ± 50.000 | -50.000 ± 50.000 |" in comparison([one, two])


def test_runs_on_other_questions_or_without_results_are_refused(tmp_path):
    one = finished(tmp_path / "one", "11", -2.0)
    with pytest.raises(UserError, match="sums: two and one have no question in common"):
        comparison([one, finished(tmp_path / "two", "11", -2.0, offset=9, asked=9)])
    with pytest.raises(UserError, match="no question in common"):  # of the same ids, as 0, 1, … often are
        comparison([one, finished(tmp_path / "four", "11", -2.0, asked=9)])
    with pytest.raises(UserError, match="three holds no results after training"):
        comparison([one, tmp_path / "three"])


def test_a_prompt_that_stands_twice_pairs_nothing_where_ids_differ(tmp_path):
    one = finished(tmp_path / "one", "110", -2.0)
    results, _ = load_results(one, "after")
    rows = [dict(row) for row in results["sums"].predictions]
    rows[1]["prompt"] = rows[0]["prompt"]
    for name, order in (("two", rows), ("three", rows[::-1])):
        named = [{**row, "id": f"{name}-{i}"} for i, row in enumerate(order)]
        store_results({"sums": TaskResult("sums", "id", "number", named)}, {}, tmp_path / name, "after")
    assert " | +0.000 (n = 1) | " in comparison([tmp_path / "two", tmp_path / "three"])
