"""The README's snippets, run as they stand: other trainers take COMPACT's loss, and its numbers are the loss's own."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from compact.adapters import Collator, DistillationMixin, WindowLoader, build_strategy, distillation_loss, prepare
from compact.collate import to_device
from compact.config import CompactConfig
from compact.errors import UserError
from compact.loss import Denominators, forward, targets_of
from tests.architectures import tiny
from tests.processes import two_ranks
from tests.toy import toy_tokenizer
from tests.toy_run import toy_model, toy_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n+```python\n(.*?)```", README, flags=re.DOTALL))
QUESTIONS = 8


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> dict[str, Any]:
    """What the first snippet makes of a file of questions."""
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in toy_rows(QUESTIONS)))
    names: dict[str, Any] = {"tokenizer": toy_tokenizer()}
    exec(EXAMPLES["setup"].replace("FILE.jsonl", str(file)), names)
    return names


def execute(name: str, setup: dict[str, Any], **given: Any) -> dict[str, Any]:
    names = {**setup, **given}
    exec(compile(EXAMPLES[name], f"README.md, {name}", "exec"), names)
    return names


def sgd(**settings: Any) -> dict[str, Any]:
    """Arguments under which a step moves the parameters by its gradient and nothing else, in the data's order."""
    return {
        **{"learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
        **{"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_steps": 1},
        **{"logging_steps": 1, "train_sampling_strategy": "sequential", **settings},
    }


def moved(model: nn.Module, before: nn.Module) -> dict[str, Tensor]:
    old = dict(before.named_parameters())
    return {name: (old[name] - p).detach() for name, p in model.named_parameters()}


def gradient(setup: dict[str, Any], items: Any, weights: Any = None, model: Any = None) -> dict[str, Tensor]:
    """By distillation_loss itself, over all `items` as one batch."""
    model = prepare(toy_model() if model is None else model)
    batch = Collator()([setup["tokens"][i] for i in items])
    strategy = None if weights is not None else build_strategy(setup["config"], setup["report"].teachers)
    given = None if weights is None else weights[batch["teachers"]]
    distillation_loss(model, batch, strategy, setup["config"], weights=given)[0].loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor], scale: float = 1.0) -> None:
    assert max(float(g.abs().max()) for g in truth.values()) > 1e-2
    for name, value in truth.items():
        torch.testing.assert_close(found[name] * scale, value, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "name", ["trainer", "weights", "trl", "lightning", "loop", "logprob", "kernels", "norms", "information"]
)
def test_a_snippet_has_at_most_15_lines(name):
    assert 0 < sum(bool(line.strip()) for line in EXAMPLES[name].splitlines()) <= 15


@pytest.mark.parametrize("batch, accumulate", [(4, 1), (2, 2), (1, 4)])
def test_a_trainer_subclass_takes_the_step_of_the_loss_however_it_is_accumulated(tmp_path, setup, batch, accumulate):
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    model = toy_model()
    names = execute("trainer", setup, model=model, arguments=TrainingArguments(str(tmp_path), **sgd(**sizes)))
    assert_same(moved(model, toy_model()), gradient(setup, range(4)))
    assert names["trainer"].state.log_history[0]["loss"] > 0


