"""The report of a run, from a plausible folder that no training made."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

import compact
from compact.analyze import main, read_run, summarize, write_report
from compact.metrics import read_metrics
from compact.pictures import influence, short_names, statistics, style, weights
from compact.pictures.question import consensus_graph, graph_of, terms, trajectory
from compact.report import markdown
from compact.results import TaskResult, store_results, versions
from tests.processes import ROOT, environment

TEACHERS = ["human", "paragraph", "equations", "slipped"]
BODIES = {
    "human": "In May she sold 48 / 2 = 24 clips .\n Altogether , therefore , 48 + 24 = 72 clips .",
    "paragraph": "First , half of 48 is 24 , so in May she sold 24 . Then the total is 72 .",
    "equations": "48 / 2 = 24 \n 48 + 24 = 72",
    "slipped": "In May she sold 48 / 2 = $26 . So 48 + 26 = 74 clips .",
}


def plausible_run(folder: Path, steps: int = 300, long_bodies: bool = False) -> Path:
    """A run's folder as the trainer leaves it, with made-up numbers."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "run": str(folder),
        "seed": 0,
        "strategy": "compact",
        "student": {"model": "SmolLM2-135M-Instruct", "lora": {"rank": 16, "alpha": 32.0}},
        "training": {"learning_rate": 1e-4, "num_train_epochs": 3},
        "evaluation": {"note": "Questions are from GSM8K's test split: not to be set beside published numbers."},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    final = {"human": 0.36, "paragraph": 0.3, "equations": 0.23, "slipped": 0.11}
    rows = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-3 * step / steps)
        raw = {t: 0.25 + (final[t] - 0.25) * done + draw.gauss(0, 0.035) for t in TEACHERS}
        teachers = {
            t: {
                "alpha": max(0.01, raw[t]) / sum(max(0.01, value) for value in raw.values()),
                "adaptability": 2 + i * 0.3 * done + draw.gauss(0, 0.25),
                "consensus": 0.75 + 0.02 * i * done + draw.gauss(0, 0.01),
                "difficulty": 1.6 + 0.25 * i - 0.7 * done + draw.gauss(0, 0.06),
                "count": 4,
            }
            for i, t in enumerate(TEACHERS)
            if not (t == "slipped" and step % 50 == 0)
        }
        sft = 1.9 - 0.8 * done + draw.gauss(0, 0.06)
        rows.append(
            {
                **{"step": step, "epoch": 3 * step / steps, "loss": sft + 0.02, "loss_sft": sft},
                **{"loss_mcon": 0.25 * math.exp(-2 * done) + abs(draw.gauss(0, 0.02)), "learning_rate": 1e-4},
                **{"grad_norm": 1.0, "alpha_entropy": 1.386 - 0.12 * done + draw.gauss(0, 0.02)},
                **{"tokens_per_second": 9000.0 + step % 7, "peak_memory_bytes": 3 * 2**30, "seconds": step * 0.4},
                "teachers": teachers,
                "spread": {"adaptability": 0.5, "consensus": 0.02, "difficulty": 0.2},
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = {
        "teachers": TEACHERS,
        "questions": {"read": 1000, "used": 797, "refused": 3, "all_wrong": 0},
        "rationales": {"read": 4000, "used": 3170, "cut": 6, "refused": 12, "wrong": 798, "unrecognised_closings": 2},
        "reason_counts": {"too long (data.overlong: drop):": 12},
        "reasons": ["question 'q7', teacher 'human': too long (data.overlong: drop): 1100 > 1024 tokens"],
    }
    (folder / "data_report.json").write_text(json.dumps(report))
    timing = {"seconds": {"prepare": 20.0, "evaluate_before": 18.0, "train": 120.0, "evaluate_after": 17.0}}
    (folder / "timing.json").write_text(json.dumps(timing))
    tasks = {"held_out": ("id", "number", 0.02, 0.08), "csqa": ("ood", "choice", 0.21, 0.24)}
    tasks["strategyqa"] = ("forgetting", "yesno", 0.53, 0.5)
    for when in ("before", "after"):
        results = {}
        for name, (split, kind, before, after) in tasks.items():
            share = before if when == "before" else after
            results[name] = TaskResult(name, split, kind, _predictions(name, kind, share, when, draw), 6.0)
        settings = {"batch_size": 64, "max_new_tokens": 192, "prompt_template": "{prompt}", "suffix": "{answer}"}
        store_results(results, settings, folder, when)
        (folder / "analysis").mkdir(exist_ok=True)
        (folder / "analysis" / f"{when}.json").write_text(json.dumps(_trace(when, draw, long_bodies)))
    return folder


def _predictions(name: str, kind: str, share: float, when: str, draw: random.Random, n: int = 200) -> list[dict]:
    return [
        {
            **{"id": f"{name}-{i}", "prompt": "p", "gold": "1", "kind": kind, "text": "t", "strict": None},
            **{"options": {"choice": 5, "yesno": 2}.get(kind, 0), "flexible": "1", "solution": None},
            **{"correct": (right := draw.random() < share), "strict_correct": right and draw.random() < 0.6},
            **{"answer_logprob": draw.gauss(-4 if when == "before" else -2.4, 1), "suffix_logprob": -1.0},
            **{"solution_logprob": draw.gauss(-1.9, 0.3) if kind == "number" else None, "tokens": 40},
            "finished": draw.random() < 0.9,
        }
        for i in range(n)
    ]


def _trace(when: str, draw: random.Random, long_bodies: bool) -> dict:
    learnt = when == "after"
    thinking_words = {"therefore", "first", "so", "then"}
    rationales = []
    for i, teacher in enumerate(TEACHERS):
        tokens = [" " + token if token != "\n" else token for token in BODIES[teacher].split(" ")]
        tokens = ["", *(tokens * 8 if long_bodies else tokens)]
        thinking = [token.strip().lower() in thinking_words for token in tokens]
        level, evidence = -7.5 + 2.0 * learnt, []
        for token, thought in zip(tokens, thinking):
            level += draw.gauss(0, 0.2) + (1.2 + learnt) * (thought or "72" in token) * (teacher != "slipped")
            level = min(level, -0.1)
            evidence.append(level)
        rises = np.maximum(np.diff(evidence), 0) * np.where(thinking[1:], 1, 0.1)
        rationales.append(
            {
                **{"teacher": teacher, "tokens": tokens, "evidence": evidence, "thinking": thinking},
                **{"alpha": (0.36, 0.3, 0.23, 0.11)[i], "adaptability": float(rises.sum())},
                **{"consensus": (0.8, 0.83, 0.72, 0.65)[i], "difficulty": 1.2, "wrong": teacher == "slipped"},
            }
        )
    affinity = np.array(
        [[0.25, 0.3, 0.25, 0.2], [0.3, 0.25, 0.25, 0.2], [0.27, 0.28, 0.25, 0.2], [0.23, 0.25, 0.22, 0.3]]
    )
    return {
        **{"question_id": "q1", "prompt": "Natalia sold clips …", "answer": "72", "teachers": TEACHERS},
        **{"rationales": rationales, "affinity": affinity.tolist()},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = plausible_run(tmp_path_factory.mktemp("runs") / "gsm8k")
    write_report(folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built and not rendered, which is nine tenths of a report's time."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **kwargs: file.write(b"png"))
    monkeypatch.setattr(Figure, "draw_without_rendering", lambda self: None)


def test_the_report_holds_what_it_promises(folder):
    report = json.loads((folder / "report.json").read_text())
    for task in ("held_out", "csqa", "strategyqa"):
        for when in ("before", "after"):
            rows = [json.loads(line) for line in (folder / "evaluation" / when / f"{task}.jsonl").open()]
            assert report["accuracy"][task][when] == sum(row["correct"] for row in rows) / 200
            assert report["accuracy"][task]["summary"][when]["strict"]["standard_error"] > 0
    assert set(report["alpha_mean"]) == set(TEACHERS)
    assert report["questions"]["used"] == 797 and report["questions"]["refused"] == 3
    assert {key: report["rationales"][key] for key in ("used", "cut", "refused", "wrong")} == {
        **{"used": 3170, "cut": 6, "refused": 12, "wrong": 798}
    }
    assert report["seconds"] == 175.0
    assert report["tokens_per_second"] == 9003.0
    assert report["peak_memory_bytes"] == 3 * 2**30
    assert {"python", "torch", "transformers", "compact", "device"} <= report["versions"].keys()


def test_mean_alpha_is_that_of_the_last_quarter_over_the_rationales_present(tmp_path):
    folder = plausible_run(tmp_path / "run", steps=8)
    rows = [
        {**json.loads(line), "teachers": {"human": {"alpha": 0.1 * i, "count": i, **_metrics()}} if i != 6 else {}}
        for i, line in enumerate((folder / "metrics.jsonl").open())
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summarize(read_run(folder))["alpha_mean"]["human"] == pytest.approx(0.7)
    rows[6]["teachers"] = {"human": {"alpha": 0.4, "count": 21, **_metrics()}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summarize(read_run(folder))["alpha_mean"]["human"] == pytest.approx((0.7 * 7 + 0.4 * 21) / 28)


def _metrics() -> dict[str, float]:
    return {"adaptability": 1.0, "consensus": 0.5, "difficulty": 2.0}


def test_the_markdown_says_numbers_errors_note_and_refusals(folder):
    text = (folder / "report.md").read_text()
    report = json.loads((folder / "report.json").read_text())
    after = report["accuracy"]["held_out"]["summary"]["after"]
    assert f"{100 * after['accuracy']:.1f} ± {100 * after['standard_error']:.1f}" in text
    assert "not to be set beside published numbers" in text
    changes = report["accuracy"]["strategyqa"]["changes"]
    assert f"{changes['forgotten']} / {changes['gained']}" in text
    assert "| rationales | 4,000 | 3,170 | 12 | 6 | 798 |" in text
    assert "1100 > 1024 tokens" in text
    assert "Read is the last number of an answer" in text  # as compact.answers.extract does, whatever else is stated


def test_every_picture_is_drawn_and_linked(folder):
    text = (folder / "report.md").read_text()
    for name in ("accuracy", "weights", "loss", "statistics", "trajectory", "consensus"):
        assert f"](pictures/{name}.png)" in text
        picture = (folder / "pictures" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert not list(folder.rglob("*.part"))


HUB = ["deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "Qwen/Qwen2.5-Math-72B-Instruct", "Qwen/Qwen2.5-Math-7B-Instruct"]


def test_names_in_pictures_are_short_and_all_different():
    short = list(short_names(HUB).values())
    assert short == ["DeepSeek-R1…l-Llama-70B", "Qwen2.5-Mat…2B-Instruct", "Qwen2.5-Mat…7B-Instruct"]
    assert list(short_names(["a/one", "b/one"]).values()) == ["a/one", "b/one"]
    alike = short_names([f"{'long' * 9}-{i}-{'name' * 9}" for i in range(24)])
    assert len(set(alike.values())) == 24 and max(map(len, alike.values())) <= 20 and short_names([]) == {}


@pytest.mark.parametrize("teachers", [HUB, [f"teacher-{i}" for i in range(24)], [f"{HUB[0]}-v{i}" for i in range(24)]])
def test_names_that_are_long_or_many_have_room(teachers):
    entry = {"alpha": 1 / len(teachers), **_metrics(), "count": 1}
    rows = [{"step": step, "teachers": dict.fromkeys(teachers, entry)} for step in range(1, 9)]
    told = {"alpha": 0.1, "consensus": 0.9, "wrong": True}
    trace = {
        "rationales": [{"teacher": name, **told} for name in teachers],
        "affinity": np.full([len(teachers)] * 2, 0.1),
    }
    with style():
        figures = [weights(rows, dict.fromkeys(teachers, 0.1)), statistics(rows, teachers)]
        figures.append(consensus_graph({"before": trace, "after": trace}, teachers))
    for figure in figures:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "axes sizes collapsed to zero"
            figure.draw_without_rendering()
        boxes = [legend.get_window_extent() for legend in figure.legends]
        boxes += [text.get_window_extent() for ax in figure.axes for text in ax.texts if text.get_text()]
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
        assert all(ax.bbox.width > 0.2 * figure.bbox.width for ax in figure.axes)
    named = [t.get_window_extent() for ax in figure.axes for t in ax.texts if "α" in t.get_text()]
    assert not any(one.overlaps(other) for i, one in enumerate(named) for other in named[:i])


def test_an_empty_run_is_reported_as_not_measured(tmp_path):
    (tmp_path / "recipe.yaml").write_text("strategy: uniform\n")
    report = write_report(tmp_path)
    assert report["accuracy"] == {} and report["seconds"] is None and report["questions"]["used"] is None
    text = (tmp_path / "report.md").read_text()
    assert text.count("not measured") >= 5 and "nan" not in text.lower().split()
    assert "![latent](latent.png)" in markdown(summarize(read_run(tmp_path)), "", {"latent": "latent.png"})


def test_norms_that_were_measured_now_and_then_are_a_line_and_a_mean(tmp_path, undrawn):
    folder = plausible_run(tmp_path / "run", steps=30)
    rows = read_metrics(folder / "metrics.jsonl")
    for row in (rows[0], rows[20]):
        for entry in row["teachers"].values():
            entry["influence"] = float(row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = write_report(folder)
    assert report["steps_with_norms"] == 2
    assert all(teacher["influence"] == 21 for teacher in report["teachers"].values())
    assert "Norms of 2 measured steps" in (folder / "report.md").read_text()
    figure = influence.influence(rows, report["alpha_mean"])
    lines = figure.axes[1].get_lines()
    assert len(lines) == len(report["teachers"]) and list(lines[0].get_xdata()) == [1, 21]


def test_what_a_strategy_says_of_itself_is_told_as_it_was_last(tmp_path, undrawn):
    run = plausible_run(tmp_path / "run", steps=6)
    rows = read_metrics(run / "metrics.jsonl")
    rows[1]["strategy"], rows[3]["strategy"] = {"mind/meta_loss": 0.5, "mind/rate": 1}, {"mind/meta_loss": 0.01234}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_report(run)["strategy_logs"] == {"mind/meta_loss": 0.01234, "mind/rate": 1}
    assert "own last figures: mind/meta_loss 0.0123, mind/rate 1." in (run / "report.md").read_text()


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "data_report.json", "timing.json", "analysis", "evaluation/before"]
)
def test_any_one_missing_piece_does_not_stop_the_report(tmp_path, missing, undrawn):
    folder = plausible_run(tmp_path / "run", steps=1)
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = write_report(folder)
    json.dumps(report, allow_nan=False)
    if missing == "evaluation/before":
        assert report["accuracy"]["csqa"]["before"] is None and "changes" not in report["accuracy"]["csqa"]
    if missing == "analysis":
        assert not (folder / "pictures" / "trajectory.png").exists()


def test_numbers_that_are_not_finite_become_null(tmp_path, undrawn):
    folder = plausible_run(tmp_path / "run", steps=4)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    rows[-1]["alpha_entropy"] = math.nan
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(folder)
    report = json.loads((folder / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["alpha_entropy"] is None


def test_the_importer_s_matplotlib_stays_as_it_was(tmp_path, undrawn):
    with matplotlib.rc_context({"font.size": 7}):
        before = dict(matplotlib.rcParams)
        write_report(plausible_run(tmp_path / "run", steps=5))
        assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib_the_report_says_so(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.startswith(("matplotlib", "compact.pictures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(compact, "pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = plausible_run(tmp_path / "run", steps=5)
    write_report(folder)
    assert "matplotlib is not installed" in (folder / "report.md").read_text()
    assert not (folder / "pictures").exists()


def test_the_terms_of_eq_3_count_rises_alone_and_weigh_thinking_tokens():
    evidence, thinking = np.array([-5.0, -4.0, -6.0, -3.0]), [True, False, False, True]
    np.testing.assert_allclose(terms(evidence, thinking, 0.1), [0.0, 0.1, 0.0, 3.0])


def test_the_graph_has_the_affinities_as_edges_and_the_consensus_as_in_degree():
    trace = _trace("after", random.Random(0), False)
    graph = graph_of(trace)
    affinity = np.array(trace["affinity"])
    in_degree = dict(graph.in_degree(weight="weight"))
    np.testing.assert_allclose([in_degree[k] for k in range(4)], affinity.sum(0) - affinity.diagonal())
    assert graph.number_of_edges() == 12 and graph.nodes[3]["wrong"]


def test_tokens_with_dollars_and_line_breaks_are_drawn_as_text():
    trace = _trace("after", random.Random(0), False)
    trace["rationales"] = trace["rationales"][:1]
    trace["rationales"][0]["tokens"][1:6] = ["$", "a$b^", "\n\n", "", "日本"]
    with warnings.catch_warnings(), style():
        warnings.simplefilter("error")
        trajectory({"after": trace}, TEACHERS).canvas.draw()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_questions_with_any_number_of_rationales_are_drawn(count):
    trace = _trace("after", random.Random(0), False)
    trace["rationales"] = [trace["rationales"][i % 4] | {"teacher": f"t{i}"} for i in range(count)]
    trace["affinity"] = np.full((count, count), 1 / count).tolist()
    with style():
        for drawn in (trajectory({"after": trace}, []), consensus_graph({"after": trace}, ["t0"])):
            drawn.canvas.draw()


def test_what_is_no_run_is_refused_by_name(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "no recipe.yaml" in capsys.readouterr().err


def test_the_command_writes_the_report(tmp_path, capsys, undrawn):
    folder = plausible_run(tmp_path / "run", steps=3)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.md")
    assert (folder / "report.md").exists()


def test_the_trainer_s_versions_are_kept(tmp_path):
    folder = plausible_run(tmp_path / "run", steps=3)
    (folder / "timing.json").write_text(json.dumps({"seconds": {"train": 1.0}, "versions": {"device": "another"}}))
    assert summarize(read_run(folder))["versions"] == {"device": "another"}
    assert versions()["python"].count(".") == 2


def test_a_report_and_its_pictures_are_written_without_transformers():
    parts = "analyze, pictures.influence, pictures.question, pictures.states".replace(", ", ", compact.")
    code = f"import sys, compact.{parts}; assert not sys.modules.keys() & {{'transformers', 'peft'}}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)
