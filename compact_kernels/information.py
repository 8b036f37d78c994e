"""Mutual information between what the student holds at a token and the gold answer (method §7), and its controls.

Along one rationale the answer is constant, so that dependence can only be seen across questions: every estimate pairs
states with answers over a batch and a queue of earlier questions, and leaves out the own one, whose teachers share one
answer. Nothing waits for the device; memory goes with the number of pairs, not with its square.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compact_kernels import arguments
from compact_kernels.head.linear import LinearHead
from compact_kernels.ops import DEFAULT_WORKSPACE_MIB, Implementation, linear_token_stats
from compact_kernels.ragged import Ragged, segment_of
from compact_kernels.rule import AdaptabilityOptions, segment_sum, sequence_adaptability

BLOCK = 512  # rows of the kernels' matrices that exist at once: a batch and its queue, as a rule
ROWS = 16384  # whose few logits exist at once


# ------------------------------------------------------------------------------------------------ the proxy's controls


class ProxyControls(NamedTuple):
    """S_MI of eq. 3 beside what it would be if nothing but its form mattered; (S,) each, in nats."""

    adaptability: Tensor
    shuffled_mask: Tensor  # the same jumps, thinking tokens put elsewhere in the body
    wrong_answer: Tensor  # jumps towards the answer of the next question that has another; NaN where there is none


@torch.no_grad()
def proxy_controls(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    ragged: Ragged,
    options: AdaptabilityOptions = AdaptabilityOptions(),  # noqa: B008  frozen
    generator: torch.Generator | None = None,
    evidence: Tensor | None = None,
    *,
    ignore_index: int = -100,
    workspace_mib: int = DEFAULT_WORKSPACE_MIB,
    implementation: Implementation = "auto",
    **head: Any,
) -> ProxyControls:
    """The logit-lens proxy of eq. 2–3 and its two controls. A gap to both is what may be called information.

    Args:
        hidden, head_weight, targets, ragged, ignore_index, implementation, head: as
            :func:`compact_kernels.linear_token_stats` takes them.
        options: `length_norm="mean"` takes the sum's growth with length away.
        generator: draws the shuffles, on the batch's device.
        evidence: of the scored rows where it is known: then nothing passes over the vocabulary. (N,)
    """
    if evidence is None:
        evidence = linear_token_stats(
            hidden,
            head_weight,
            targets,
            ragged,
            ignore_index=ignore_index,
            workspace_mib=workspace_mib,
            implementation=implementation,
            **head,
        ).evidence
    elif evidence.shape != (ragged.num_rows,):
        raise ValueError(f"evidence has shape {tuple(evidence.shape)}, the batch has {ragged.num_rows} scored rows")
    kinds, thinking = [evidence, evidence], [ragged.thinking, _shuffled_mask(ragged, generator)]
    if ragged.num_questions > 1 and ragged.evidence_ids.numel():
        kinds.append(_next_answers_evidence(hidden, LinearHead(head_weight, **head), ragged, evidence))
        thinking.append(ragged.thinking)
    own, shuffled, *wrong = sequence_adaptability(torch.stack(kinds), ragged, options, torch.stack(thinking))
    return ProxyControls(own, shuffled, wrong[0] if wrong else torch.full_like(own, float("nan")))


def _next_answers_evidence(hidden: Tensor, head: LinearHead, ragged: Ragged, evidence: Tensor) -> Tensor:
    """Evidence (N,) for the answer of the next question that has another one; NaN where there is none, or no own one.

    The log-sum-exp is that of the own evidence: what differs are the few logits asked for.
    """
    of_id = segment_of(ragged.cu_evidence, ragged.evidence_ids.numel())
    shares = of_id == torch.arange(ragged.num_sequences, device=of_id.device)[:, None]
    shares = shares.to(evidence.dtype) / ragged.cu_evidence.diff()[:, None]  # (S, E), NaN without ids
    following = _others(ragged)[ragged.question_of_sequence]
    change = shares.index_select(0, following.clamp_min(0)) - shares
    change = change.masked_fill((following < 0)[:, None], torch.nan)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    asked = replace(
        head,
        weight=head.weight[ragged.evidence_ids].to(dtype),
        bias=None if head.bias is None else head.bias[ragged.evidence_ids].to(dtype),
    )
    parts = []
    for rows, owner in zip(ragged.rows.split(ROWS), ragged.sequence_of_row.split(ROWS)):
        logits = asked(hidden[rows].to(dtype)).where(change[owner] != 0, 0.0)  # −∞·0, a forbidden id that is not asked
        parts.append((logits * change[owner]).sum(1))
    return evidence + torch.cat(parts)


def _others(ragged: Ragged) -> Tensor:
    """Of each question the first rationale of the next one with another answer; −1 where there is none. (Q,) int64"""
    starts, count, device = ragged.cu_questions[:-1].long(), ragged.num_questions, ragged.device
    first, last = ragged.cu_evidence[starts][:, None], ragged.cu_evidence[starts + 1][:, None]
    places = first + torch.arange(ragged.sizes.longest_answer, device=device)
    inside = places < last
    ids = ragged.evidence_ids[places.where(inside, 0)].where(inside, -1)  # (Q, L)
    other = (ids[:, None] != ids).any(2) & inside.any(1)  # (Q, Q)
    question = torch.arange(count, device=device)
    ahead = ((question - question[:, None]) % count).where(other, count)
    nearest = ahead.min(1)
    return starts[nearest.indices].where(nearest.values < count, -1)


def _shuffled_mask(ragged: Ragged, generator: torch.Generator | None) -> Tensor:
    """Thinking flags (N,) permuted among the steps 1 … B of each rationale, all permutations alike."""
    # Sorted by where a row's group begins and, within the group, by a draw below 1. A body is one group, any other row
    # is one of its own: groups keep their places.
    row = torch.arange(ragged.num_rows, device=ragged.device)
    first = row - (ragged.step_of_row - 1) * ragged.in_body
    draw = torch.rand(ragged.num_rows, device=ragged.device, generator=generator, dtype=torch.float64)
    return ragged.thinking[(first + draw).argsort()]


# --------------------------------------------------------------------------------------------------------------- HSIC


def hsic(
    x: Tensor, y: Tensor, *, scale_x: float | Tensor | None = None, scale_y: float | Tensor | None = None
) -> Tensor:
    """Unbiased HSIC (Song et al. 2012, eq. 5) of N ≥ 4 independent pairs, () ; 0 on average where nothing depends.

    [Σ K∘L + (Σk)(Σl)/((N−1)(N−2)) − 2 k·l/(N−2)] / (N(N−3)), diagonals 0, k = K1, l = L1: one pass over the pairs for
    ΣK∘L, k and l, a block of rows at a time. Sums are float64.

    Args:
        x: (N, D_x). y: (N, D_y).
        scale_x, scale_y: σ of Gaussian kernels exp(−‖·‖²/2σ²); None: linear kernels of centred vectors.
    """
    count = x.shape[0]
    if y.shape[0] != count:
        raise ValueError(f"x has {count} rows, y has {y.shape[0]}: HSIC is of pairs")
    if count < 4:
        raise ValueError(f"unbiased HSIC needs 4 pairs at least, got {count}")
    return _hsic(x, y, torch.ones(count, dtype=torch.bool, device=x.device), scale_x, scale_y)


def _hsic(
    x: Tensor, y: Tensor, kept: Tensor, scale_x: float | Tensor | None, scale_y: float | Tensor | None
) -> Tensor:
    """The same over the pairs that are `kept` (N,); NaN if those are fewer than 4."""
    both = torch.cat([x, y], 1)
    both = both.to(torch.promote_types(both.dtype, torch.float32))
    weight = kept.double()
    count = weight.sum()
    # Differences of states are small beside their common mean, which is taken away first.
    both = both - (both * kept[:, None]).sum(0) / count.clamp_min(1)
    x, y = both.split([x.shape[1], y.shape[1]], 1)
    parts = []
    for start in range(0, x.shape[0], BLOCK):
        rows = slice(start, start + BLOCK)
        pairs = weight[rows, None] * weight
        pairs.diagonal(start).zero_()  # by indices a number would be put that the device has to wait for
        a, b = _kernel(x[rows], x, scale_x) * pairs, _kernel(y[rows], y, scale_y) * pairs
        k, l_ = a.sum(1), b.sum(1)
        parts.append(torch.stack([(a * b).sum(1), k, l_, k * l_]))
    if not parts:
        return count * float("nan")
    inner, k, l_, product = torch.cat(parts, 1).sum(1)
    n, n1, n2, n3 = count - torch.arange(4, device=count.device)
    found = inner.addcdiv(k * l_, n1 * n2).addcdiv(product, n2, value=-2) / (n * n3)
    return torch.where(n >= 4, found, float("nan"))


def _kernel(a: Tensor, b: Tensor, scale: float | Tensor | None) -> Tensor:
    inner = a @ b.t()
    if scale is None:
        return inner
    distance = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * inner).clamp_min(0)
    return torch.exp(-distance / (2 * scale**2))


def median_distance(x: Tensor, most: int = 256) -> Tensor:
    """The median heuristic for σ, (), from `most` rows at most; 1 where all are equal."""
    some = x[:most].to(torch.promote_types(x.dtype, torch.float32))
    distance = torch.pdist(some - some.mean(0))
    median = distance.median() if distance.numel() else distance.new_ones(())
    return torch.where(median > 0, median, 1.0)


# ----------------------------------------------------------------------------------------------------- batch and queue


class Information(NamedTuple):
    """What a batch tells about states and answers. All on its device, without a gradient."""

    curve: Tensor  # (T,) PHSIC: c_t of every packed token
    scalar: Tensor  # (S,) its mean over each rationale's scored rows
    hsic: Tensor  # () unbiased HSIC of the questions' mean states and answers, over batch and queue


class InformationQueue:
    """PHSIC curves and unbiased HSIC against a queue of the last questions (method §7).

    PHSIC (Yokoi et al. 2018) with linear kernels: c_t = ⟨r_t − μ, C (ψ(a) − ν)⟩, C the cross-covariance of states and
    answers, over the questions in the queue and the batch but the own one. C is kept as the sums it is made of, one
    state and one answer a question: C (ψ − ν) = (1/n) Σ_q ⟨ψ_q − ν, ψ − ν⟩ (Σ_t r_qt − n_q μ).

    Args:
        size: questions remembered. State is (size + Q)·(D + D_y) float32 numbers.
    """

    def __init__(self, size: int = 256) -> None:
        if not isinstance(size, int) or size < 4:
            raise ValueError(f"size is {size!r}; it is a whole number, and an estimate needs 4 questions at least")
        self.size = size
        # Σ_t r_qt (M, D), ψ (M, D_y), tokens (M,) and ids (M,) of the last M ≤ size questions, oldest first
        self._kept: tuple[Tensor, ...] | None = None

    @torch.no_grad()
    def measure(self, hidden: Tensor, answers: Tensor, ids: Tensor, ragged: Ragged) -> Information:
        """Curves of a batch, which then joins the queue.

        A question with a state that is not finite has no number in its own curve, and is in nobody else's.

        Args:
            hidden: final hidden states. (T, D)
            answers: ψ(a) of every question, for one :func:`answer_embeddings`. (Q, D_y)
            ids: a number that stands for the question, the same at each visit. (Q,) int64

        Raises:
            ValueError: sizes that do not fit; the queue is then as it was.
        """
        arguments.check_packed(hidden, ragged)
        questions = ragged.num_questions
        if answers.dim() != 2 or answers.shape[0] != questions:
            raise ValueError(f"answers has shape {tuple(answers.shape)}, not (Q, D_y) with Q = {questions} questions")
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != (questions,):
            given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"ids is {given}; ids must be int64, one number for each of the {questions} questions")
        rows = hidden[ragged.rows].to(torch.promote_types(hidden.dtype, torch.float32))
        answers = answers.to(rows.dtype)
        question = ragged.question_of_sequence[ragged.sequence_of_row]  # (N,)
        members = (question == torch.arange(ragged.num_questions, device=question.device)[:, None]).to(rows.dtype)
        # A question with a state that is no number is as one without tokens: in sums it would spoil all others.
        finite = rows.isfinite().all(1)
        sound = answers.isfinite().all(1, keepdim=True) & (members @ (~finite).to(rows.dtype) == 0)[:, None]
        sums = (members @ rows.where(finite[:, None], 0.0)).where(sound, 0.0)
        batch = sums, answers.where(sound, 0.0), members.sum(1).where(sound[:, 0], 0.0), ids
        earlier = tuple(part[:0] for part in batch) if self._kept is None else self._kept
        for name, old, new in zip(("hidden", "answers"), earlier, batch):
            if old.shape[1] != new.shape[1]:
                raise ValueError(f"{name} has {new.shape[1]} columns, those in the queue have {old.shape[1]}")
        everything = tuple(torch.cat([old.to(new), new]) for old, new in zip(earlier, batch))
        all_rows, all_answers, all_counts, all_ids = everything
        others = (all_ids != ids[:, None]).to(rows.dtype)  # (Q, M): which questions each one's covariance is made of
        weight = all_counts * others  # their tokens
        total = weight.sum(1, keepdim=True).clamp_min(1)
        mean_answer = weight @ all_answers / total
        mean_state = others @ all_rows / total
        own = answers - mean_answer  # (Q, D_y)
        alike = (own @ all_answers.t() - (own * mean_answer).sum(1, keepdim=True)) * others  # ⟨ψ_q' − ν, ψ − ν⟩
        direction = (alike @ all_rows - (alike * weight).sum(1, keepdim=True) * mean_state) / total  # (Q, D)
        values = rows @ direction.t() - (mean_state * direction).sum(1)  # (N, Q): of every question
        values = values.gather(1, question[:, None]).squeeze(1)
        curve = rows.new_zeros(hidden.shape[0]).index_copy_(0, ragged.rows, values)
        scalar = segment_sum(values, ragged.cu_rows) / ragged.cu_rows.diff().clamp_min(1)
        pooled = all_rows / all_counts.clamp_min(1)[:, None]
        # One pair a question: of a question met twice, the newest.
        there = all_counts > 0
        again = ((all_ids[:, None] == all_ids) & there).triu(1).any(1)
        found = Information(curve, scalar, _hsic(pooled, all_answers, there & ~again, None, None))
        self._kept = tuple(part[-self.size :] for part in everything)
        return found


@torch.no_grad()
def answer_embeddings(weight: Tensor, ragged: Ragged) -> Tensor:
    """ψ(a) (Q, D): the mean of the answer ids' rows of an embedding or head (V, D), of length 1; zeros without ids."""
    rows = weight[ragged.evidence_ids].to(torch.promote_types(weight.dtype, torch.float32))
    sums = torch.segment_reduce(rows, "sum", offsets=ragged.cu_evidence, axis=0, unsafe=True, initial=0.0)
    first = ragged.cu_questions[:-1]  # a rationale of each question
    sums = sums.view(ragged.num_sequences, weight.shape[1]).index_select(0, first)
    return torch.nn.functional.normalize(sums, dim=-1)


