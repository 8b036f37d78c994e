"""Learned and fixed weightings: MIND against its equations, the baselines against theirs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from compact.errors import UserError
from compact.metrics import batch_metrics, read_metrics
from compact.norm_cap import LastNormCap
from compact.strategies import Context, Strategy, build_strategy, check_weights
from compact.strategies.mind import TeachingAssistant, paths_apart
from compact_kernels import CompatibilityOutput, Ragged, Statistics, TokenStatistics
from tests.test_trainer import in_two_ranks, largest_difference, parameters
from tests.toy_run import toy_config, toy_trainer
from tests.waiting import nothing_read


def batch_of(counts: list[int], width: int = 12, seed: int = 0) -> tuple[Statistics, Context]:
    """Random statistics of questions with `counts` rationales of 2 to 5 scored rows each."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    lengths = torch.randint(2, 6, (total,), generator=generator).tolist()
    ragged = Ragged.build(
        sequence_lengths=[n + 3 for n in lengths], prompt_lengths=[3] * total, rationales_per_question=counts
    )
    rows = torch.randn(sum(lengths), generator=generator).abs()
    tokens = TokenStatistics(-rows, rows, rows, rows)
    difficulty = torch.stack([part.mean() for part in rows.split(lengths)])
    statistics = Statistics(ragged, tokens, difficulty, difficulty, difficulty, torch.tensor(lengths).float())
    pooled = torch.randn(total, width, generator=generator)
    teachers = torch.cat([torch.arange(count) for count in counts])
    return statistics, Context(teachers, pooled, ragged, [f"q{i}" for i in range(len(counts))])


def scores_of(strategy, context):
    return strategy._score(strategy._features(context), paths_apart(context.ragged.question_of_sequence))


def mind(**options):
    return build_strategy(toy_config({"strategy": "mind", "mind": {"width": 16, **options}}), ["a", "b", "c", "d"])


def test_paths_of_other_questions_change_no_score():
    torch.manual_seed(0)
    counts = [3, 1, 4, 2]
    _, context = batch_of(counts)
    net = TeachingAssistant(12, 16, heads=4)
    together = net(context.pooled, paths_apart(context.ragged.question_of_sequence))
    assert ((0 < together) & (together < 1)).all()
    alone = []
    for count, pooled in zip(counts, context.pooled.split(counts)):
        alone.append(net(pooled, torch.zeros(count, count, dtype=torch.bool)))
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_attention_across_paths_is_what_lets_one_path_change_anothers_score():
    for heads, moves in ((4, True), (0, False)):
        torch.manual_seed(0)
        net = TeachingAssistant(12, 16, heads)
        _, context = batch_of([3])
        other = context.pooled.clone()
        other[2] = -other[2]
        apart = paths_apart(context.ragged.question_of_sequence)
        first, second = net(context.pooled, apart), net(other, apart)
        assert (first[:2] != second[:2]).all() == moves and first[2] != second[2]


@pytest.mark.parametrize("inertia", ["optimizer", "ema"])
def test_the_assistant_waits_for_no_device(inertia):
    strategy = mind(inertia=inertia, accumulation=1)
    statistics, context = batch_of([3, 1, 4])
    strategy.given(context)  # builds it
    assert context.ragged.sizes.most_rationales == 4  # a batch's host copy is read once

    with nothing_read("compact.strategies.mind"):
        for _ in range(2):
            strategy.observe(statistics, context, strategy.given(context))
            strategy.step(1.0)


def test_given_weights_a_cap_and_the_table_wait_for_no_device(monkeypatch):
    teachers = ["a", "b", "c", "d"]
    fixed = build_strategy(toy_config({"strategy": "fixed", "weights": {"fixed": {"a": 1, "b": 2}}}), teachers)
    statistics, context = batch_of([3, 1, 4])
    cap = LastNormCap(1.0, 3, 4, torch.device("cpu"))
    batch = {"question_ids": context.question_ids, "teachers": context.teachers, "ragged": context.ragged}
    zero, one_hot = torch.zeros(()), torch.nn.functional.one_hot(context.teachers, len(teachers))
    monkeypatch.setattr(torch.nn.functional, "one_hot", lambda *_: one_hot)  # reads its input on CPUs alone
    with nothing_read("compact.strategies.baselines", "compact.norm_cap"):
        alpha = fixed.given(context)
        cap.remember(batch, alpha)
        most = cap.most(batch, 0.5)
        batch_metrics(CompatibilityOutput(zero, alpha, zero, zero, statistics), context.teachers, len(teachers))
    assert torch.equal(most[:2], 2 / alpha[:2])


