"""`python -m compact.train`, end to end on a toy student: what a run leaves, resume, strategies, bad input."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, T5Config, T5Model
from transformers.trainer_pt_utils import safe_globals

import compact.analyze
import compact.train
from compact.config import read_recipe
from compact.metrics import MetricsTable, read_metrics
from compact.options import plain
from compact.train import main
from compact.trainer import CompactTrainer
from tests.test_embed import save_encoder
from tests.toy import toy_tokenizer
from tests.toy_run import toy_model, toy_rows

ROOT = Path(__file__).parent.parent
GSM8K = ROOT / "compact" / "recipes" / "data" / "gsm8k_four_teachers_32.jsonl"
QUICK = {
    "data.max_length": 128,
    "student.lora.rank": 4,
    "training.per_device_train_batch_size": 2,
    "training.num_train_epochs": 2,
    "training.learning_rate": 0.01,
    "training.logging_steps": 2,
    "training.save_strategy": "steps",
    "training.save_steps": 2,
    "training.disable_tqdm": True,
    "evaluation.max_new_tokens": 4,
}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSON lines; what is text already is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def save_student(folder: Path, **settings: Any) -> Path:
    toy_model(**settings).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than a toy run; `finished`, in a process of its own, has them."""
    monkeypatch.setattr(compact.analyze, "_draw", lambda run, content: {})


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A folder with a student, its twin with a long context, 11 questions and a recipe that says nothing."""
    folder = tmp_path_factory.mktemp("toy")
    save_student(folder / "student")
    save_student(folder / "long", max_position_embeddings=1024)
    write_rows(folder / "questions.jsonl", toy_rows(11))
    (folder / "recipe.yaml").write_text("strategy: compact\n")
    return folder


def flags(toy: Path, run: Path, **options: Any) -> list[str]:
    """The words of a command line. A key with dots is given as `student__model`; None leaves a key out."""
    given = {**QUICK, "student.model": toy / "student", "data.train": toy / "questions.jsonl", "run": run}
    given |= {name.replace("__", "."): value for name, value in options.items()}
    words = [str(toy / "recipe.yaml")]
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value, default=str).strip('"')]
    return words


def environment(home: Path) -> dict[str, str]:
    """Of a process whose home and caches are in `home`."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV") if name in os.environ}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def table(run: Path) -> list[dict[str, Any]]:
    """A run's rows without what a clock or the memory says."""
    rows = read_metrics(run / "metrics.jsonl")
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Parameters, table and predictions, to the last bit."""
    assert table(one) == table(other)
    a, b = (load_file(run / "student" / "model.safetensors") for run in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for when in ("before", "after"):
        a, b = ((run / "evaluation" / when / "held_out.jsonl").read_text() for run in (one, other))
        assert a == b


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory) -> Path:
    """The folder of a run in a process of its own, whose home and working folder were empty."""
    folder = tmp_path_factory.mktemp("finished")
    for name in ("home", "here"):
        (folder / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "compact.train", *flags(toy, folder / "run", training__disable_tqdm=False)],
        cwd=folder / "here",
        env=environment(folder / "home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def test_nothing_is_written_outside_the_runs_folder(finished):
    assert not files(finished.parent / "here")
    elsewhere = {name for name in files(finished.parent / "home") if not name.startswith(".cache/matplotlib/")}
    assert not elsewhere


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
    assert top == {"analysis", "cache", "checkpoints", "evaluation", "pictures", "student"}


def test_the_output_is_only_what_a_person_needs(finished):
    out, err = ((finished.parent / name).read_text() for name in ("stdout", "stderr"))
    assert out.splitlines()[0].startswith("9 of 11 questions used, 2 held out, 0 refused")
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
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id
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


# ------------------------------------------------------------------------------------------------------------ resume


def test_a_killed_run_goes_on_to_the_same_end(finished, toy, tmp_path):
    words = flags(toy, tmp_path / "run", training__disable_tqdm=False)
    (tmp_path / "home").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "compact.train", *words],
        env=environment(tmp_path / "home"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.Random().uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "report.json").exists()
    assert main(words) == 0
    assert_same_run(finished, tmp_path / "run")


def test_a_run_killed_while_it_writes_goes_on_to_the_same_end(finished, toy, tmp_path, monkeypatch):
    words = flags(toy, tmp_path / "run", training__disable_tqdm=False)

    class Killed(BaseException):
        pass

    def die(self, *arguments):
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        save = CompactTrainer._save_checkpoint
        patch.setattr(
            CompactTrainer,
            "_save_checkpoint",
            lambda self, *a: (die if self.state.global_step == 6 else save)(self, *a),
        )
        with pytest.raises(Killed):
            main(words)
    assert (run / "checkpoints" / "checkpoint-4").is_dir() and not (run / "checkpoints" / "checkpoint-6").exists()
    half = run / "checkpoints" / ".checkpoint-6.writing" / "checkpoint-6"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "epoch": 1.4, "lo')
    (run / ".student.writing").mkdir()
    assert main(words) == 0
    assert not list((run / "checkpoints").glob(".*")) and not list(run.glob(".*"))
    assert_same_run(finished, run)


def test_two_processes_run_the_same_command(finished, toy, tmp_path):
    (tmp_path / "home").mkdir()
    options = {"training__per_device_train_batch_size": 1, "training__max_steps": 3, "training__disable_tqdm": False}
    words = flags(toy, tmp_path / "run", **options)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "--", "compact.train", *words],
        env={**environment(tmp_path / "home"), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((run / "report.json").read_text()) for run in (finished, tmp_path / "run"))
    assert done.stdout.count("questions used") == 1 and done.stdout.count("report: ") == 1
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert one.keys() == two.keys() and one["accuracy"].keys() == two["accuracy"].keys()
    assert one["accuracy"]["held_out"]["before"] == two["accuracy"]["held_out"]["before"]
    assert one["questions"] == two["questions"] and one["rationales"] == two["rationales"]
    assert [row["questions"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [2] * 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")


@pytest.mark.parametrize(
    "options, resumes",
    [
        ({"student__lora": "null", "student__lora__rank": None, "gradients__norms": "exact"}, False),
        ({"student__lora__dropout": 0.0, "strategy": "mind", "information__every": 2}, True),
    ],
)
def test_fsdp2_trains_as_one_process_does(tmp_path, options, resumes):
    """The real configuration, whose units accelerate cuts: embedding, final norm and head share a weight in one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "recipe.yaml").write_text("strategy: compact\n")
    save_student(tmp_path / "student", tie_word_embeddings=True)
    write_rows(tmp_path / "questions.jsonl", toy_rows(20))
    options = {**options, "training__max_steps": 4, "training__use_cpu": False, "evaluation__limit": 4}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / "compact" / "recipes" / "accelerate" / "fsdp2.yaml")]
    words, runs = flags(tmp_path, tmp_path / "two", **options), 1 + resumes
    for run in range(runs):
        done = subprocess.run(
            [*launch, "-m", "tests.distributed_train", *words],
            env={**environment(tmp_path / "home"), "ACCELERATE_TORCH_DEVICE": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        assert "Warning" not in done.stderr and "fully_shard" not in done.stderr
        assert (tmp_path / "two" / "checkpoints" / "checkpoint-4" / "pytorch_model_fsdp.bin").exists()
        if run + 1 < runs:  # as if it had been killed after two steps
            (tmp_path / "two").rename(tmp_path / "straight")
            gone = shutil.ignore_patterns("checkpoint-4", "student", "report.*", "after", "after.json")
            shutil.copytree(tmp_path / "straight", tmp_path / "two", ignore=gone)
    if resumes:
        assert_same_run(tmp_path / "straight", tmp_path / "two")

    options |= {"training__per_device_train_batch_size": 4, "training__use_cpu": True}
    assert main(flags(tmp_path, tmp_path / "one", **options)) == 0
    for one, two in zip(table(tmp_path / "one"), table(tmp_path / "two"), strict=True):
        assert one["questions"] == two["questions"] == 4
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        for name, entry in one["teachers"].items():
            assert entry == pytest.approx(two["teachers"][name], rel=1e-3)
    start, one, two = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("student", "one/student", "two/student")
    )
    assert start.keys() == one.keys() == two.keys()
    moved = max((one[name] - start[name]).abs().max() for name in one)
    assert moved > 1e-3 and max((one[name] - two[name]).abs().max() for name in one) < 1e-2 * moved
    student, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "student", output_loading_info=True)
    assert not loading["missing_keys"] and student.config.tie_word_embeddings


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
    assert f"{len(without)} × no rationale of a teacher that the strategy trains on" in capsys.readouterr().out


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