def test_weights_of_ones_own_weigh_the_loss(tmp_path, setup):
    model, sizes = toy_model(), {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    execute("weights", setup, model=model, arguments=TrainingArguments(str(tmp_path), **sgd(**sizes)))
    assert_same(moved(model, toy_model()), gradient(setup, range(4), torch.tensor([0.2, 0.5, 0.3])))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trls_trainer_takes_the_step_of_the_loss(tmp_path, setup, accumulate):
    trl = pytest.importorskip("trl")
    sizes = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    model = toy_model()
    sft_config = trl.SFTConfig(str(tmp_path), bf16=False, **sgd(**sizes))
    execute("trl", setup, model=model, sft_config=sft_config)
    assert_same(moved(model, toy_model()), gradient(setup, range(4)))


@pytest.fixture
def plain_descent(monkeypatch) -> None:
    """In place of AdamW, so that steps show their gradients."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr: torch.optim.SGD(parameters, lr=1.0))


def test_lightning_takes_the_steps_of_the_loss(setup, plain_descent):
    pytest.importorskip("lightning")
    model = toy_model()
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    tokens = setup["tokens"].select(range(7))  # batches of 2, 2 | 2, 1
    execute("lightning", {**setup, "tokens": tokens}, model=model, options={**options, "barebones": False})
    expected = toy_model()
    for items in (range(4), range(4, 7)):
        step = gradient(setup, items, model=copy.deepcopy(expected))
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                parameter -= step.get(name, 0)
    assert_same(moved(model, toy_model()), moved(expected, toy_model()))


def test_a_plain_loop_takes_the_steps_of_the_loss(setup, plain_descent):
    model = toy_model()
    tokens = setup["tokens"].select(range(3))  # one optimizer step, of batches of 2 and 1
    execute("loop", {**setup, "tokens": tokens}, model=model, device="cpu")
    assert_same(moved(model, toy_model()), gradient(setup, range(3)))


def test_a_plain_loop_under_ddp_takes_the_step_of_all_ranks_questions():
    done = two_ranks("tests.distributed_loop")
    assert "passed: the loop under ddp" in done.stdout, done.stderr[-3000:]


def test_lightning_gives_the_loader_a_sampler_of_its_own_and_keeps_its_window(setup):
    pytest.importorskip("lightning")
    from lightning.pytorch.utilities.data import _update_dataloader

    loader = WindowLoader(setup["tokens"], batch_size=1, collate_fn=Collator(), accumulate=3)
    sampler = torch.utils.data.DistributedSampler(setup["tokens"], num_replicas=2, rank=0)
    again = _update_dataloader(loader, sampler)
    assert isinstance(again, WindowLoader) and again.sampler is sampler
    assert [batch["denominators"].questions for batch in again] == [3, 3, 3, 1]


def test_what_divides_the_gradient_is_multiplied_back(setup):
    items = [setup["tokens"][i] for i in range(3)]
    strategy = build_strategy(setup["config"], setup["report"].teachers)
    once, thrice = (
        distillation_loss(prepare(toy_model()), Collator()(items), strategy, replicas=r)[0].loss for r in (1, 3)
    )
    assert float(thrice.detach()) == pytest.approx(3 * float(once.detach()), rel=1e-5)


def test_a_window_loader_counts_the_step_and_not_the_batch(setup):
    batches = list(WindowLoader(setup["tokens"], batch_size=1, collate_fn=Collator(), accumulate=3))
    assert [batch["denominators"].questions for batch in batches] == [3, 3, 3, 3, 3, 3, 2, 2]
    whole = Denominators.of(Collator()([setup["tokens"][i] for i in range(3)])["ragged"])
    assert batches[0]["denominators"].tokens == pytest.approx(whole.tokens)


def test_head_log_probs_of_any_model_and_their_gradients(setup):
    model, twin = tiny("llama"), tiny("llama")
    ids = torch.arange(3, 27).view(2, 12)
    labels = ids.clone()
    labels[:, :4] = -100
    weights = torch.tensor([0.5, 2.0])
    names = execute(
        "logprob",
        {},
        model=model,
        ids=ids,
        mask=torch.ones_like(ids),
        labels=labels,
        sequence_weights=weights,
    )
    logits = twin(input_ids=ids, use_cache=False).logits[:, :-1]
    truth = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    loss = (weights[:, None] * truth).sum() / 16
    loss.backward()
    torch.testing.assert_close(names["loss"], loss)
    torch.testing.assert_close(names["logprob"], -truth, rtol=1e-4, atol=1e-5)
    for one, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_the_weighted_loss_of_packed_tensors_alone():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=generator).requires_grad_()
    head_weight = torch.randn(20, 8, generator=generator)
    labels = torch.randint(0, 20, (12,), generator=generator)
    labels[[0, 1, 5, 8]] = -100
    alpha = torch.tensor([0.7, 0.3, 1.0])
    names = execute(
        "kernels",
        {},
        torch=torch,
        hidden=hidden,
        head_weight=head_weight,
        labels=labels,
        alpha=alpha,
        cu_seqlens=torch.tensor([0, 5, 8, 12]),
        cu_questions=torch.tensor([0, 2, 3]),
    )
    losses = F.cross_entropy(hidden[:-1] @ head_weight.T, labels[1:], reduction="none")
    mean = torch.stack([losses[1:4].mean(), losses[5:7].mean(), losses[8:11].mean()])
    torch.testing.assert_close(names["given"].loss, (alpha * mean).sum() / 2)
    torch.testing.assert_close(names["ruled"].loss, (names["ruled"].alpha * mean).sum() / 2)
    assert hidden.grad.abs().sum() > 0


def test_a_batch_moves_whole(setup):
    batch = Collator(setup["tokenizer"], ifd=True)([setup["tokens"][0]])
    moved_batch = to_device(batch, "meta")
    assert moved_batch.keys() == batch.keys()
    for part in (moved_batch, moved_batch["unconditional"]):
        assert part["input_ids"].is_meta and part["teachers"].is_meta and part["ragged"].rows.is_meta
        assert not part["ragged"].host.rows.is_meta


def test_either_a_strategy_or_weights_decide(setup):
    batch = Collator()([setup["tokens"][0]])
    with pytest.raises(UserError, match="either a strategy or weights"):
        distillation_loss(prepare(toy_model()), batch, None)
    sentence = {"consensus": {"affinity": "sentence", "encoder": "e"}}
    for part, given in (("unconditional", {"difficulty": {"kind": "ifd"}}), ("embeddings", sentence)):
        config = CompactConfig(**given)
        with pytest.raises(UserError, match=f"the batch has no {part}"):
            distillation_loss(None, batch, build_strategy(config, setup["report"].teachers), config)


def test_what_a_host_trainer_would_get_wrong_is_refused(tmp_path, setup):
    class Distiller(DistillationMixin, Trainer):
        pass

    given = {"teachers": setup["report"].teachers, "train_dataset": setup["tokens"]}
    with pytest.raises(UserError, match="label_smoothing_factor"):
        Distiller(toy_model(), TrainingArguments(str(tmp_path), **sgd(label_smoothing_factor=0.1)), **given)
    with pytest.raises(UserError, match="train_dataset holds no tokenized questions"):
        Distiller(toy_model(), TrainingArguments(str(tmp_path), **sgd()), **{**given, "train_dataset": [1]})
    with pytest.raises(UserError, match="data_collator is a function: leave it out"):
        Distiller(toy_model(), TrainingArguments(str(tmp_path), **sgd()), data_collator=lambda items: items, **given)
    arguments = TrainingArguments(str(tmp_path), **sgd())
    arguments.packing = True  # as TRL's have it
    with pytest.raises(UserError, match="packing: the collator packs"):
        Distiller(toy_model(), arguments, **given)
    with pytest.raises(UserError, match="accumulate is 0"):
        WindowLoader(setup["tokens"], accumulate=0)
    with pytest.raises(UserError, match=r"fixed.*nobody|nobody.*fixed"):
        config = CompactConfig(strategy="fixed")
        config.weights.fixed = {"nobody": 1.0}
        Distiller(toy_model(), TrainingArguments(str(tmp_path), **sgd()), config=config, **given)


def test_norms_of_a_models_own_packed_step():
    model, lengths = toy_model(), (5, 3, 4)
    ids = torch.randint(0, 384, (1, 12), generator=torch.Generator().manual_seed(0))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    labels = ids[0].clone()
    labels[cu[:-1]] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    given = {"ids": ids, "labels": labels, "positions": positions, "cu_seqlens": cu}
    names = execute("norms", {}, torch=torch, model=model, cu_questions=torch.tensor([0, 2, 3]), **given)
    twin = toy_model()
    for s, (a, b) in enumerate(zip(cu, cu[1:])):
        logits = twin(input_ids=ids[:, a:b], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1], ids[0, a + 1 : b], reduction="sum") / 9
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        expected = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        torch.testing.assert_close(names["norms"].norms[s], expected, rtol=1e-4, atol=0)


def test_information_of_a_batch(setup):
    model = prepare(toy_model())
    batch = to_device(Collator()(list(setup["tokens"].select(range(6)))), "cpu")
    output = forward(model, batch)
    given = {"hidden": output.hidden.detach(), "head_weight": output.head.weight.detach(), "ragged": batch["ragged"]}
    names = execute("information", {}, targets=targets_of(batch), question_ids=torch.arange(6), **given)
    assert all(value.shape == batch["teachers"].shape for value in (*names["controls"], names["found"].scalar))
    assert names["found"].curve.shape == (len(output.hidden),) and names["found"].hsic.isfinite()