@pytest.mark.parametrize("threshold", [0.0, 0.97, 1.0])
def test_alpha_is_a_softmax_over_the_paths_near_the_best(threshold):
    strategy = mind(threshold=threshold, student_temperature=0.25)
    counts = [3, 1, 4]
    _, context = batch_of(counts)
    alpha = strategy.given(context)
    scores = scores_of(strategy, context)
    for got, s in zip(alpha.split(counts), scores.split(counts)):
        chosen = s >= threshold * s.max()
        expected = torch.where(chosen, (s / 0.25).exp(), 0.0)
        assert torch.allclose(got, expected / expected.sum(), atol=1e-6)
    assert (alpha == 0).any() == (threshold > 0)


def test_alpha_asks_no_other_rank_as_the_report_s_example_is_traced_on_one_alone(monkeypatch):
    for name in ("broadcast", "reduce", "gather_object"):
        monkeypatch.setattr(f"compact.strategies.mind.{name}", lambda *_: pytest.fail("it waits for all ranks"))
    _, context = batch_of([3, 2])
    torch.manual_seed(5)
    first = mind().given(context)
    torch.rand(7)  # the seed decides, not what was drawn since
    assert torch.equal(first, mind().given(context))


def test_the_assistant_comes_to_foresee_the_losses():
    strategy = mind()
    statistics, context = batch_of([4] * 12)

    def gap():
        target = (-statistics.difficulty).split(4)
        scores = scores_of(strategy, context).detach().split(4)
        pairs = [(s.softmax(0), t.softmax(0)) for s, t in zip(scores, target)]
        return float(sum((p * (p / t).log()).sum() for p, t in pairs))

    before = gap()
    for _ in range(150):
        strategy.observe(statistics, context, strategy.given(context))
        strategy.step()
    assert gap() < 0.3 * before
    assert context.pooled.grad is None and not context.pooled.requires_grad


@pytest.mark.parametrize("most", [256, 9])
@pytest.mark.parametrize(("saved", "fresh_one"), [(False, False), (True, False), (True, True)])
def test_the_gradient_is_that_of_the_meta_loss_over_the_window_however_it_is_split(
    most, saved, fresh_one, monkeypatch
):
    monkeypatch.setattr("compact.strategies.mind.MOST_PATHS", most)
    strategy = mind(accumulation=2)
    batches = [batch_of([4, 2, 2], seed=2), batch_of([3, 1], seed=1), batch_of([1, 4], seed=3)]
    scores_of(strategy, batches[0][1])
    net = copy.deepcopy(strategy.net)
    for statistics, context in batches:
        strategy.observe(statistics, context, None)
    strategy.step(1.0)  # two steps of the student: still one of the assistant
    if saved:  # a checkpoint within the window, without what came after its last step
        strategy.observe(*batch_of([2], seed=5), None)
        state = strategy.state_dict()
        strategy.load_state_dict(state)
        fresh = mind(accumulation=2)
        fresh.load_state_dict(state)  # until its first batch, below
        strategy = fresh if fresh_one else strategy
    more = batch_of([2, 3], seed=4)
    strategy.observe(*more, None)
    strategy.step(1.0)
    loss = 0.0
    for statistics, context in [*batches, more]:
        counts = context.ragged.cu_questions.diff().tolist()
        for rows, real in zip(context.pooled.split(counts), statistics.difficulty.split(counts)):
            s = net(rows, torch.zeros(len(rows), len(rows), dtype=torch.bool))
            loss = loss + (s.softmax(0) * (s.log_softmax(0) - (-real).log_softmax(0))).sum()
    expected = torch.autograd.grad(loss / 9, list(net.parameters()))
    assert all(torch.allclose(p.grad, b, atol=1e-6) for p, b in zip(strategy.net.parameters(), expected))


def test_a_step_without_a_batch_and_features_written_over_change_nothing():
    strategy, statistics = mind(accumulation=1), batch_of([2, 3])[0]
    context = batch_of([2, 3])[1]
    strategy.given(context)
    start = copy.deepcopy(strategy.net.state_dict())
    strategy.step(1.0)
    assert all(torch.equal(value, start[name]) for name, value in strategy.net.state_dict().items())
    strategy.observe(statistics, context, None)
    wanted = context.pooled.clone()
    context.pooled.zero_()
    assert torch.equal(strategy.lessons[0].features, wanted)