def test_a_run_does_not_go_on_with_other_questions(toy, tmp_path, capsys, monkeypatch):
    file = write_rows(tmp_path / "mine.jsonl", toy_rows(11))
    words = flags(toy, tmp_path / "run", data__train=file)
    with monkeypatch.context() as patch:
        patch.setattr("compact.train.save_student", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 130
    write_rows(file, toy_rows(10))
    assert main(words) == 2
    assert "the questions have changed since the run" in capsys.readouterr().err
    write_rows(file, toy_rows(11))
    assert main(words) == 0


def test_consensus_of_sentence_embeddings_in_a_whole_run(toy, tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    words = flags(toy, tmp_path / "run", consensus__affinity="sentence", consensus__encoder=encoder)
    assert main([*words, "--training.max_steps", "2"]) == 0
    trace = json.loads((tmp_path / "run" / "analysis" / "after.json").read_text())
    before = json.loads((tmp_path / "run" / "analysis" / "before.json").read_text())
    assert trace["affinity"] == before["affinity"]  # the student has no part in it


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(toy, tmp_path, capsys):
    """Run with options; expect exit code 2, one message that holds every needle, and no training."""

    def check(*needles: str, rows: list[Any] | None = None, trained: bool = False, **options: Any) -> str:
        if rows is not None:
            options["data__train"] = write_rows(tmp_path / "bad.jsonl", rows)
        run = Path(options.pop("run", tmp_path / "run"))
        capsys.readouterr()
        assert main(flags(toy, run, **options)) == 2
        out, err = capsys.readouterr()
        said = err[err.index("compact.train: ") :]
        assert "Traceback" not in err and said.count("compact.train: ") == 1
        for needle in needles:
            assert needle in said, said
        assert trained or not (run / "metrics.jsonl").exists()
        return said

    return check


def test_a_file_that_is_damaged_or_contradicts_itself_stops_the_run(refused, tmp_path):
    good, bad = toy_rows(4), f"{tmp_path / 'bad.jsonl'}:"
    refused(f"{tmp_path}/none.jsonl: no such file", "give a file", data__train=tmp_path / "none.jsonl")
    refused(bad + "2: broken JSON", "one complete JSON object a line", rows=[good[0], '{"id": "x", "prompt": '])
    refused("no usable question", "A row looks like this", rows=[])
    refused(bad + "1 and ", bad + "3", "id 'q0'", "its own 'id'", rows=[*good[:2], {**good[2], "id": "q0"}])
    twice = {**good[1], "rationales": [*good[1]["rationales"], good[1]["rationales"][0]]}
    refused(bad + "2, rationale 4", "teacher 'terse' a second time", "keep one", rows=[good[0], twice])
    refused("one question alone", "at least two", rows=good[:1])


@pytest.mark.parametrize("field", ["prompt", "answer", "rationales"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_row_without_a_field_is_refused_by_file_line_and_field(refused, toy, tmp_path, capsys, field, how):
    rows = toy_rows(6)
    row = {**rows[3], field: [] if field == "rationales" else ""}
    if how == "missing":
        del row[field]
    refused("no usable question", f"{tmp_path / 'bad.jsonl'}:1: field '{field}' is missing", rows=[row])
    rows[3] = row
    train = write_rows(tmp_path / "bad.jsonl", rows)
    if (how, field) == ("missing", "answer"):  # the others train
        assert main(flags(toy, tmp_path / "rest", data__train=train, training__max_steps=1)) == 0
        assert f"{train}:4: field '{field}' is missing" in capsys.readouterr().out
        report = json.loads((tmp_path / "rest" / "report.json").read_text())
        assert report["questions"]["refused"] == 1 and report["questions"]["used"] == 4


def test_questions_with_none_but_wrong_rationales_are_flagged_counted_and_used(toy, tmp_path, capsys):
    rows = [
        {
            **row,
            "rationales": [
                {"teacher": name, "completion": f"Hm. The answer is {n}."} for n, name in ((998, "a"), (999, "b"))
            ],
        }
        for row in toy_rows(6)
    ]
    train = write_rows(tmp_path / "wrong.jsonl", rows)
    assert main(flags(toy, tmp_path / "run", data__train=train, training__max_steps=1)) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["questions"]["all_wrong"] == report["questions"]["used"] == 5
    assert report["rationales"]["wrong"] == 10
    assert "every rationale wrong: 5 questions" in capsys.readouterr().out


def test_what_is_longer_than_the_context_is_said_before_training(refused, toy, tmp_path):
    refused("data.max_length: 300", "which is 256", "set data.max_length to 256 or less", data__max_length=300)
    suffix = "\nThe answer" + " is very long" * 60 + " {answer}."
    refused(
        "prompt and suffix alone are longer than data.max_length",
        "question 'q",
        "shorten data.suffix",
        data__suffix=suffix,
    )
    absolute = tmp_path / "gpt2"  # learned positions: there is nothing at all beyond the last
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **tokens)).save_pretrained(absolute)
    toy_tokenizer().save_pretrained(absolute)
    refused(f"more than {absolute} can read, which is 64", student__model=absolute)


def test_a_student_that_cannot_be_used_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        f"student.model={tmp_path / 'empty'}", "not a causal LM", "Give a folder", student__model=tmp_path / "empty"
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=384, **sizes)).save_pretrained(tmp_path / "bert")
    T5Model(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=384)).save_pretrained(
        tmp_path / "t5"
    )
    for name, needle in (("bert", "which would be random"), ("t5", "not a causal LM")):
        toy_tokenizer().save_pretrained(tmp_path / name)
        refused(needle, student__model=tmp_path / name)
    refused("output head carries an adapter", "student.lora.targets", student__lora__targets="[lm_head]")


