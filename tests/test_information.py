"""HSIC, PHSIC, peaks and the proxy's controls: against dense float64, on what is independent, and on planted jumps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.shapes import TINY
from bench.steps import step
from compact.config import CompactConfig
from compact.information import InformationLog
from compact.loss import distillation_loss
from compact.strategies.compact import Compact
from compact_kernels import AdaptabilityOptions, Ragged
from compact_kernels.information import (
    InformationQueue,
    _shuffled_mask,
    answer_embeddings,
    hsic,
    median_distance,
    noise_scale,
    proxy_controls,
    robust_peaks,
)
from tests.waiting import nothing_read


def dense_hsic(x: Tensor, y: Tensor, scale: float | None) -> Tensor:
    """Song et al.'s formula on whole matrices."""

    def kernel(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        k = z @ z.T if scale is None else torch.exp(-torch.cdist(z, z).square() / (2 * scale**2))
        return k - k.diag().diag()

    k, l_, n, one = kernel(x), kernel(y), len(x), torch.ones(len(x), dtype=x.dtype)
    middle = (one @ k @ one) * (one @ l_ @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l_ @ one)
    return ((k @ l_).trace() + middle) / (n * (n - 3))


def normal(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("count", [4, 5, 130, 1030])  # and several blocks of rows
def test_hsic_is_the_dense_formula(count, scale):
    x, y = normal(count, 6) + 100, normal(count, 3, seed=1)
    truth = dense_hsic(x, y, scale)
    torch.testing.assert_close(hsic(x, y, scale_x=scale, scale_y=scale), truth, rtol=1e-9, atol=1e-12)
    found = hsic((x - 100).float(), y.float(), scale_x=scale, scale_y=scale)
    assert abs(found - truth) < 1e-5 * (1 if scale else x.var() * y.var())


@pytest.mark.parametrize("scaled", [True, False])
def test_hsic_is_0_on_average_where_nothing_depends_and_grows_with_correlation(scaled):
    draws = []
    for seed in range(300):
        x, y = normal(24, 8, seed=2 * seed), normal(24, 8, seed=2 * seed + 1)
        scales = {"scale_x": median_distance(x), "scale_y": median_distance(y)} if scaled else {}
        draws.append(hsic(x, y, **scales))
    null = torch.stack(draws)
    assert abs(null.mean()) < 3 * null.std() / len(null) ** 0.5
    values = []
    for rho in (0.0, 0.3, 0.6, 0.9):
        x, noise = normal(400, 4), normal(400, 4, seed=1)
        values.append(hsic(x, rho * x + (1 - rho**2) ** 0.5 * noise))
    assert values == sorted(values) and values[1] > 0.01
    assert abs(hsic(normal(50, 4), torch.ones(50, 2).double())) < 1e-12  # a constant answer


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="4 pairs at least, got 3"):
        hsic(normal(3, 2), normal(3, 2))
    with pytest.raises(ValueError, match="x has 5 rows, y has 4"):
        hsic(normal(5, 2), normal(4, 2))


def shape_of(questions: int, rationales: int = 2, length: int = 6) -> Ragged:
    count = questions * rationales
    return Ragged.build(
        sequence_lengths=[length + k % 3 for k in range(count)],
        prompt_lengths=[2] * count,
        rationales_per_question=[rationales] * questions,
    )


def test_phsic_is_the_covariance_of_the_other_questions():
    ragged, queue = shape_of(5), InformationQueue(size=7)
    seen: list[list[tuple[int, Tensor, Tensor]]] = []  # by question met, every token: question, state, answer
    for visit in range(3):
        ids = torch.arange(5) + 3 * visit  # questions 3, 4, 6, 7 are met twice
        hidden, answers = normal(int(ragged.cu_seqlens[-1]), 4, seed=visit), normal(5, 3, seed=10 + visit)
        given = hidden.clone(), answers.clone(), ids.clone()
        found = queue.measure(*given, ragged)
        for tensor in given:
            tensor.zero_()  # what the queue remembers is its own
        cu_rows, cu_q = ragged.cu_rows.tolist(), ragged.cu_questions.tolist()
        mine = []
        for q in range(5):
            rows = ragged.rows[cu_rows[cu_q[q]] : cu_rows[cu_q[q + 1]]]
            mine.append([(int(ids[q]), hidden[row], answers[q]) for row in rows])
        met = seen + mine
        tokens = [token for part in mine for token in part]
        for row in (0, 7, len(tokens) - 1):
            own, state, answer = tokens[row]
            others = [(r, a) for part in met for i, r, a in part if i != own]
            r, a = torch.stack([r for r, _ in others]), torch.stack([a for _, a in others])
            covariance = (r - r.mean(0)).T @ (a - a.mean(0)) / len(others)
            truth = (state - r.mean(0)) @ covariance @ (answer - a.mean(0))
            torch.testing.assert_close(found.curve[ragged.rows[row]], truth, rtol=1e-9, atol=1e-12)
        means = [found.curve[ragged.rows[a:b]].mean() for a, b in zip(cu_rows, cu_rows[1:])]
        torch.testing.assert_close(found.scalar, torch.stack(means), rtol=1e-9, atol=1e-12)
        newest = {part[0][0]: part for part in met}  # a question met twice is one pair, the last of it
        states = torch.stack([torch.stack([r for _, r, _ in part]).mean(0) for part in newest.values()])
        truth = dense_hsic(states, torch.stack([part[0][2] for part in newest.values()]), None)
        torch.testing.assert_close(found.hsic, truth, rtol=1e-9, atol=1e-12)
        seen = met[-7:]


def test_a_state_that_is_no_number_is_in_its_own_curve_alone():
    ragged, queue, without = shape_of(5), InformationQueue(), InformationQueue()
    one = shape_of(1)
    hidden, answers = normal(int(one.cu_seqlens[-1]), 4, seed=9), normal(1, 3, seed=9)
    hidden[3, 1] = torch.inf
    assert not queue.measure(hidden, answers, torch.tensor([99]), one).curve.isfinite().all()
    given = normal(int(ragged.cu_seqlens[-1]), 4), normal(5, 3, seed=10), torch.arange(5), ragged
    for found, expected in zip(queue.measure(*given), without.measure(*given)):
        torch.testing.assert_close(found, expected)


def test_an_epiphany_is_found_by_phsic_and_by_its_peak():
    """A fixed map of the answer enters the states at a step of its own; AUC of c_t for the steps after it."""
    generator = torch.Generator().manual_seed(0)
    dim, length, questions = 64, 60, 16
    image = torch.randn(dim, 32, generator=generator) / 32**0.5
    queue, scores, labels = InformationQueue(size=128), [], []
    lengths = [length] * questions
    ragged = Ragged.build(
        sequence_lengths=[n + 1 for n in lengths], prompt_lengths=[1] * questions,
        rationales_per_question=[1] * questions,
    )  # fmt: skip
    for batch in range(12):
        answers = torch.randn(questions, 32, generator=generator)
        hidden = torch.randn(questions * (length + 1), dim, generator=generator) + 5
        when = torch.randint(10, 50, (questions,), generator=generator)
        for q in range(questions):
            start = q * (length + 1)
            hidden[start + when[q] : start + length + 1] += 0.7 * (image @ answers[q])
        found = queue.measure(hidden, answers, torch.arange(questions) + batch * questions, ragged)
        if batch >= 4:
            curve = found.curve[ragged.rows].view(questions, length)
            scores.append(curve.flatten())
            labels.append((torch.arange(length) >= when[:, None]).flatten())
    score, label = torch.cat(scores), torch.cat(labels)
    ranks = score.argsort().argsort().double()
    positives = label.sum().double()
    auc = (ranks[label].sum() - positives * (positives - 1) / 2) / (positives * (len(label) - positives))
    print(f"AUC of the planted epiphany: {auc:.3f}")
    assert auc > 0.9


def test_peaks_are_robust_and_apart():
    curve = torch.cat([torch.sin(torch.arange(40.0)) * 0.1, torch.zeros(5), torch.arange(3.0), torch.zeros(0)])
    curve[10] = curve[11] = 9.0
    curve[30] = 7.0
    offsets = torch.tensor([0, 40, 45, 48, 48])
    found = robust_peaks(curve, offsets, 40, most=4, distance=3)
    assert found.places.tolist()[0] == [10, 30, -1, -1]
    assert found.places[1:].eq(-1).all()
    assert found.z[10] > 30 and found.z[40:45].eq(0).all() and found.z.isfinite().all()
    part = curve[:40]
    median = part.sort().values[19]
    mad = (part - median).abs().sort().values[19]
    torch.testing.assert_close(found.z[:40], (part - median) / (1.4826 * mad))


@pytest.mark.parametrize("head", [{}, {"bias": normal(17, seed=2), "softcap": 3.0, "logit_scale": 0.7}])
def test_the_proxys_controls_change_what_they_say_and_nothing_else(head, monkeypatch):
    monkeypatch.setattr("compact_kernels.information.ROWS", 8)  # several chunks of rows
    ragged = Ragged.build(
        sequence_lengths=[12, 9, 14], prompt_lengths=[2, 2, 3], rationales_per_question=[2, 1],
        body_lengths=[8, 5, 9], evidence_ids=[[3, 4, 5], [3, 4, 5], [7]],
        thinking=[[i in (1, 2) for i in range(n)] for n in (10, 7, 11)],
    )  # fmt: skip
    hidden, weight = normal(35, 6), normal(17, 6, seed=1)
    targets = torch.zeros(35, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    found = proxy_controls(hidden, weight, targets, ragged, generator=generator, **head)
    swapped = Ragged.build(
        sequence_lengths=[12, 9, 14], prompt_lengths=[2, 2, 3], rationales_per_question=[2, 1],
        body_lengths=[8, 5, 9], evidence_ids=[[7], [7], [3, 4, 5]],
        thinking=[[i in (1, 2) for i in range(n)] for n in (10, 7, 11)],
    )  # fmt: skip
    other = proxy_controls(hidden, weight, targets, swapped, generator=generator, **head)
    torch.testing.assert_close(found.wrong_answer, other.adaptability, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.adaptability, other.wrong_answer, rtol=1e-12, atol=0)
    assert (found.shuffled_mask != found.adaptability).any()
    flat = AdaptabilityOptions(epsilon=1.0)  # a mask of ones: nothing to shuffle
    same = proxy_controls(hidden, weight, targets, ragged, flat, generator, **head)
    torch.testing.assert_close(same.shuffled_mask, same.adaptability)


def test_a_wrong_answer_is_one_that_differs():
    """Of four questions the first two ask for one answer, and the last has none."""
    answers = [[3, 4], [3, 4], [7], []]
    shape = {"sequence_lengths": [9] * 4, "prompt_lengths": [2] * 4, "rationales_per_question": [1] * 4}
    ragged = Ragged.build(**shape, body_lengths=[5] * 4, evidence_ids=answers)
    swapped = Ragged.build(**shape, body_lengths=[5] * 4, evidence_ids=[[7], [7], [3, 4], []])
    hidden, weight, targets = normal(36, 6), normal(17, 6, seed=1), torch.zeros(36, dtype=torch.int64)
    found, other = (proxy_controls(hidden, weight, targets, batch) for batch in (ragged, swapped))
    torch.testing.assert_close(found.wrong_answer[:3], other.adaptability[:3])
    alike = Ragged.build(**shape, body_lengths=[5] * 4, evidence_ids=[[3]] * 4)
    assert proxy_controls(hidden, weight, targets, alike).wrong_answer.isnan().all()


def test_a_question_alone_has_no_wrong_answer():
    ragged = Ragged.build(
        sequence_lengths=[12, 9], prompt_lengths=[2, 2], rationales_per_question=[2], body_lengths=[8, 0],
        evidence_ids=[[3, 4], [3, 4]],
    )  # fmt: skip
    found = proxy_controls(normal(21, 6), normal(17, 6, seed=1), torch.zeros(21, dtype=torch.int64), ragged)
    assert found.wrong_answer.isnan().all()  # that of a rationale without a body too
    assert found.adaptability[0] > 0 and found.adaptability[1] == 0
    assert torch.equal(found.shuffled_mask, found.adaptability)  # no flag is set


def test_a_batch_without_answers_has_no_wrong_answer():
    ragged = Ragged.build(sequence_lengths=[12, 9], prompt_lengths=[2, 2], rationales_per_question=[1, 1])
    found = proxy_controls(normal(21, 6), normal(17, 6, seed=1), torch.zeros(21, dtype=torch.int64), ragged)
    assert found.wrong_answer.isnan().all() and (found.adaptability == 0).all()


def test_shuffled_flags_stay_in_their_bodies_and_every_order_is_as_likely():
    flags = [
        [True, False, True, False, True, False],
        [True, True],
        [True, False, False, True],
        [False, True, False, True],
    ]
    ragged = Ragged.build(
        sequence_lengths=[8, 4, 6, 6], prompt_lengths=[2] * 4, rationales_per_question=[3, 1],
        body_lengths=[4, 0, 3, 2], thinking=flags,
    )  # fmt: skip
    generator, draws = torch.Generator().manual_seed(0), 6000
    moved = torch.stack([_shuffled_mask(ragged, generator) for _ in range(draws)])
    assert torch.equal(moved[:, ~ragged.in_body], ragged.thinking[~ragged.in_body].expand(draws, -1))
    assert ragged.thinking[~ragged.in_body].any()  # some flags have to stay
    for s, ways in ((0, 6), (2, 3), (3, 2)):  # 2 flags in a body of 4, 1 of 3, 1 of 2; rationale 1 has no body
        body = ragged.in_body & (ragged.sequence_of_row == s)
        assert moved[:, body].sum(1).eq(ragged.thinking[body].sum()).all()
        seen = moved[:, body].unique(dim=0, return_counts=True)[1]
        assert len(seen) == ways and (seen - draws / ways).abs().max() < 4 * (draws / ways) ** 0.5


def test_answers_are_embedded_once_a_question():
    ragged = Ragged.build(
        sequence_lengths=[4, 4, 4], prompt_lengths=[1, 1, 1], rationales_per_question=[2, 1],
        evidence_ids=[[1, 2], [1, 2], []],
    )  # fmt: skip
    weight = normal(5, 3)
    truth = torch.nn.functional.normalize(weight[1] + weight[2], dim=0)
    torch.testing.assert_close(answer_embeddings(weight, ragged), torch.stack([truth, torch.zeros(3).double()]))


def test_the_noise_scale_recovers_what_was_put_in():
    signal, sigma, count, dim = 2.0, 3.0, 16, 50
    mean = torch.zeros(dim).double()
    mean[0] = signal
    traces, signals = [], []
    for seed in range(400):
        grads = (mean + sigma * normal(count, dim, seed=seed)) / count
        trace, square = noise_scale(grads.square().sum(), grads.sum(0).square().sum(), count)
        traces.append(trace)
        signals.append(square)
    torch.testing.assert_close(torch.stack(traces).mean(), torch.tensor(sigma**2 * dim).double(), rtol=0.02, atol=0)
    torch.testing.assert_close(torch.stack(signals).mean(), torch.tensor(signal**2).double(), rtol=0.3, atol=0)


def test_a_measurement_reads_nothing(tmp_path):
    teachers = ["a", "b", "c", "d"]
    with step("step_0.5b_full", TINY, torch.device("cpu")) as prepared:
        log = InformationLog(tmp_path / "information.jsonl", teachers, CompactConfig())
        result, context = distillation_loss(prepared.model, prepared.batch, Compact(CompactConfig(), teachers))
        assert prepared.batch["ragged"].sizes.most_rationales  # a batch's host copy is read once
        with nothing_read("compact.information"):
            for number in range(2):  # without a queue, and with one
                log.measure(number, context.output, result, prepared.batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_measurement_waits_for_nothing_on_the_device(tmp_path):
    device, teachers = torch.device("cuda"), ["a", "b", "c", "d"]
    with step("step_0.5b_full", TINY, device) as prepared:
        log = InformationLog(tmp_path / "information.jsonl", teachers, CompactConfig())
        strategy = Compact(CompactConfig(), teachers)
        result, context = distillation_loss(prepared.model, prepared.batch, strategy)
        log.measure(0, context.output, result, prepared.batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            log.measure(1, context.output, result, prepared.batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_what_does_not_fit_is_refused_and_leaves_the_queue_as_it_was():
    ragged = Ragged.build(sequence_lengths=[3, 3], prompt_lengths=[1, 1], rationales_per_question=[1, 1])
    queue, hidden, answers, ids = InformationQueue(8), torch.randn(6, 4), torch.randn(2, 3), torch.arange(2)
    for wrong, named in (
        ((hidden[None], answers, ids), "hidden has shape"),
        ((hidden, answers[:1], ids), r"answers has shape \(1, 3\), not \(Q, D_y\) with Q = 2"),
        ((hidden, answers, ids[:1]), r"ids is torch.int64 \(1,\); ids must be int64, one number for each of the 2"),
        ((hidden, answers, ["a", "b"]), "ids is list; ids must be int64"),
    ):
        with pytest.raises(ValueError, match=named):
            queue.measure(*wrong, ragged)
    first = queue.measure(hidden, answers, ids, ragged)
    torch.testing.assert_close(InformationQueue(8).measure(hidden, answers, ids, ragged), first, equal_nan=True)
    for wrong, named in (
        ((torch.randn(6, 5), answers, ids), "hidden has 5 columns, those in the queue have 4"),
        ((hidden, torch.randn(2, 7), ids), "answers has 7 columns, those in the queue have 3"),
    ):
        with pytest.raises(ValueError, match=named):
            queue.measure(*wrong, ragged)
    for dtype in (torch.float64, torch.float32):  # whatever comes next
        queue.measure(hidden.to(dtype), answers.to(dtype), ids + 2, ragged)
    empty = Ragged.from_labels(torch.zeros(0).long(), torch.tensor([0]), torch.tensor([0]))
    found = InformationQueue(8).measure(hidden[:0], answers[:0], ids[:0], empty)
    assert found.curve.shape == found.scalar.shape == (0,) and found.hsic.isnan()


def test_controls_take_what_the_statistics_take():
    ragged = Ragged.build(
        sequence_lengths=[5] * 2, prompt_lengths=[1] * 2, rationales_per_question=[1] * 2, evidence_ids=[[1], [2]],
        thinking=[[True] * 4] * 2,
    )  # fmt: skip
    hidden, weight, targets = torch.randn(10, 4), torch.randn(9, 4), torch.full((10,), 7)
    expected = proxy_controls(hidden, weight, targets, ragged)
    for options in ({"ignore_index": -1}, {"implementation": "reference"}):
        found = proxy_controls(hidden, weight, targets, ragged, **options)
        torch.testing.assert_close(found.wrong_answer, expected.wrong_answer)
    with pytest.raises(ValueError, match=r"evidence has shape \(3,\), the batch has 8 scored rows"):
        proxy_controls(hidden, weight, targets, ragged, evidence=torch.zeros(3))


def test_a_forbidden_answer_of_one_question_spoils_no_others_control():
    ragged = Ragged.build(
        sequence_lengths=[5] * 3, prompt_lengths=[1] * 3, rationales_per_question=[1] * 3,
        evidence_ids=[[1], [2], [3]], thinking=[[True] * 4] * 3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(15, 4, generator=generator), torch.randn(9, 4, generator=generator)
    targets, wrong = torch.full((15,), 5), []
    for forbidden in (-1e4, -float("inf")):
        bias = torch.zeros(9)
        bias[1] = forbidden
        wrong.append(proxy_controls(hidden, weight, targets, ragged, bias=bias).wrong_answer)
    torch.testing.assert_close(wrong[1][1], wrong[0][1])  # neither it nor the next one has that answer