def test_what_the_assistant_has_learnt_is_logged(tmp_path):
    strategy = mind(accumulation=1)
    batches = [batch_of([2, 3], seed=1), batch_of([4], seed=2)]
    for statistics, context in batches:
        strategy.observe(statistics, context, None)
    total = 0.0
    for statistics, context in batches:
        counts = context.ragged.cu_questions.diff().tolist()
        scores = scores_of(strategy, context).detach().split(counts)
        for s, real in zip(scores, statistics.difficulty.split(counts)):
            total += float((s.softmax(0) * (s.log_softmax(0) - (-real).log_softmax(0))).sum())
    strategy.step(1.0)
    assert strategy.logs() == {"mind/meta_loss": pytest.approx(total / 3, rel=1e-5)} and strategy.logs() == {}
    trainer = toy_trainer(tmp_path, method={"strategy": "mind", "mind": {"accumulation": 1}}, logging_steps=2)
    trainer.train()
    logged = {row["step"]: row["mind/meta_loss"] for row in trainer.state.log_history if "loss" in row}
    rows = {row["step"]: row.get("strategy") for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert all(value >= 0 for value in logged.values()) and logged.keys() == {2, 4, 6}
    assert rows == {step: {"mind/meta_loss": logged[step]} if step in logged else None for step in range(1, 7)}


class Half(Strategy):
    def given(self, context):
        return context.pooled.new_full((context.ragged.num_sequences,), 0.5)


class Late(Strategy):
    """Equal weights until the third step, then what `wrong` makes of them."""

    steps = 0
    wrong = staticmethod(lambda alpha: alpha * 3)

    def weights(self, statistics, context):
        alpha = build_strategy(toy_config({"strategy": "uniform"}), self.teachers).weights(statistics, context)
        return self.wrong(alpha) if self.steps == 2 else alpha

    def step(self, learning_rate=None):
        self.steps += 1


class Few(Strategy):
    def weights(self, statistics, context):
        return statistics.difficulty[:1]


class Plain(Strategy):
    def given(self, context):
        return [1.0] * len(context.teachers)


class Silent(Strategy):
    pass


def test_weights_of_a_class_of_one_s_own_must_add_up_to_one(tmp_path):
    check_weights("m:C", torch.tensor([0.25, 0.75, 1.0]), [0, 2, 3], ["a", "b"])
    for values, shown in (([0.25, 0.5, 1.0], "0.25, 0.5"), ([1.5, -0.5, 1.0], "1.5, -0.5")):
        with pytest.raises(UserError, match=f"strategy m:C: its weights of question 'a' are {shown}; they must"):
            check_weights("m:C", torch.tensor(values), [0, 2, 3], ["a", "b"])
    with pytest.raises(UserError, match="of question 'b' are nan"):
        check_weights("m:C", torch.tensor([1.0, float("nan")]), [0, 1, 2], ["a", "b"])
    with pytest.raises(UserError, match="strategy tests.test_strategies:Half at step 1: its weights of .* are 0.5"):
        toy_trainer(tmp_path, method={"strategy": "tests.test_strategies:Half"}).train()
    with pytest.raises(UserError, match="tests.test_strategies:Silent says nothing of weights"):
        build_strategy(toy_config({"strategy": "tests.test_strategies:Silent"}), ["a"])
    check_weights("m:C", torch.tensor([0.25, 0.5, 1.0]), [0, 2, 3], ["a", "b"], capped=True)
    with pytest.raises(UserError, match="of question 'a' are 0.75, 0.5"):
        check_weights("m:C", torch.tensor([0.75, 0.5, 1.0]), [0, 2, 3], ["a", "b"], capped=True)


@pytest.mark.parametrize("wrong", [lambda alpha: alpha * 3, torch.zeros_like, torch.neg])
@pytest.mark.parametrize("looks", [{"logging_steps": 4}, {"logging_steps": 50, "save_strategy": "steps"}])
def test_weights_of_a_class_of_one_s_own_that_go_wrong_later_are_named_with_their_step(
    tmp_path, monkeypatch, wrong, looks
):
    monkeypatch.setattr(Late, "wrong", staticmethod(wrong))
    trainer = toy_trainer(tmp_path, method={"strategy": "tests.test_strategies:Late"}, save_steps=4, **looks)
    with pytest.raises(UserError, match="strategy tests.test_strategies:Late at step 3: its weights of question 'q"):
        trainer.train()
    assert trainer.state.global_step == 4 and not list(tmp_path.glob("checkpoint-*"))


def test_weights_of_a_class_of_one_s_own_are_kept_for_the_check_without_a_wait(tmp_path):
    trainer = toy_trainer(tmp_path, method={"strategy": "tests.test_strategies:Half"})
    statistics, context = batch_of([3, 1, 4])
    alpha, zero = torch.ones(8), torch.zeros(())
    assert context.ragged.sizes.most_rationales == 4  # a batch's host copy is read once
    with nothing_read():
        result = CompatibilityOutput(zero, alpha, zero, zero, statistics)
        trainer._after_loss({"ragged": context.ragged}, result, context, 1.0)
    alpha.zero_()  # as a CUDA graph's next replay may
    with pytest.raises(UserError, match="are 1, 1, 1; they must"):
        trainer.log({})


@pytest.mark.parametrize(
    "name, given", [("Few", r"weights of shape \(1,\) for a batch of \d+ rationales"), ("Plain", "a list for a batch")]
)
def test_weights_of_a_class_of_one_s_own_are_one_a_rationale(tmp_path, name, given):
    trainer = toy_trainer(tmp_path, method={"strategy": f"tests.test_strategies:{name}"})
    with pytest.raises(UserError, match=f"strategy tests.test_strategies:{name}: it gave {given}"):
        trainer.train()


def test_the_averages_of_ema_follow_slowly():
    strategy = mind(inertia="ema", decay=0.9)
    statistics, context = batch_of([2])
    first = strategy._real_losses(statistics, context)
    assert torch.allclose(first, statistics.difficulty)
    strategy.observe(statistics, context, None)
    strategy.step(1.0)
    later = Statistics(
        context.ragged,
        TokenStatistics(*(2 * t for t in statistics.tokens)),
        *(statistics.difficulty,) * 3,
        statistics.targets_per_rationale,
    )
    assert torch.allclose(strategy._real_losses(later, context), 1.1 * statistics.difficulty)


def test_the_warm_up_moves_the_assistant_and_nothing_of_the_student(tmp_path, untouched_gpus):
    trainer = toy_trainer(tmp_path, method={"strategy": "mind"})
    trainer.create_optimizer_and_scheduler(10)
    start, random = parameters(trainer), torch.get_rng_state()
    trainer.warm_up()
    assert torch.equal(torch.get_rng_state(), random)
    assert largest_difference(start, parameters(trainer)) == 0
    moments = trainer.strategy.optimizer.state_dict()["state"]
    assert moments[0]["step"] == 6  # 24 questions, 4 a batch


def test_how_a_step_is_split_makes_no_difference_to_the_warm_up(tmp_path):
    nets = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        trainer = toy_trainer(tmp_path, questions=23, batch=batch, accumulate=accumulate, method={"strategy": "mind"})
        trainer.create_optimizer_and_scheduler(10)
        trainer.warm_up()
        nets.append(torch.cat([p.detach().flatten() for p in trainer.strategy.net.parameters()]))
    for net in nets[1:]:
        torch.testing.assert_close(net, nets[0], rtol=0, atol=5e-4)  # by steps of a batch each: 1e-2


@pytest.mark.parametrize("options", [{"inertia": "optimizer"}, {"inertia": "ema", "accumulation": 3}])
def test_an_interrupted_assistant_is_the_uninterrupted_one_to_the_last_bit(tmp_path, options):
    method = {"strategy": "mind", "mind": {"warmup": 0.5, **options}}
    settings = {"method": method, "epochs": 2, "save_strategy": "steps", "save_steps": 5}
    straight = toy_trainer(tmp_path, **settings)
    straight.train()
    resumed = toy_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    ours, theirs = straight.strategy.state_dict(), resumed.strategy.state_dict()
    assert all(torch.equal(ours["net"][name], theirs["net"][name]) for name in ours["net"])
    assert ours["trend"] == theirs["trend"] and ours["steps"] == theirs["steps"]
    assert largest_difference(parameters(straight), parameters(resumed)) == 0


@pytest.mark.parametrize("inertia", ["optimizer", "ema"])
def test_two_ranks_and_accumulation_train_the_same_assistant(tmp_path, inertia):
    options = {"warmup": 0.0, "accumulation": 2, "inertia": inertia}
    settings = {"method": {"strategy": "mind", "mind": options}, "optim": "sgd", "epochs": 2, "max_grad_norm": 0.0}
    in_two_ranks({str(tmp_path / "two"): {**settings, "batch": 2, "accumulate": 2}})
    one = toy_trainer(tmp_path / "one", batch=8, **settings)
    start = parameters(one)
    one.train()
    two = torch.load(tmp_path / "two" / "parameters.pt", weights_only=True)
    assert largest_difference(parameters(one), two) < 1e-3 * largest_difference(parameters(one), start)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        for name in a["teachers"]:
            assert a["teachers"][name]["alpha"] == pytest.approx(b["teachers"][name]["alpha"], rel=1e-3)


def test_an_assistant_that_diverged_is_told_from_a_student_that_did(tmp_path):
    method = {"strategy": "mind", "mind": {"warmup_rate": 1e38}}
    trainer = toy_trainer(tmp_path, method=method)
    with pytest.raises(UserError, match=r"not finite at step 1 .*weights are not.*mind\.warmup_rate"):
        trainer.train()


def test_ca_mkd_weighs_the_hard_less():
    strategy = build_strategy(toy_config({"strategy": "ca_mkd"}), ["a", "b", "c", "d"])
    counts = [3, 1, 2]
    statistics, context = batch_of(counts)
    alpha = strategy.weights(statistics, context)
    for got, loss in zip(alpha.split(counts), statistics.difficulty.split(counts)):
        expected = (1 - loss.softmax(0)) / (len(loss) - 1) if len(loss) > 1 else torch.ones(1)
        assert torch.allclose(got, expected) and float(got.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mind": {"width": 10, "heads": 4}}, "mind.heads.*does not divide"),
        ({"mind": {"threshold": 1.5}}, "mind.threshold.*at most 1"),
        ({"strategy": "mind", "mind": {"features": "sentence"}}, "consensus.encoder: mind.features"),
        (
            {"strategy": "mind", "mind": {"features": "sentence"}, "consensus": {"affinity": "sentence"}},
            "mind.features: sentence embeds a question with its rationale",
        ),
        ({"mind": {"hedas": 2}}, "did you mean mind.heads"),
    ],
)
def test_what_the_assistant_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        toy_config(options)