@pytest.mark.parametrize(
    "options, needles",
    [
        ({"adaptability__spam": "all"}, ["--adaptability.spam: unknown key", "did you mean adaptability.span?"]),
        ({"training__learning_rat": 1}, ["--training.learning_rat", "did you mean learning_rate?"]),
        ({"weights__temperature": 0}, ["--weights.temperature: 0 is out of range: above 0"]),
        ({"data__holdout": 1.5}, ["--data.holdout: 1.5 is out of range"]),
        ({"training__learning_rate": -1}, ["training.learning_rate: -1 is out of range: at least 0"]),
        ({"training__per_device_train_batch_size": 0}, ["training.per_device_train_batch_size: 0 is out of range"]),
        ({"training__num_train_epochs": 0}, ["training.num_train_epochs: 0 trains nothing", "max_steps"]),
        ({"training__logging_steps": 0}, ["training: ", "logging_steps"]),
        (
            {"training__load_best_model_at_end": True},
            ["training.load_best_model_at_end", "nothing is evaluated in between"],
        ),
        ({"strategy": "single", "weights__teacher": "word"}, ["weights.teacher", "'word'", "terse, wordy, wrong"]),
        ({"strategy": "single"}, ["weights.teacher: strategy single needs it"]),
        ({"evaluation__tasks__svamp": "/nowhere.jsonl"}, ["task svamp: there is no file /nowhere.jsonl"]),
        ({"consensus__affinity": "sentence"}, ["consensus.encoder: affinity sentence needs it"]),
    ],
)
def test_a_key_or_value_that_cannot_be_is_refused_by_name(refused, options, needles):
    refused(*needles, **options)