# -------------------------------------------------------------------------------------------------------------- peaks


class Peaks(NamedTuple):
    z: Tensor  # (N,) robust z-score of every value within its segment
    places: Tensor  # (S, most) index of each segment's peaks, highest first; −1 where there are fewer


@torch.no_grad()
def robust_peaks(
    curve: Tensor, offsets: Tensor, longest: int, *, threshold: float = 3.0, most: int = 8, distance: int = 3
) -> Peaks:
    """Peaks of the segments of a curve by z = (c − median) / (1.4826·MAD), on the device.

    A peak has z ≥ threshold and is the highest of its segment within `distance` places, the first of equals.

    Args:
        curve: (N,). offsets: of the segments. (S+1,)
        longest: values of the longest segment, known on the host.
    """
    count = offsets.numel() - 1
    offsets = offsets.long()
    owner = segment_of(offsets, curve.numel())
    step = torch.arange(curve.numel(), device=curve.device) - offsets[owner]
    table = curve.new_full((count, max(longest, 1)), float("inf")).index_put((owner, step), curve)
    centre = _median(table, offsets)
    spread = _median((table - centre[:, None]).abs(), offsets) * 1.4826
    z = table - centre[:, None]
    z = torch.where(spread[:, None] > 0, z / spread[:, None].clamp_min(torch.finfo(z.dtype).tiny), 0.0)
    inside = torch.arange(table.shape[1], device=curve.device) < offsets.diff()[:, None]
    z = torch.where(inside, z, float("-inf"))
    window = torch.nn.functional.pad(z, (distance, distance), value=float("-inf")).unfold(1, 2 * distance + 1, 1)
    first = window.argmax(-1) == distance
    score = torch.where(inside & first & (z >= threshold), z, float("-inf"))
    best, places = score.topk(min(most, score.shape[1]), dim=1)
    return Peaks(z[owner, step], torch.where(best > float("-inf"), places, -1))


def _median(table: Tensor, offsets: Tensor) -> Tensor:
    """Lower medians of the first values of each row, those beyond being +inf or NaN. (S,)"""
    ordered = table.nan_to_num(nan=float("inf"), posinf=float("inf")).sort(1).values
    middle = (offsets.diff() - 1).clamp_min(0) // 2
    return ordered.gather(1, middle[:, None]).squeeze(1)


# --------------------------------------------------------------------------------------------------------- noise scale


def noise_scale(squared_norms: Tensor, total_squared: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """tr Σ and ‖G‖² of McCandlish et al. 2018, unbiased, from one step's gradient Σ_s g_s of S rationales.

    Their ratio is the simple noise scale: how many rationales a step needs for signal and noise to be level. Average
    both over steps before dividing. Rationales are taken as equally weighted draws, which they are only
    roughly under α.

    Args:
        squared_norms: Σ_s ‖g_s‖². ()
        total_squared: ‖Σ_s g_s‖². ()
        count: S ≥ 2.
    """
    if count < 2:
        raise ValueError("the noise scale of a step needs two rationales at least")
    one = squared_norms * count  # the mean of ‖S g_s‖²
    return (one - total_squared) / (1 - 1 / count), (count * total_squared - one) / (count - 1)
