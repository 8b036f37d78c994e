"""`python -m compact.train`, end to end on a toy student: what a run leaves, strategies, real questions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import safe_globals

from compact.config import from_dict, read_recipe, save_recipe
from compact.demo import build
from compact.influence import read_influence
from compact.metrics import read_metrics
from compact.options import plain
from compact.run_folder import finished_recipe
from compact.states import read_states
from compact.train import main
from tests.processes import ROOT
from tests.test_embed import save_encoder
from tests.toy import toy_tokenizer
from tests.toy_run import toy_rows, write_rows
from tests.train_cases import assert_same_run, files, flags

GSM8K = ROOT / "compact" / "recipes" / "data" / "gsm8k_four_teachers_32.jsonl"


# ------------------------------------------------------------------------------------------------------- a whole run


def test_nothing_is_written_outside_the_runs_folder(finished):
    assert not files(finished.parent / "here")
    caches = (".cache/matplotlib/", ".cache/torch/", ".nv/", ".triton/")  # of libraries, the last three on a GPU
    assert not {name for name in files(finished.parent / "home") if not name.startswith(caches)}


def test_the_folder_holds_what_the_readme_names_and_no_pickle(finished):
    found = files(finished)
    expected = {"recipe.yaml", "metrics.jsonl", "report.md", "report.json", "student/model.safetensors"}
    expected |= {f"evaluation/{when}/held_out.jsonl" for when in ("before", "after")}
    assert expected <= found
    assert any(name.startswith("pictures/") and name.endswith(".png") for name in found)
    # tensors of the optimizer, the schedule and the random state, which are read with weights_only
    torch_files = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    assert not {name for name in found if name.endswith((".bin", ".pkl", ".pickle"))}
    assert {Path(name).name for name in found if name.endswith((".pt", ".pth"))} == set(torch_files)
    for name in found:
        if name.endswith((".pt", ".pth")):
            with safe_globals():  # NumPy's random state, in rng_state.pth
                torch.load(finished / name, weights_only=True)
    assert not {name for name in found if "writing" in name or name.endswith(".part")}
    top = {path.name for path in finished.iterdir()}
    top -= {"recipe.yaml", "metrics.jsonl", "report.md", "report.json", "timing.json", "data_report.json"}
    assert top == {".lock", "analysis", "cache", "checkpoints", "evaluation", "pictures", "student"}


def test_the_output_is_only_what_a_person_needs(finished):
    out, err = ((finished.parent / name).read_text() for name in ("stdout", "stderr"))
    assert out.splitlines()[0].startswith("9 of 11 questions used, 2 held out, 0 refused")
    assert re.fullmatch(r"[\d,]+ of [\d,]+ parameters train: LoRA of rank 4", out.splitlines()[1])
    assert out.splitlines()[-1] == f"report: {finished / 'report.md'}"
    assert "Warning" not in err and "warn" not in err and "[transformers]" not in err
    bars = [line.split(":")[0] for line in err.splitlines() if line.strip()]
    assert all("%|" in line for line in err.splitlines() if line.strip()), err
    names = [name for name, before in zip(bars, [None, *bars]) if name != before]
    ours = [name for name in names if name not in ("Loading weights", "Writing model shards")]  # transformers'
    assert ours == ["held_out", "training", "held_out"]


def test_the_saved_student_is_the_trained_one_with_its_adapter_merged(finished, toy):
    student = AutoModelForCausalLM.from_pretrained(finished / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    ids = torch.tensor([tokenizer("Question: 12+36?\nAnswer:")["input_ids"]])
    last = max((finished / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    assert last.name == f"checkpoint-{len(read_metrics(finished / 'metrics.jsonl'))}"
    base = AutoModelForCausalLM.from_pretrained(toy / "student").eval()
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(last)).eval()
        assert torch.allclose(student(ids).logits, adapted(ids).logits, atol=1e-5)
    assert not torch.allclose(student(ids).logits, before, atol=1e-3)
    assert type(student).__name__ == "LlamaForCausalLM"
    ends = student.generation_config.eos_token_id  # a list of one, as older versions of transformers read it back
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert tokenizer.get_vocab() == toy_tokenizer().get_vocab()


def test_the_table_has_a_row_a_step(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))  # 9 questions, two a step, two epochs
    assert [row["questions"] for row in rows] == ([2] * 4 + [1]) * 2
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss_sft"] + 0.1 * row["loss_mcon"], rel=1e-5)
        assert sum(t["alpha"] * t["count"] for t in row["teachers"].values()) == pytest.approx(row["questions"])
        assert set(row["spread"]) == {"adaptability", "consensus", "difficulty"}


def test_the_report_holds_the_promised_numbers(finished):
    report = json.loads((finished / "report.json").read_text())
    rows = read_metrics(finished / "metrics.jsonl")
    tail = rows[-(len(rows) // 4) :]
    assert len(tail) == 2
    for teacher in ("terse", "wordy", "wrong"):
        total = count = 0.0
        for row in tail:
            entry = row["teachers"].get(teacher, {"alpha": 0.0, "count": 0})
            total, count = total + entry["alpha"] * entry["count"], count + entry["count"]
        assert report["alpha_mean"][teacher] == pytest.approx(total / count)
    for when in ("before", "after"):
        lines = (finished / "evaluation" / when / "held_out.jsonl").read_text().splitlines()
        right = sum(json.loads(line)["correct"] for line in lines)
        assert report["accuracy"]["held_out"][when] == right / len(lines) and len(lines) == 2
    rationales = [r for row in toy_rows(11) for r in row["rationales"]]
    assert report["questions"] == {"read": 11, "used": 9, "refused": 0, "held_out": 2, "all_wrong": 0}
    held_out = [json.loads(line)["id"] for line in lines]
    kept = [r for row in toy_rows(11) if row["id"] not in held_out for r in row["rationales"]]
    assert report["rationales"] == {
        **{"read": len(rationales), "used": len(kept), "cut": 0, "refused": 0, "unrecognised_closings": 0},
        "wrong": sum(r["teacher"] == "wrong" for r in kept),
    }
    assert report["seconds"] == pytest.approx(sum(report["seconds_by_phase"].values()))
    assert report["seconds"] >= rows[-1]["seconds"] > 0
    assert report["tokens_per_second"] in [row["tokens_per_second"] for row in rows]
    assert report["peak_memory_bytes"] == max(row["peak_memory_bytes"] for row in rows) > 1e7
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "torch", "transformers"} <= report["versions"].keys()


def test_the_recipe_in_the_folder_is_the_run_again(finished, toy, tmp_path, capsys):
    assert plain(read_recipe(str(finished / "recipe.yaml")))["student"]["model"] == str(toy / "student")
    assert main([str(finished / "recipe.yaml"), "--run", str(tmp_path / "again")]) == 0
    assert_same_run(finished, tmp_path / "again")
    before = (finished / "report.json").stat().st_mtime_ns
    assert main(flags(toy, finished, training__disable_tqdm=False)) == 0
    assert "finished" in capsys.readouterr().out and (finished / "report.json").stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------ strategies, real questions


@pytest.mark.parametrize(
    "strategy, options",
    [
        ("compact", {}),
        ("uniform", {"student__lora": None}),
        ("single", {"weights__teacher": "human"}),
        ("lowest_loss", {}),
        ("fixed", {"weights__fixed": '{"human": 2, "slip": 1}', "student__lora": None}),
    ],
)
def test_gsm8k_questions_train_under_every_strategy(toy, tmp_path, strategy, options):
    yes_no = [
        {"id": f"s{i}", "question": f"Is {i} more than 3?", "answer": "yes" if i > 3 else "no"} for i in range(6)
    ]
    letters = [
        {"id": f"c{i}", "question": "Where?", "options": dict(zip("ABCDE", "home sea hill road sky".split()))}
        for i in range(6)
    ]
    write_rows(tmp_path / "strategyqa.jsonl", yes_no)
    write_rows(tmp_path / "csqa.jsonl", [{**row, "answer": "ABCDE"[i % 5]} for i, row in enumerate(letters)])
    words = flags(
        toy,
        tmp_path / "run",
        student__model=toy / "long",
        data__train=GSM8K,
        strategy=strategy,
        evaluation__forgetting__strategyqa=tmp_path / "strategyqa.jsonl",
        evaluation__forgetting__csqa=tmp_path / "csqa.jsonl",
        evaluation__limit=3,
        training__max_steps=2,
        **{"data__max_length": 200, "student__lora__rank": None, **options},
    )
    if "student__lora" in options:
        words += ["--student.lora", "null"]
    assert main(["gsm8k", *words[1:]]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["strategy"] == strategy
    assert {name: task["split"] for name, task in report["accuracy"].items()} == {
        **{"held_out": "id", "strategyqa": "forgetting", "csqa": "forgetting"}
    }
    assert {"forgotten", "gained"} <= report["accuracy"]["csqa"]["changes"].keys()
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    alpha = {name: entry["alpha"] for name, entry in row["teachers"].items()}
    if strategy == "single":
        assert alpha == {"human": 1}
    if strategy == "uniform":
        assert alpha == pytest.approx(dict.fromkeys(alpha, 1 / 4)) and len(alpha) == 4
    if strategy == "fixed":
        assert alpha == pytest.approx({"human": 2 / 3, "slip": 1 / 3})
    if strategy == "compact":
        assert min(alpha.values()) > 0 and max(alpha.values()) > 0.3
    assert (report["rationales"]["wrong"] > 0) == (strategy != "single")  # of those trained on: only slips are wrong


def test_a_question_without_the_single_teacher_is_dropped_and_counted(toy, tmp_path, capsys):
    words = flags(toy, tmp_path / "run", strategy="single", weights__teacher="wrong", training__max_steps=1)
    assert main(words) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    held_out = {json.loads(line)["id"] for line in (tmp_path / "run/evaluation/after/held_out.jsonl").open()}
    rest = [row for row in toy_rows(11) if row["id"] not in held_out]
    without = [row for row in rest if len(row["rationales"]) == 2]
    assert report["questions"]["refused"] == len(without) > 0
    assert report["questions"]["used"] == report["rationales"]["used"] == len(rest) - len(without)
    out = capsys.readouterr().out
    assert f"{len(without)} × no rationale of a teacher that the strategy trains on" in out
    left_out = sum(len(row["rationales"]) for row in rest) - report["rationales"]["used"]
    assert f"{left_out} rationales of teachers that the strategy does not train on left out" in out


def test_a_held_out_file_is_counted_too_and_may_know_teachers_that_training_lacks(toy, tmp_path):
    held = toy_rows(8, seed=5)
    held[0]["rationales"].append({"teacher": "stranger", "completion": "I say so. The answer is 1."})
    held[1]["answer"] = ""
    file = write_rows(tmp_path / "held.jsonl", [{**row, "id": f"held-{row['id']}"} for row in held])
    run = tmp_path / "run"
    assert main(flags(toy, run, data__held_out=file, training__max_steps=2)) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["questions"]["held_out"] == 7 and report["questions"]["refused"] == 1
    assert report["accuracy"]["held_out"]["n"] == 7
    assert any("held.jsonl:2" in example for example in report["refusal_examples"])


def test_an_evaluation_task_with_questions_that_are_trained_on_is_named_before_training(toy, tmp_path, capsys):
    rows = toy_rows(8, seed=5)
    held_out = write_rows(tmp_path / "held.jsonl", [{**row, "id": f"held-{row['id']}"} for row in rows])
    trained = [json.loads(line) for line in (toy / "questions.jsonl").read_text().splitlines()[:3]]
    seen = [
        {"id": f"seen-{i}", "question": f" {row['prompt'].upper()}", "answer": "1"} for i, row in enumerate(trained)
    ]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": trained[0]["prompt"]}]
    new = {"id": "new", "question": "How many?", "answer": "2"}
    tasks = {"seen": [*seen, new], "chat": [{"id": "chat", "prompt": chat, "answer": "1"}], "new": [new]}
    files = {f"evaluation__tasks__{name}": write_rows(tmp_path / f"{name}.jsonl", of) for name, of in tasks.items()}
    words = flags(toy, tmp_path / "run", data__held_out=held_out, **files, evaluation__limit=4, training__max_steps=2)
    assert main(words) == 0
    out, report = capsys.readouterr().out, (tmp_path / "run" / "report.md").read_text()
    for told in ("seen: 3 of its 4 questions are trained on too", "chat: 1 of its 1 questions is trained on too"):
        assert told in out[: out.index("parameters train")] and told in report[: report.index("## Teachers")]
    assert "new: 1 of" not in out + report


def test_a_run_with_a_float32_head_is_read_in_the_students_own_dtype(toy, tmp_path):
    run = tmp_path / "run"
    whole = {"student__lora__rank": None, "student__lora": "null", "student__dtype": "bfloat16"}
    words = flags(toy, run, head_dtype="float32", difficulty__kind="ifd", **whole)
    assert main([*words, "--training.max_steps", "2"]) == 0 and (run / "report.md").exists()
    assert read_states(run, 2) and read_influence(run, 2)


def test_a_float32_head_over_a_narrow_student_is_refused_before_the_run_has_a_folder(toy, tmp_path, capsys):
    run = tmp_path / "run"
    narrow = {"head_dtype": "float32", "student__dtype": "bfloat16", "student__lora__rank": 2}
    assert main(flags(toy, run, **narrow)) == 2 and not run.exists()
    assert "this student's is in bfloat16" in capsys.readouterr().err


def test_what_the_strategy_does_not_train_on_is_not_named(toy, tmp_path, capsys):
    rows = toy_rows(12)
    for row in rows[:6]:
        row["rationales"] = [rationale for rationale in row["rationales"] if rationale["teacher"] != "terse"]
    data = write_rows(tmp_path / "mine.jsonl", rows)
    task = write_rows(tmp_path / "task.jsonl", [{"question": row["prompt"], "answer": "1"} for row in rows[:6]])
    words = flags(toy, tmp_path / "run", data__train=data, evaluation__tasks__left=task, training__max_steps=2)
    assert main([*words, "--strategy", "single", "--weights.teacher", "terse"]) == 0
    assert "trained on too" not in capsys.readouterr().out


def test_a_run_is_not_that_of_other_questions_finished_or_not(toy, tmp_path, capsys, monkeypatch):
    file = write_rows(tmp_path / "mine.jsonl", toy_rows(11))
    words = flags(toy, tmp_path / "run", data__train=file)
    with monkeypatch.context() as patch:
        patch.setattr("compact.train.save_student", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 130
    write_rows(file, toy_rows(10))
    assert main(words) == 2
    assert f"data.train changed since the run in {tmp_path / 'run'} began" in capsys.readouterr().err
    write_rows(file, toy_rows(11))
    assert main(words) == 0
    write_rows(file, toy_rows(10))
    assert main(words) == 2
    assert "data.train changed since the run" in capsys.readouterr().err
    file.unlink()
    assert main(words) == 0 and "holds this very run, finished" in capsys.readouterr().out


def test_the_embedded_example_is_found_where_its_run_was_moved(tmp_path, monkeypatch):
    monkeypatch.setattr("compact.demo._student", lambda folder, recipe: folder)
    here, there = tmp_path / "here", tmp_path / "there"
    recipe = from_dict({"run": str(here), "demo": {"questions": 8}})
    build(recipe)
    save_recipe(recipe, here / "recipe.yaml")
    here.rename(there)
    found = finished_recipe(there)
    assert found.data.train == str(there / "demo" / "train.jsonl")
    assert found.student.model == str(there / "demo" / "student")
    assert not here.exists()


def test_a_run_that_is_moved_with_its_questions_goes_on(toy, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    write_rows(here / "mine.jsonl", toy_rows(11))
    with monkeypatch.context() as patch:
        patch.setattr("compact.train.save_student", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(flags(toy, here / "run", data__train=here / "mine.jsonl")) == 130
    here.rename(there)
    assert main(flags(toy, there / "run", data__train=there / "mine.jsonl")) == 0


def test_consensus_of_sentence_embeddings_in_a_whole_run(toy, tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    words = flags(toy, tmp_path / "run", consensus__affinity="sentence", consensus__encoder=encoder)
    assert main([*words, "--training.max_steps", "2"]) == 0
    trace = json.loads((tmp_path / "run" / "analysis" / "after.json").read_text())
    before = json.loads((tmp_path / "run" / "analysis" / "before.json").read_text())
    assert trace["affinity"] == before["affinity"]  # the student has no part in it
