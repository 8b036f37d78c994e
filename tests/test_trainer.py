"""The trainer: the step's normalisation, resume, the table, and what it refuses."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

from compact.errors import UserError
from compact.metrics import read_metrics
from compact.strategies import Strategy, own_source
from compact.strategies.baselines import Uniform
from compact.trainer import CompactTrainer
from tests.processes import two_ranks
from tests.toy import toy_tokenizer
from tests.toy_run import toy_config, toy_model, toy_rows, toy_trainer


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def in_two_ranks(runs: dict[str, dict]) -> None:
    """Toy runs, one after the other."""
    done = two_ranks("tests.toy_run", json.dumps(runs))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
def test_accumulation_does_not_change_the_training(tmp_path, reduction):
    whole = toy_trainer(tmp_path / "a", batch=8, method={"sft_reduction": reduction}, optim="sgd")
    parts = toy_trainer(tmp_path / "b", batch=2, accumulate=4, method={"sft_reduction": reduction}, optim="sgd")
    start = parameters(whole)
    whole.train(), parts.train()
    moved = largest_difference(start, parameters(whole))
    assert moved > 1e-4
    assert largest_difference(parameters(whole), parameters(parts)) < 1e-3 * moved


def test_two_ranks_train_as_one_does(tmp_path):
    def settings(reduction):
        return {"method": {"sft_reduction": reduction}, "optim": "sgd", "max_grad_norm": 0.0}

    reductions = ("mean", "token")
    in_two_ranks({str(tmp_path / f"two-{r}"): {**settings(r), "batch": 2, "accumulate": 2} for r in reductions})
    for reduction in reductions:
        one = toy_trainer(tmp_path / f"one-{reduction}", batch=8, **settings(reduction))
        start = parameters(one)
        one.train()
        two = torch.load(tmp_path / f"two-{reduction}" / "parameters.pt", weights_only=True)
        assert largest_difference(parameters(one), two) < 1e-3 * largest_difference(parameters(one), start)
        tables = [read_metrics(tmp_path / f"{name}-{reduction}" / "metrics.jsonl") for name in ("one", "two")]
        for a, b in zip(*tables, strict=True):
            assert a["questions"] == b["questions"] == 8
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
            for name in a["teachers"]:
                assert a["teachers"][name] == pytest.approx(b["teachers"][name], rel=1e-3)


def test_one_teacher_under_token_is_transformers_own_loss(tmp_path):
    trainer = toy_trainer(
        tmp_path, method={"strategy": "single", "weights": {"teacher": "wordy"}, "sft_reduction": "token"}
    )
    items = [
        {**item, "rationales": [r for r in item["rationales"] if trainer.teacher_names[r["teacher"]] == "wordy"]}
        for item in trainer.train_dataset
    ]
    batch = trainer.data_collator(items[:5])
    trainer.model.eval()
    ours = trainer.compute_loss(trainer.model, batch).detach()
    total, count = 0.0, 0
    for item in items[:5]:
        ids = torch.tensor([item["prompt_ids"] + item["rationales"][0]["completion_ids"]])
        labels = ids.clone()
        labels[0, : len(item["prompt_ids"])] = -100
        targets = int((labels != -100).sum())
        total += trainer.model(input_ids=ids, labels=labels, use_cache=False).loss.detach().double() * targets
        count += targets
    assert float(ours) == pytest.approx(float(total / count), abs=1e-6)


def test_the_head_is_computed_in_the_precision_of_the_forward(tmp_path):
    """accelerate has autocast around the forward alone; transformers' own head is inside of it."""

    def result(inside, around, head_dtype="auto"):
        trainer = toy_trainer(tmp_path, method={"head_dtype": head_dtype})
        batch, forward = trainer.data_collator([trainer.train_dataset[i] for i in range(4)]), trainer.model.forward

        def under_autocast(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                return forward(*args, **kwargs)

        trainer.model.eval().forward = under_autocast
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            loss, found = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        loss.backward()
        return found.statistics.tokens.logprob, trainer.model.get_output_embeddings().weight.grad

    logprob, gradient = result(inside=True, around=False)
    assert torch.equal(result(inside=True, around=True)[0], logprob)
    assert gradient.dtype == torch.float32
    assert not torch.allclose(result(inside=False, around=False)[0], logprob, atol=1e-4, rtol=0)
    exact = result(inside=True, around=False, head_dtype="float32")[0]
    assert torch.equal(result(inside=True, around=True, head_dtype="float32")[0], exact)
    assert not torch.allclose(exact, logprob, atol=1e-4, rtol=0)


def test_a_float32_head_is_refused_where_the_head_is_not(tmp_path):
    with pytest.raises(
        UserError, match="head_dtype: float32 needs a head in float32, and this student's is in bfloat16"
    ):
        toy_trainer(tmp_path, method={"head_dtype": "float32"}, model=toy_model().bfloat16())


@pytest.mark.parametrize("strategy", ["compact", "uniform", "lowest_loss", "mind"])
def test_a_resumed_run_is_the_straight_run(tmp_path, strategy):
    method = {"strategy": strategy}
    settings = {"method": method, "epochs": 2, "save_strategy": "steps", "save_steps": 5, "logging_steps": 2}
    model = {"attention_dropout": 0.3}
    straight = toy_trainer(tmp_path / "straight", model=toy_model(**model), **settings)
    straight.train()
    killed = toy_trainer(tmp_path / "killed", model=toy_model(**model), **settings)
    killed.add_callback(_StopAfter(7))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert not list((tmp_path / "killed").glob("*/training_args.bin"))
    resumed = toy_trainer(tmp_path / "killed", model=toy_model(seed=9, **model), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-5"))
    assert largest_difference(parameters(straight), parameters(resumed)) == 0
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "killed")]
    for a, b in zip(*rows, strict=True):
        assert all(a.get(key) == b.get(key) for key in ("step", "loss", "teachers", "strategy"))