def test_an_output_folder_that_is_not_this_run_is_left_alone(refused, finished, tmp_path):
    before = {name: (finished / name).stat().st_mtime_ns for name in files(finished)}
    refused(
        f"{finished} holds another run: seed is 0 there and 5 here",
        "--run",
        **{"run": finished, "seed": 5, "training__disable_tqdm": False, "trained": True},
    )
    assert {name: (finished / name).stat().st_mtime_ns for name in files(finished)} == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    refused("is not empty and holds no run", "--run", run=tmp_path / "thesis")
    assert files(tmp_path / "thesis") == {"chapter.tex"}
    refused("is a file, and a run needs a folder", run=tmp_path / "thesis" / "chapter.tex")


def test_a_command_that_failed_before_its_run_began_may_be_mended(refused, toy, tmp_path):
    refused("no such file", data__train=tmp_path / "none.jsonl")
    refused("there is no file", rows=toy_rows(9), evaluation__tasks__svamp="/nowhere.jsonl")  # after reading its data
    assert main(flags(toy, tmp_path / "run", training__max_steps=1)) == 0


# --------------------------------------------------------------------------------------------- what breaks on the way


def full_disk(patch, owner: Any, name: str, limit: int, at: int = 0) -> None:
    """The disk is full while `owner.name` writes, the call with number `at`: no file may grow beyond `limit` bytes."""
    function, calls = getattr(owner, name), iter(range(10_000))

    def limited(*arguments, **options):
        if next(calls) != at:
            return function(*arguments, **options)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores SIGXFSZ: writes fail with EFBIG
        try:
            return function(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    patch.setattr(owner, name, limited)


@pytest.mark.parametrize(
    "owner, name, limit, at, needles",
    [
        (CompactTrainer, "_save_checkpoint", 16_000, 1, ["checkpoint of step 4 could not be written", "make room"]),
        (MetricsTable, "_append", 4_000, 3, ["cannot write", "metrics.jsonl", "make room", "the same command"]),
        (compact.train, "save_student", 16_000, 0, ["student could not be written", "Make room", "same command"]),
        (compact.train, "evaluate_tasks", 400, 1, ["cannot write", "held_out.jsonl", "make room"]),
    ],
    ids=["checkpoint", "metrics", "student", "evaluation"],
)
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    refused, finished, toy, tmp_path, monkeypatch, owner, name, limit, at, needles
):
    with monkeypatch.context() as patch:
        full_disk(patch, owner, name, limit, at)
        refused(*needles, "File too large", trained=True, training__disable_tqdm=False)
    run = tmp_path / "run"
    assert not (run / "report.json").exists() and not list((run / "checkpoints").glob(".*"))
    assert main(flags(toy, run, training__disable_tqdm=False)) == 0
    assert_same_run(finished, run)


