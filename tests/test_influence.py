"""Gradient norms in the trainer: influence by teacher in the table, log and report; the noise scale; the cap."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from compact.config import LoraConfig
from compact.errors import UserError
from compact.metrics import read_metrics
from compact.student import add_lora
from compact_kernels.sample_norms.cap import capped
from tests.test_sample_norms import batch
from tests.test_trainer import launch
from tests.toy_run import toy_model, toy_trainer

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
    launch({str(tmp_path / "ranks"): {"batch": 4, "method": NORMS, **common}}, ranks=2)
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
    with pytest.raises(UserError, match="gradients.cap: the output head trains"):
        toy_trainer(tmp_path / "c", questions=8, method=method).train()