class _Learned(Strategy):
    """A strategy with a parameter and an optimizer of its own, as MIND will be."""

    divergence = "jsd"

    def __init__(self, config, teachers):
        super().__init__(config, teachers)
        self.score = torch.zeros(len(self.teachers), requires_grad=True)
        self.optimizer = torch.optim.Adam([self.score], lr=0.1)
        self.seen = 0

    def weights(self, statistics, context):
        score = self.score[context.teachers]
        return torch.cat(
            [part.softmax(0) for part in score.split(statistics.ragged.host.cu_questions.diff().tolist())]
        )

    def observe(self, statistics, context, alpha):
        assert not context.pooled.requires_grad and context.pooled.shape[0] == alpha.shape[0]
        ((self.score[context.teachers] + statistics.difficulty) ** 2).sum().backward()
        self.seen += 1

    def step(self, learning_rate=None):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self):
        return {"score": self.score.detach(), "optimizer": self.optimizer.state_dict(), "seen": self.seen}

    def load_state_dict(self, state):
        self.score.data.copy_(state["score"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seen = state["seen"]


def test_a_learned_strategy_of_one_s_own_trains_beside_the_student_and_resumes(tmp_path):
    settings = {"method": {"strategy": f"{__name__}:_Learned"}, "save_strategy": "steps", "save_steps": 3}
    straight = toy_trainer(tmp_path, **settings)
    straight.train()
    assert straight.strategy.score.abs().min() > 0
    resumed = toy_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.strategy.seen == straight.strategy.seen == 6
    assert torch.equal(resumed.strategy.score, straight.strategy.score)
    assert largest_difference(parameters(straight), parameters(resumed)) == 0


class _Talks(Uniform):
    def logs(self):
        return {"phase": "warm"}


def test_what_a_strategy_says_of_itself_is_numbers(tmp_path):
    with pytest.raises(UserError, match=r"logs\(\) say phase = 'warm'; each is one number"):
        toy_trainer(tmp_path, method={"strategy": f"{__name__}:_Talks"}).train()


def test_steps_by_another_source_of_a_strategy_of_one_s_own_do_not_follow(tmp_path, monkeypatch):
    source = tmp_path / "changed_later.py"
    source.write_text("from compact.strategies.baselines import Uniform\n\n\nclass Mine(Uniform):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"method": {"strategy": "changed_later:Mine"}, "save_strategy": "steps", "save_steps": 3}
    toy_trainer(tmp_path, **settings).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    toy_trainer(tmp_path, **settings).train(resume_from_checkpoint=checkpoint)
    source.write_text(source.read_text() + "    twice = True\n")
    own_source.cache_clear()  # another process
    with pytest.raises(UserError, match="checkpoint-3 is of a run whose strategy has changed since: bring back"):
        toy_trainer(tmp_path, **settings).train(resume_from_checkpoint=checkpoint)


def test_steps_of_another_number_of_questions_do_not_follow(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "epochs": 2}
    toy_trainer(tmp_path, batch=4, **settings).train()
    other = toy_trainer(tmp_path, batch=8, **settings)
    with pytest.raises(UserError, match="a run with 4 questions a step, this one has 8 .*Start as many processes"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    split = toy_trainer(tmp_path, batch=2, accumulate=2, **settings)  # the same step in other parts
    split.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert split.state.global_step == split.state.max_steps


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path):
    trainer = toy_trainer(tmp_path, save_strategy="steps", save_steps=2, logging_steps=2)
    trainer.add_callback(_Poison(trainer.model, after=3))
    with pytest.raises(UserError, match=r"not finite at step 4 .*\n?.*learning_rate"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_batch_without_targets_has_loss_zero_and_a_warning(tmp_path, caplog):
    from compact_kernels import Ragged

    trainer = toy_trainer(tmp_path)
    batch = trainer.data_collator(list(trainer.train_dataset)[:2])
    host = batch["ragged"]
    batch["labels"].fill_(-100)
    batch["ragged"] = Ragged.from_labels(batch["labels"], host.cu_seqlens, host.cu_questions)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
    assert "no token to predict" in caplog.text and "q0" in caplog.text


def test_each_metric_switched_off_leaves_the_weights(tmp_path):
    seen = {}
    for off in ("nothing", "adaptability", "consensus", "difficulty"):
        method = {} if off == "nothing" else {off: {"weight": 0.0}}
        trainer = toy_trainer(tmp_path / off, method=method)
        trainer.model.eval()
        result = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)[:6]), True)[1]
        seen[off] = result.alpha
    for off in ("adaptability", "consensus", "difficulty"):
        assert not torch.allclose(seen[off], seen["nothing"], atol=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        {"difficulty": {"kind": "ifd"}},
        {"difficulty": {"kind": "log_loss"}},
        {"consensus": {"affinity": "cosine", "temperature": 0.1}},
        {"consensus": {"centrality": "pagerank"}},
        {"consensus": {"centrality": "eigenvector"}},
        {"adaptability": {"span": "all", "length_norm": "mean"}},
        {"divergence": {"kind": "jsd", "weight": 1.0}},
    ],
)
def test_a_named_option_changes_the_training(tmp_path, method):
    default, other = toy_trainer(tmp_path / "default"), toy_trainer(tmp_path / "other", method=method)
    default.train(), other.train()
    assert largest_difference(parameters(default), parameters(other)) > 1e-6


