"""Gradient norms in the trainer: influence by teacher in the table, log and report; the noise scale; the cap."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from compact.config import LoraConfig
from compact.errors import UserError
from compact.information import BINS
from compact.metrics import read_metrics
from compact.student import add_lora
from compact_kernels.sample_norms.cap import capped
from tests.norm_cases import batch
from tests.test_trainer import in_two_ranks
from tests.toy_run import toy_config, toy_model, toy_trainer

NORMS = {"gradients": {"norms": "exact"}}


def influences(path) -> list[dict[str, float]]:
    rows = read_metrics(path / "metrics.jsonl")
    return [{name: entry["influence"] for name, entry in row["teachers"].items()} for row in rows]


def test_a_lone_rationales_influence_is_the_steps_gradient_norm(tmp_path):
    method = {"strategy": "single", "weights": {"teacher": "terse"}, **NORMS}
    toy_trainer(tmp_path, questions=4, batch=1, method=method, max_grad_norm=0.0).train()
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert row["teachers"]["terse"]["influence"] == pytest.approx(row["grad_norm"], rel=1e-4)
        assert "noise_trace" not in row


def test_influence_does_not_depend_on_accumulation_or_ranks_and_training_is_the_same(tmp_path):
    common = {"questions": 8, "optim": "sgd", "epochs": 1}
    plain = toy_trainer(tmp_path / "plain", batch=8, **common)
    whole = toy_trainer(tmp_path / "whole", batch=8, method=NORMS, **common)
    parts = toy_trainer(tmp_path / "parts", batch=2, accumulate=4, method=NORMS, **common)
    for trainer in (plain, whole, parts):
        trainer.train()
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(whole.model.get_parameter(name), parameter)
    assert not any("_sample_norms" in vars(module) for module in whole.model.modules())
    in_two_ranks({str(tmp_path / "ranks"): {"batch": 4, "method": NORMS, **common}})
    expected = influences(tmp_path / "whole")
    assert all(value > 0 for value in expected[0].values())
    for other in ("parts", "ranks"):
        for found, truth in zip(influences(tmp_path / other), expected, strict=True):
            assert found == pytest.approx(truth, rel=1e-3)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("whole", "parts", "ranks")]
    for row in rows[1:]:
        assert row["noise_trace"] == pytest.approx(rows[0]["noise_trace"], rel=1e-2)
    assert "influence" not in read_metrics(tmp_path / "plain" / "metrics.jsonl")[0]["teachers"]["terse"]


class _Logs(TrainerCallback):
    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.names |= set(logs or ())


def test_the_log_names_influence_and_the_estimate_is_one_of_the_options(tmp_path):
    model = add_lora(toy_model(), LoraConfig(rank=2, dropout=0.0))
    trainer = toy_trainer(
        tmp_path, questions=8, method={"gradients": {"norms": "hutchinson", "probes": 4}}, model=model
    )
    logs = _Logs()
    trainer.add_callback(logs)
    trainer.train()
    assert {"influence/terse", "influence/wordy", "influence/wrong"} <= logs.names


def test_a_cap_bounds_every_rationales_gradient_at_the_last_hidden_state():
    _, _, ragged = batch()
    total = int(ragged.cu_seqlens[-1])
    hidden = torch.randn(total, 6, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(total, 6, dtype=torch.float64)
    gradient[:7] *= 1e-3
    gradient[7:9] = 0
    capped(hidden, ragged, 0.5).backward(gradient)
    norms = [hidden.grad[a:b].norm() for a, b in zip(ragged.cu_seqlens, ragged.cu_seqlens[1:])]
    torch.testing.assert_close(torch.stack(norms[2:]), torch.full((2,), 0.5, dtype=torch.float64))
    assert torch.equal(hidden.grad[:9], gradient[:9])
    with pytest.raises(ValueError, match="cap is 0; it must be above 0"):
        capped(hidden, ragged, 0)


def test_a_capped_run_trains_with_lora_and_a_trained_head_is_refused(tmp_path):
    method = {"gradients": {"norms": "exact", "cap": 1e-4}}
    model = add_lora(toy_model(), LoraConfig(rank=2, dropout=0.0))
    toy_trainer(tmp_path / "a", questions=8, method=method, model=model).train()
    free = add_lora(toy_model(), LoraConfig(rank=2, dropout=0.0))
    toy_trainer(tmp_path / "b", questions=8, method=NORMS, model=free).train()
    small, large = influences(tmp_path / "a")[0], influences(tmp_path / "b")[0]  # of one student, with one α
    assert all(0 < small[name] < 0.5 * large[name] for name in small)
    whole = toy_trainer(tmp_path / "c", questions=8, method=method)
    with torch.no_grad():  # as the report looks at the merged student
        whole.compute_loss(whole.model, next(iter(whole.get_train_dataloader())))
    with pytest.raises(UserError, match="gradients.cap: the output head trains"):
        whole.train()


def test_a_cap_by_last_norms_bounds_a_trained_heads_gradient_too(tmp_path):
    """A student that hardly moves: the second epoch's norms are at the cap where they were above it."""
    common = {"questions": 8, "batch": 8, "epochs": 2, "learning_rate": 1e-7, "optim": "sgd", "max_grad_norm": 0.0}
    uniform = {"strategy": "uniform", "divergence": {"weight": 0.0}}
    toy_trainer(tmp_path / "free", method={**uniform, **NORMS}, **common).train()
    free = read_metrics(tmp_path / "free" / "metrics.jsonl")
    cap = 0.5 * min(entry["influence"] for entry in free[0]["teachers"].values())
    gradients = {"norms": "exact", "cap": cap, "cap_by": "last"}
    trainer = toy_trainer(tmp_path / "held", method={**uniform, "gradients": gradients}, **common)
    trainer.train()
    first, second = read_metrics(tmp_path / "held" / "metrics.jsonl")
    for name, entry in first["teachers"].items():
        assert entry["influence"] == pytest.approx(free[0]["teachers"][name]["influence"], rel=1e-3)
    for entry in second["teachers"].values():
        assert entry["influence"] == pytest.approx(cap, rel=1e-3)
        assert entry["alpha"] < 0.5 * 0.5
    state = trainer._last_norm_cap.state_dict()
    assert len(state["questions"]) == 8 and (state["norms"] > 0).sum() == 21  # every third question has two teachers


