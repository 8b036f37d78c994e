"""Runs that are killed, break on the way or have two processes: the same command goes on to the same end."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compact.analyze
import compact.train
from compact.metrics import MetricsTable, read_metrics
from compact.run_folder import locked
from compact.train import main
from compact.trainer import CompactTrainer
from tests.processes import ROOT
from tests.toy import toy_tokenizer
from tests.toy_run import save_student, toy_model, toy_rows, write_rows
from tests.train_cases import assert_same_run, environment, flags, table

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


def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on_from_the_one_before(
    refused, finished, toy, tmp_path, capsys
):
    run = tmp_path / "run"
    gone = shutil.ignore_patterns("student", "report.*", "after", "after.json")
    shutil.copytree(finished, run, ignore=gone)
    before, last = sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = (last / "optimizer.pt").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        (last / "optimizer.pt").write_bytes(damaged)
        refused(f"the last checkpoint, {last}, cannot be read", trained=True, training__disable_tqdm=False)
    shutil.rmtree(last)
    assert main(flags(toy, run, training__disable_tqdm=False)) == 0
    assert f"going on from step {before.name.rpartition('-')[2]}" in capsys.readouterr().out
    assert_same_run(finished, run)


def test_a_run_that_is_under_way_is_not_run_twice(refused, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report.*"))
    with locked(tmp_path / "run"):
        refused("another run is writing to it", "with --run", trained=True, training__disable_tqdm=False)
        ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        (tmp_path / "run" / ".lock").write_text(f"{int(ended.stdout)} {socket.gethostname()}")
        said = f"one that process {int(ended.stdout)}, which has ended, had started"
        refused(said, trained=True, training__disable_tqdm=False)


def test_a_run_killed_while_it_writes_goes_on_to_the_same_end(finished, toy, tmp_path, monkeypatch):
    words = flags(toy, tmp_path / "run", training__disable_tqdm=False)

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
    assert not list((run / "checkpoints").glob(".*")) and list(run.glob(".*")) == [run / ".lock"]
    assert_same_run(finished, run)


class Killed(BaseException):
    pass


def killed_in(name: str, words: list[str], call: int = 1) -> None:
    """The command, until compact.train's `name`, or the trainer's, is called for the `call`th time."""
    owner = CompactTrainer if hasattr(CompactTrainer, name) else compact.train
    real, calls = getattr(owner, name), []

    def die(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(Killed):
            main(words)


def test_a_report_on_a_run_under_way_does_not_end_it(finished, toy, tmp_path):
    run = tmp_path / "run"
    words = flags(toy, run, training__disable_tqdm=False)
    killed_in("training_step", words, call=6)
    assert compact.analyze.main([str(run)]) == 0
    assert not json.loads((run / "report.json").read_text())["finished"]
    assert "**The run is not finished.**" in (run / "report.md").read_text()
    assert main(words) == 0
    assert_same_run(finished, run)
    assert json.loads((run / "report.json").read_text())["finished"]
    assert compact.analyze.main([str(run)]) == 0
    assert json.loads((run / "report.json").read_text())["finished"]


@pytest.mark.parametrize("length", [{"training__max_steps": 7}, {"training__num_train_epochs": 1.5}])
def test_a_run_that_ended_within_an_epoch_takes_no_further_step(toy, tmp_path, length):
    options = {"training__lr_scheduler_type": "constant", **length}
    assert main(flags(toy, tmp_path / "whole", **options)) == 0
    words = flags(toy, tmp_path / "run", **options)
    for name in ("save_student", "write_report"):
        killed_in(name, words)
    assert main(words) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_that_lacks_a_file_is_named(refused, toy, tmp_path):
    run = tmp_path / "run"
    killed_in("save_student", flags(toy, run))
    last = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for name in ("optimizer.pt", "rng_state.pth", "adapter_model.safetensors"):
        (last / name).rename(tmp_path / name)
        refused(f"the checkpoint {last} is not whole: it has no {name}. Remove it", trained=True)
        (tmp_path / name).rename(last / name)
    assert main(flags(toy, run)) == 0


def test_what_was_measured_of_information_is_there_after_a_resumption(toy, tmp_path):
    words = flags(toy, tmp_path / "run", information__every=1, training__logging_steps=50)
    killed_in("training_step", words, call=6)
    assert main(words) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "information.jsonl")] == list(range(1, 11))


def test_a_damaged_row_of_the_table_is_named_and_none_is_lost(refused, toy, tmp_path):
    run = tmp_path / "run"
    killed_in("save_student", flags(toy, run))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:-1], *lines[2:]]) + "\n")
    refused(f"{run / 'metrics.jsonl'}:2: a damaged line", trained=True)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(lines)


def test_a_run_does_not_go_on_with_another_student_or_other_tasks(refused, toy, tmp_path):
    run, task, texts = tmp_path / "run", tmp_path / "task.jsonl", tmp_path / "texts.jsonl"
    student = shutil.copytree(toy / "student", tmp_path / "student")
    write_rows(task, [{"question": "1+1?", "answer": "2"}])
    write_rows(texts, [{"text": "Tom has eggs."}])
    options = {
        "student__model": student,
        "evaluation__tasks__sums": task,
        "evaluation__held_text": texts,
        "training__max_steps": 2,
    }
    killed_in("save_student", flags(toy, run, **options))
    save_student(student, seed=1)
    refused(f"student.model changed since the run in {run} began", trained=True, **options)
    save_student(student)
    write_rows(task, [{"question": "1+2?", "answer": "3"}])
    write_rows(texts, [{"text": "Tom has no eggs."}])
    refused("evaluation.held_text and evaluation.tasks.sums changed since", trained=True, **options)
    write_rows(task, [{"question": "1+1?", "answer": "2"}])
    write_rows(texts, [{"text": "Tom has eggs."}])
    assert main(flags(toy, run, **options)) == 0
    save_student(student, seed=1)  # of a finished run too
    refused("student.model changed since", trained=True, **options)


# ----------------------------------------------------------------------------------------------------- two processes

ON_CPUS = {"CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # there may be fewer GPUs than processes


def test_two_processes_run_the_same_command(finished, toy, tmp_path):
    (tmp_path / "home").mkdir()
    options = {"training__per_device_train_batch_size": 1, "training__max_steps": 3, "training__disable_tqdm": False}
    words = flags(toy, tmp_path / "run", **options)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "--", "compact.train", *words],
        env={**environment(tmp_path / "home"), **ON_CPUS},
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
    options["student__dtype"] = "float32"  # in the processes that see no GPU and in this one
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / "compact" / "recipes" / "accelerate" / "fsdp2.yaml")]
    words, runs = flags(tmp_path, tmp_path / "two", **options), 1 + resumes
    for run in range(runs):
        done = subprocess.run(
            [*launch, "-m", "tests.distributed_train", *words],
            env={**environment(tmp_path / "home"), **ON_CPUS, "ACCELERATE_TORCH_DEVICE": "cpu"},
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

    words = flags(toy, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(CompactTrainer, "training_step", interrupted)
        assert main(words) == 130
    said = capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("compact.train.load_student", interrupted)
        assert main(flags(toy, tmp_path / "early")) == 130
    assert "the same command goes on with training from its start" in capsys.readouterr().err
    assert "the same command goes on with training from its start: there is no checkpoint yet" in said
    monkeypatch.setattr("compact.train.save_student", interrupted)
    assert main(words) == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err
