"""A study's numbers: what counts once, intervals that allow for seeds and questions, failures told together."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from compact.options import Given
from compact.results import TaskResult, store_results
from compact.statistics import clustered, crossed, t_quantile
from compact.study import summary
from compact.study.grid import Cell


def test_cells_that_failed_alike_are_told_together():
    content = {"study": "s", "cells": 3, "recipe": "r", "seeds": [0], "baseline": "uniform", "records": []}
    content |= {"weights": [], "seconds": None, "failed": {"a": "no such key", "b": "signal 9", "c": "no such key"}}
    told = summary._markdown(content, [])
    assert "**3 cells failed**" in told and "- `a`, `c`: no such key\n- `b`: signal 9" in told
    content["failed"] = {str(i): "no such file" for i in range(80)}
    assert "`6`, `7` and 72 more: no such file" in summary._markdown(content, [])


def test_differences_are_named_by_their_baseline(tmp_path):
    made = [Cell("s", method, seed, None, None, None, 1, 0) for method in ("a", "b") for seed in (0, 1)]
    for at in made:
        answers = [
            {
                "id": f"q{i}",
                "correct": at.method == "b" or i == at.seed,
                "strict_correct": True,
                "answer_logprob": None,
            }
            | {"options": 0, "solution_logprob": None, "finished": True, "tokens": 1}
            for i in range(2)
        ]
        store_results({"t": TaskResult("t", "id", "number", answers)}, {}, tmp_path / "cells" / at.name, "after")
        (tmp_path / "cells" / at.name / "report.json").write_text("{}")
    records = summary._setting(tmp_path, "s", made, "a")
    assert {key for record in records for key in record if key.startswith("diff_vs")} == {"diff_vs_a"}
    ours = next(record for record in records if record["method"] == "b" and record["measure"] == "accuracy")
    assert ours["diff_vs_a"] == pytest.approx(50)
    assert "| b | 2 | 100.0 (+50.0) |" in summary._table(records, "accuracy", "a")  # of two alike no interval


def test_what_every_fold_was_asked_counts_once_and_a_failed_fold_takes_its_seed_along(tmp_path):
    made = [Cell("s", "m", seed, fold, None, None, 2, 0) for seed in (0, 1) for fold in (0, 1)]
    for at in made:
        folder = tmp_path / "cells" / at.name
        answer = {"id": "x", "correct": at.fold == 0, "strict_correct": True, "answer_logprob": None, "options": 1}
        answer |= {"solution_logprob": None, "finished": True, "tokens": 1}
        results = {split: TaskResult(split, split, "number", [answer]) for split in ("id", "forgetting")}
        store_results(results, {}, folder, "after")
        (folder / "report.json").write_text("{}")
    (tmp_path / "cells" / made[3].name / "failed.txt").write_text("it ended with signal 9")
    found = summary._by_seed(tmp_path, made, "after")
    held_out, forgotten = ("id", "id", "accuracy"), ("forgetting", "forgetting", "accuracy")
    assert found == {0: {held_out: {"0/x": 100.0, "1/x": 0.0}, forgotten: {"x": 50.0}}}


def test_quantiles_are_student_s():
    # From printed tables.
    for dof, expected in ((1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (100, 1.984)):
        assert t_quantile(0.975, dof) == pytest.approx(expected, abs=2e-3)


def test_intervals_of_crossed_samples_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits, naive = 0, 0
    for _ in range(300):
        table = rng.normal(0, 0.5, (5, 1)) + rng.normal(0, 1, (1, 40)) + rng.normal(0, 1, (5, 40))
        estimate = crossed(table)
        low, high = estimate.interval()
        hits += low < 0 < high
        half = 1.96 * table.std() / math.sqrt(table.size)
        naive += abs(table.mean()) < half
    assert 0.92 <= hits / 300 <= 1 and naive / 300 < 0.8


def test_seeds_with_questions_of_their_own_have_the_error_of_both():
    rng = np.random.default_rng(0)
    table = rng.normal(0, 0.1, (4, 1)) + rng.normal(0, 1, (1, 60)) + rng.normal(0, 0.5, (4, 60))
    seeds, items = (index.ravel() for index in np.indices(table.shape))
    whole, flat = crossed(table), clustered(table.ravel(), seeds, items)  # of a table without gaps nearly the same
    assert flat.mean == pytest.approx(whole.mean) and flat.se == pytest.approx(whole.se, rel=0.02)
    inside = 0
    for _ in range(300):
        effect, kept = rng.normal(0, 1, 200), [rng.choice(200, 40, replace=False) for _ in range(5)]
        rows = [rng.normal(0, 0.2) + effect[some] + rng.normal(0, 1, 40) for some in kept]
        low, high = clustered(np.concatenate(rows), np.repeat(np.arange(5), 40), np.concatenate(kept)).interval()
        inside += low <= 0 <= high
    assert 0.9 < inside / 300 <= 0.99
    assert clustered(np.ones(3), np.arange(3), np.arange(3)).interval() is None


def test_one_seed_or_one_question_leaves_an_ordinary_mean():
    values = np.array([[1.0, 2.0, 4.0]])
    assert crossed(values).se == pytest.approx(values.std(ddof=1) / 3**0.5)
    assert crossed(values.T).se == crossed(values).se
    assert crossed(np.ones((1, 1))).se is None


@pytest.mark.parametrize("values", [np.ones((3, 4)), np.ones((1, 4)), np.eye(2)])
def test_values_of_which_nothing_varies_claim_no_interval(values):
    assert crossed(values).mean == values.mean() and crossed(values).interval() is None


def test_an_interval_that_is_clear_of_zero_shows_it():
    record = {"mean": -0.2, "se": 0.1, "diff_vs_a": -0.0002, "diff_ci95": [-0.0003, -0.0001]}
    assert summary._cell(record, "kl", "a") == "−0.2000 ± 0.1000 (**−0.0002 [−0.0003, −0.0001]**)"
    record |= {"diff_vs_a": -7.3, "diff_ci95": [-14.6, 0.04]}
    assert summary._cell(record, "accuracy", "a") == "−0.2 ± 0.1 (−7.3 [−14.6, +0.0])"


def test_a_missing_cell_is_priced_as_others_of_its_method(tmp_path):
    cells = [
        Cell("s", method, seed, None, Given({}), None, 0, 0) for method in ("quick", "slow", "new") for seed in (0, 1)
    ]
    for cell, seconds in ((cells[0], 5), (cells[2], 50)):
        (tmp_path / "cells" / cell.name).mkdir(parents=True)
        (tmp_path / "cells" / cell.name / "cell.json").write_text(json.dumps({"seconds": seconds}))
    found = summary._seconds(tmp_path, cells)
    assert found["missing"] == 4 and found["to_come"] == 5 + 50 + 2 * 27.5 and found["unpriced"] == ["new"]


def test_the_untrained_student_is_that_of_all_questions_that_seeds_were_asked(tmp_path):
    def cell(method: str, seed: int, right: str, first: int) -> Cell:
        one = Cell("s", method, seed, None, Given({}), None, 0, 0)
        rows = [{"id": f"q{first + i}", "correct": c == "1"} for i, c in enumerate(right)]
        rest = {
            "strict_correct": True,
            "finished": True,
            "tokens": 1,
            "answer_logprob": None,
            "solution_logprob": None,
        }
        result = TaskResult("t", "id", "number", [{**row, **rest} for row in rows])
        store_results({"t": result}, {}, tmp_path / "cells" / one.name, "before")
        return one

    others = [cell("base", 0, "10", 0), cell("base", 1, "11", 7)]
    assert len(summary._before(tmp_path, others, "base")) == 2
    alike = [cell("late", 2, "10", 0), cell("late", 3, "10", 0)]
    assert len(summary._before(tmp_path, alike, "base")) == 1  # the baseline has none yet


def test_a_teacher_whom_not_every_cell_knows_has_the_mean_of_those_that_do(tmp_path):
    cells = []
    for fold, alpha in enumerate(({"a": 1.0}, {"a": 0.6, "rare": 0.4}, {"a": 0.8, "rare": 0.2})):
        cells.append(Cell("s", "m", 0, fold, Given({}), None, 3, 0))
        folder = tmp_path / "cells" / cells[-1].name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps({"finished": True, "alpha_mean": alpha, "alpha_entropy": 0.5}))
    (found,) = summary._weights(tmp_path, cells)
    assert found["alpha"] == pytest.approx({"a": 0.8, "rare": 0.3})


def test_the_best_and_the_worst_single_teacher_are_named_afterwards():
    records = [
        {"method": method, "measure": "accuracy", "split": "id", "mean": mean}
        for method, mean in (("uniform", 9), ("single:a", 3), ("single:b", 5), ("single:c", 1))
    ]
    assert "`single:b` is best in distribution, `single:c` worst" in summary._best_teacher(records)[0]
    assert summary._best_teacher(records[:2]) == []