def test_a_cap_by_last_norms_knows_nothing_of_held_out_questions(tmp_path):
    gradients = {"norms": "exact", "cap": 1e-2, "cap_by": "last"}
    trainer = toy_trainer(tmp_path, questions=8, epochs=2, method={"gradients": gradients})
    trainer.train()
    held_out = [{**item, "id": f"held-{item['id']}"} for item in trainer.train_dataset]
    plain = toy_trainer(tmp_path / "plain", questions=8, model=trainer.model)
    for one in (trainer, plain):
        one.args.prediction_loss_only = True
    assert trainer.evaluate(held_out)["eval_loss"] == pytest.approx(plain.evaluate(held_out)["eval_loss"], rel=1e-5)


def test_a_cap_by_last_norms_survives_a_resume(tmp_path):
    gradients = {"norms": "exact", "cap": 1e-2, "cap_by": "last"}
    common = {"questions": 8, "batch": 4, "epochs": 2, "method": {"gradients": gradients}, "save_strategy": "epoch"}
    whole = toy_trainer(tmp_path / "a", **common)
    whole.train()
    again = toy_trainer(tmp_path / "a", **common)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(again.model.get_parameter(name), parameter, rtol=0, atol=0)


def test_unweighted_norms_are_logged_where_a_rationale_weighs_nothing_too(tmp_path):
    method = {"strategy": "lowest_loss", "divergence": {"weight": 0.0}}
    rows = {}
    for norms in ("exact", "unweighted"):
        model = add_lora(toy_model(), LoraConfig(rank=2, dropout=0.0))
        settings = {**method, "gradients": {"norms": norms}}
        toy_trainer(tmp_path / norms, questions=6, batch=1, method=settings, model=model).train()
        rows[norms] = read_metrics(tmp_path / norms / "metrics.jsonl")
    for plain, apart in zip(rows["exact"], rows["unweighted"], strict=True):
        assert apart["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
        for name, entry in apart["teachers"].items():
            assert entry["influence"] == pytest.approx(plain["teachers"][name]["influence"], rel=1e-3, abs=1e-9)
            assert "own_norm" not in plain["teachers"][name] and entry["own_norm"] > 0
        silent = [entry for entry in apart["teachers"].values() if entry["alpha"] == 0]
        assert silent and all(entry["influence"] == 0 for entry in silent)


def test_norms_may_be_measured_every_so_many_steps(tmp_path):
    common = {"questions": 12, "batch": 2, "accumulate": 2, "epochs": 2, "optim": "sgd", "logging_steps": 2}
    logged = {}
    for every in (1, 3):
        trainer = toy_trainer(
            tmp_path / str(every), method={"gradients": {"norms": "exact", "every": every}}, **common
        )
        logs = _Logs()
        trainer.add_callback(logs)
        trainer.train()
        logged[every] = read_metrics(tmp_path / str(every) / "metrics.jsonl")
        assert {"influence/terse", "gradient_noise_scale"} <= logs.names
    for each, some in zip(logged[1], logged[3], strict=True):
        measured = (some["step"] - 1) % 3 == 0
        assert ("noise_trace" in some) == measured
        for name, entry in some["teachers"].items():
            assert ("influence" in entry) == measured
            same = {key: each["teachers"][name][key] for key in entry}
            assert entry == pytest.approx(same, rel=1e-2, abs=1e-5)  # and training is the same


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"cap": 1.0, "cap_by": "last"}, "gradients.cap_by: last caps by measured norms"),
        ({"cap_by": "last"}, "gradients.cap_by: only gradients.cap reads it"),
        ({"norms": "unweighted"}, "gradients.norms: unweighted needs divergence.weight 0"),
        ({"every": 2}, "gradients.every: only gradients.norms reads it"),
        (
            {"norms": "exact", "every": 2, "cap": 1.0, "cap_by": "last"},
            "gradients.every: gradients.cap_by last caps by",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(gradients, message):
    with pytest.raises(UserError, match=message):
        toy_config({"gradients": gradients})


def test_information_is_measured_every_so_many_steps_and_changes_nothing(tmp_path):
    common = {"questions": 12, "batch": 6, "epochs": 2, "optim": "sgd"}
    plain = toy_trainer(tmp_path / "plain", **common)
    plain.train()
    method = {"information": {"every": 2, "queue": 8}}
    looked = toy_trainer(tmp_path / "looked", method=method, **common)
    logs = _Logs()
    looked.add_callback(logs)
    looked.train()
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(looked.model.get_parameter(name), parameter, rtol=0, atol=0)
    rows = read_metrics(tmp_path / "looked" / "information.jsonl")
    metrics = read_metrics(tmp_path / "looked" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 3]
    assert {"information/hsic", "information/adaptability/terse", "information/wrong_answer/wordy"} <= logs.names
    for row in rows:
        beside = metrics[row["step"] - 1]["teachers"]
        assert row["hsic"] is not None and row["seconds"] > 0 and set(row["teachers"]) == set(beside)
        for name, entry in row["teachers"].items():
            assert entry["adaptability"] == pytest.approx(beside[name]["adaptability"], rel=1e-5)
            assert len(entry["proxy"]) == len(entry["phsic"]) == BINS
            assert all(value is None or value <= 0 for value in entry["proxy"])
    split = toy_trainer(tmp_path / "split", method=method, **{**common, "batch": 2, "accumulate": 3})
    split.train()
    assert [row["step"] for row in read_metrics(tmp_path / "split" / "information.jsonl")] == [1, 3]