def test_rows_of_the_data_format_are_taken_as_they_are_and_a_single_teacher_is_alone(tmp_path):
    trainer = CompactTrainer(
        toy_model(),
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        config=toy_config({"strategy": "single", "weights": {"teacher": "wrong"}}),
        train_dataset=datasets.Dataset.from_list(toy_rows(9)),
        processing_class=toy_tokenizer(),
    )
    assert len(trainer.train_dataset) == 6  # every third question lacks that teacher
    wrong = trainer.teacher_names.index("wrong")
    assert all([r["teacher"] for r in item["rationales"]] == [wrong] for item in trainer.train_dataset)


def test_held_out_loss_is_the_loss_without_training(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    batch = trainer.data_collator(list(trainer.eval_dataset))
    trainer.model.eval()
    expected = float(trainer.compute_loss(trainer.model, batch))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert not trainer.table._pending and trainer.table._open is None


@pytest.mark.parametrize(
    "training, message",
    [
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_settings_that_would_be_wrong_silently_are_refused(tmp_path, training, message):
    with pytest.raises(UserError, match=message):
        toy_trainer(tmp_path, **training)


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, save_strategy="steps", save_steps=2)
    write = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        return write(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="step 4 could not be written.*No space left.*last one"):
        trainer.train()
    assert [p.name for p in tmp_path.iterdir() if "checkpoint" in p.name] == ["checkpoint-2"]


def test_shifted_targets_never_cross_sequences(tmp_path):
    from compact.loss import targets_of

    trainer = toy_trainer(tmp_path)
    batch = trainer.data_collator(list(trainer.train_dataset)[:3])
    targets, ragged = targets_of(batch), batch["ragged"]
    scored = F.one_hot(ragged.rows, targets.numel()).sum(0).bool()
    assert torch.equal(targets != -100, scored)
    assert torch.equal(targets[ragged.rows], batch["input_ids"][0, ragged.rows + 1])


class _StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class _Poison(TrainerCallback):
    def __init__(self, model, after: int) -> None:
        self.model, self.after = model, after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            with torch.no_grad():
                self.model.get_output_embeddings().weight[0] = float("nan")