def test_by_its_logarithm_a_far_harder_rationale_does_not_hide_how_the_others_losses_differ():
    statistics, context = batch_of([4, 4])
    losses = torch.tensor([0.03, 0.09, 0.03, 0.63, 0.0, 0.0, 0.0, 0.0])
    statistics = replace(statistics, difficulty=losses)
    alone = {"adaptability": {"weight": 0}, "consensus": {"weight": 0}}
    alphas = {}
    for kind in ("loss", "log_loss"):
        strategy = build_strategy(toy_config(alone | {"difficulty": {"kind": kind}}), list("abcd"))
        alphas[kind] = strategy.bind(context)(statistics)
        assert torch.equal(alphas[kind], strategy.weights(statistics, context))
    z = losses[:4].log()
    z = (z - z.mean()) / z.std(correction=0)
    torch.testing.assert_close(alphas["log_loss"][:4], (-z).softmax(0))
    ratio = {kind: alpha[0] / alpha[1] for kind, alpha in alphas.items()}
    assert ratio["loss"] < 1.3 and ratio["log_loss"] > 2
    assert torch.allclose(alphas["log_loss"][4:], torch.full((4,), 0.25))  # known alike


@pytest.mark.parametrize(
    ("given", "expected"),  # three rationales, of a, b and c, then of a alone, and of a and b
    [
        ({"strategy": "single", "weights": {"teacher": "b"}}, [0, 1, 0, 0, 0, 1]),
        ({"strategy": "fixed", "weights": {"fixed": {"b": 2.0, "c": 6.0}}}, [0, 0.25, 0.75, 0, 0, 1]),
    ],
)
def test_in_a_loop_of_ones_own_teachers_who_are_not_trained_on_weigh_nothing(given, expected):
    strategy = build_strategy(toy_config(given), ["a", "b", "c"])
    _, context = batch_of([3, 1, 2])
    assert strategy.given(context).tolist() == expected


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere.at_all:Mine", "there is no module nowhere to import nowhere.at_all:Mine from: start in its folder"),
        ("compact.strategies.mind:Mine", "compact.strategies.mind has no class Mine that is a subclass"),
        ("compact.config:Recipe", "compact.config has no class Recipe that is a subclass of compact.strategies"),
        ("mine:", "strategy: 'mine:' is not one of compact, uniform, .*, mind, MODULE:CLASS"),
    ],
)
def test_a_class_of_one_s_own_that_cannot_be_had_is_named(place, said):
    with pytest.raises(UserError, match=said):
        build_strategy(toy_config({"strategy": place}), ["a", "b"])