def test_a_disk_that_is_full_from_the_start_is_said(refused, monkeypatch):
    full_disk(monkeypatch, compact.train, "training_data", 100)
    assert "too large" in refused("make room", "same command")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    refused, finished, toy, tmp_path, monkeypatch
):
    step = CompactTrainer.training_step

    def poisoned(self, model, *arguments, **options):
        if self.state.global_step == 4:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return step(self, model, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(CompactTrainer, "training_step", poisoned)
        refused(
            *("the loss is not finite at step 5 on questions q", "loss nan", "lower training.learning_rate"),
            trained=True,
            training__disable_tqdm=False,
        )
    run = tmp_path / "run"
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    kept = load_file(run / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert not (run / "checkpoints" / "checkpoint-6").exists() and not (run / "student").exists()
    assert main(flags(toy, run, training__disable_tqdm=False)) == 0
    assert_same_run(finished, run)


def test_a_student_that_is_not_finite_itself_is_said_to_be(refused, tmp_path):
    model = toy_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "rotten")
    toy_tokenizer().save_pretrained(tmp_path / "rotten")
    refused("not finite", "student's weights", student__model=tmp_path / "rotten")
    assert not (tmp_path / "run" / "student").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_ctrl_c_ends_without_a_traceback_and_says_how_to_go_on(toy, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(CompactTrainer, "training_step", interrupted)
    assert main(flags(toy, tmp_path / "run")) == 130
    assert "the same command goes on" in capsys.readouterr().err
