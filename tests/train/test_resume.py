"""Runs that are killed, break on the way or have two processes: the same command goes on to the same end."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

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
    assert not list((run / "checkpoints").glob(".*")) and list(run.glob(".*")) == [run / ".lock"]
    assert_same_run(finished, run)


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

    monkeypatch.setattr(CompactTrainer, "training_step", interrupted)
    assert main(flags(toy, tmp_path / "run")) == 130
    assert "the same command goes on" in capsys.readouterr().err
