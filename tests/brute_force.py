"""The method in loops: eq. 2–11 from full log-softmax, one rationale and one token at a time.

Shares no code with the package: a rationale here is a handful of Python lists, its place in the packed batch is
counted by hand. What the package computes is compared with what these functions say.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compact_kernels import Ragged

IGNORED = -100


@dataclass
class Rationale:
    hidden: Tensor  # (prompt + completion, D)
    prompt: int
    targets: list[int]  # of the completion, IGNORED where one does not count
    body: int
    evidence: list[int]
    span: tuple[int, int]  # first token and length, in the completion
    thinking: list[bool]  # of the completion
    consensus: float = 0.0


Question = list[Rationale]


@dataclass
class Head:
    weight: Tensor  # (V, D)
    options: dict[str, Any] = field(default_factory=dict)  # bias, logit_scale, softcap, temperature

    def logp(self, hidden: Tensor) -> Tensor:
        z = hidden @ self.weight.T
        if self.options.get("bias") is not None:
            z = z + self.options["bias"]
        z = z * self.options.get("logit_scale", 1.0)
        cap = self.options.get("softcap")
        if cap is not None:
            z = cap * torch.tanh(z / cap)
        return torch.log_softmax(z / self.options.get("temperature", 1.0), -1)

    def leaves(self) -> list[Tensor]:
        bias = self.options.get("bias")
        return [self.weight] if bias is None else [self.weight, bias]


@dataclass
class Batch:
    """Questions as the package takes them."""

    hidden: Tensor  # (T, D)
    targets: Tensor  # (T,)
    ragged: Ragged
    consensus: Tensor  # (S,)


def random_head(generator: torch.Generator, kind: str = "plain", vocabulary: int = 23, width: int = 7) -> Head:
    """A float64 head: plain, with a bias, or with everything that logits may go through."""
    head = Head(torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).requires_grad_())
    if kind != "plain":
        head.options["bias"] = torch.randn(vocabulary, generator=generator, dtype=torch.float64).requires_grad_()
    if kind == "capped":
        head.options |= {"logit_scale": 0.7, "softcap": 2.5, "temperature": 1.6}
    return head


def random_questions(
    seed: int, counts: Sequence[int], vocabulary: int = 23, width: int = 7, *, ignored: float = 0.15
) -> list[Question]:
    """Questions of ragged rationales: empty and long bodies, empty evidence, spans that are absent or differ."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    questions = []
    for q, count in enumerate(counts):
        answer = [rng.randrange(vocabulary) for _ in range(0 if q % 3 == 2 else rng.randint(1, 3))]
        question = []
        for k in range(count):
            prompt, body = rng.randint(1, 4), 0 if rng.random() < 0.2 else rng.randint(1, 7)
            length = 0 if k == 3 else len(answer) + (k == 2)  # an answer of its own at 2, none at 3
            completion = [rng.randrange(vocabulary) for _ in range(body + 1 + length + 1)]
            question.append(
                Rationale(
                    hidden=torch.randn(prompt + len(completion), width, generator=generator, dtype=torch.float64),
                    prompt=prompt,
                    targets=[IGNORED if rng.random() < ignored else token for token in completion],
                    body=body,
                    evidence=answer,
                    span=(body + 1, length),
                    thinking=[rng.random() < 0.3 for _ in completion],
                    consensus=rng.random(),
                )
            )
        questions.append(question)
    return questions


def pack(questions: Sequence[Question]) -> Batch:
    rationales = [r for question in questions for r in question]
    targets = [
        t for r in rationales for t in [*[IGNORED] * (r.prompt - 1), *r.targets, IGNORED]
    ]  # position p is to predict token p + 1
    ragged = Ragged.build(
        sequence_lengths=[len(r.hidden) for r in rationales],
        prompt_lengths=[r.prompt for r in rationales],
        rationales_per_question=[len(question) for question in questions],
        body_lengths=[r.body for r in rationales],
        evidence_ids=[r.evidence for r in rationales],
        answer_spans=[r.span for r in rationales],
        thinking=[r.thinking for r in rationales],
    )
    return Batch(
        hidden=torch.cat([r.hidden for r in rationales]).detach().requires_grad_(),
        targets=torch.tensor(targets),
        ragged=ragged,
        consensus=torch.tensor([r.consensus for r in rationales], dtype=torch.float64),
    )


def log_probabilities(questions: Sequence[Question], hidden: Tensor, head: Head) -> list[list[Tensor]]:
    """Full log-softmax of the scored rows r_0 … r_{T−1}, a (T, V) for each rationale of each question."""
    at, result = 0, []
    for question in questions:
        rows = []
        for r in question:
            rows.append(head.logp(hidden[at + r.prompt - 1 : at + r.prompt - 1 + len(r.targets)]))
            at += len(r.hidden)
        result.append(rows)
    return result


def token_statistics(question: Question, logps: list[Tensor]) -> dict[str, list[float]]:
    """Each statistic of each scored row of a question."""
    result: dict[str, list[float]] = {"logprob": [], "entropy": [], "evidence": [], "grad_norm": []}
    for r, logp in zip(question, logps):
        logp = logp.detach()
        for t, target in enumerate(r.targets):
            p = logp[t].exp()
            counts = target != IGNORED
            result["logprob"].append(float(logp[t, target]) if counts else 0.0)
            result["entropy"].append(-sum(float(x * y) for x, y in zip(p, logp[t]) if x > 0))
            result["evidence"].append(evidence(r, logp[t]))
            residual = p.clone()
            residual[target if counts else 0] -= 1
            result["grad_norm"].append(math.sqrt(sum(float(x) ** 2 for x in residual)) if counts else 0.0)
    return result


def evidence(r: Rationale, logp: Tensor) -> float:
    """I_t (eq. 2)."""
    logp = logp.detach()
    return sum(float(logp[a]) for a in r.evidence) / len(r.evidence) if r.evidence else 0.0


def adaptability(r: Rationale, logp: Tensor, epsilon: float = 0.1, span: str = "body", mean: bool = False) -> float:
    """S_MI (eq. 3)."""
    information = [evidence(r, row) for row in logp]
    last = min(r.body, len(logp) - 1) if span == "body" else len(logp) - 1
    total = 0.0
    for t in range(1, last + 1):  # y_t is targets[t - 1]
        total += max(information[t] - information[t - 1], 0.0) * (1.0 if r.thinking[t - 1] else epsilon)
    return total / max(r.body, 1) if mean else total


def difficulty(r: Rationale, logp: Tensor) -> float:
    """S_PPL (eq. 6)."""
    losses = [-logp[t, target].item() for t, target in enumerate(r.targets) if target != IGNORED]
    return sum(losses) / len(losses) if losses else 0.0


def zscores(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [0.0 if std <= 1e-6 * max(1.0, abs(mean)) else (v - mean) / std for v in values]


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(v - max(values)) for v in values]
    return [w / sum(weights) for w in weights]


def alpha(
    metrics: list[tuple[float, float, float]], beta: tuple[float, float, float] = (1.0, 1.0, 1.0), tau: float = 1.0
) -> list[float]:
    """eq. 7 for the (S_MI, S_cons, S_PPL) of one question's rationales."""
    z = [zscores(list(column)) for column in zip(*metrics)]
    return softmax(
        [(beta[0] * a + beta[1] * c - beta[2] * d) / tau for a, c, d in zip(*z)],
    )


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Mean over rows of KL(p ‖ q)."""
    return (logp.exp() * (logp - logq)).sum(-1).mean()


def jsd(logp: Tensor, logq: Tensor) -> Tensor:
    middle = ((logp.exp() + logq.exp()) / 2).log()
    return (kl(logp, middle) + kl(logq, middle)) / 2


def divergence(question: Question, logps: list[Tensor], weights: Sequence[float], kind: str = "kl") -> Tensor:
    """Σ_k α_k L_MCon,k (eq. 9–11) of one question, or MIND's Σ_{i<j} α_i α_j JSD(i ‖ j)."""
    spans = [logp[r.span[0] : r.span[0] + r.span[1]] for r, logp in zip(question, logps)]
    total = logps[0].sum() * 0
    for i, p in enumerate(spans):
        for j, q in enumerate(spans):
            if i == j or len(p) == 0 or len(p) != len(q):
                continue
            if kind == "kl":
                total = total + weights[i] * weights[j] * kl(p, q)
            elif i < j:
                total = total + weights[i] * weights[j] * jsd(p, q)
    return total


def sft(
    questions: Sequence[Question], logps: list[list[Tensor]], weights: list[list[float]], reduction: str
) -> Tensor:
    """Σ_q Σ_k α_k L_SFT,k before it is normalised: per rationale the mean under "mean", else the token sum."""
    total = logps[0][0].sum() * 0
    for question, rows, share in zip(questions, logps, weights):
        for r, logp, a in zip(question, rows, share):
            counted = [t for t, target in enumerate(r.targets) if target != IGNORED]
            for t in counted:
                total = total - a * logp[t, r.targets[t]] / (len(counted) if reduction == "mean" else 1)
    return total


def denominators(questions: Sequence[Question]) -> tuple[int, float]:
    """Q, the questions with a scored row, and N = Σ_q (1/K_q) Σ_k T_qk."""
    counted = [sum(target != IGNORED for r in question for target in r.targets) for question in questions]
    return sum(c > 0 for c in counted), sum(c / len(question) for c, question in zip(counted, questions))


def affinity(query: Tensor, key: Tensor, temperature: float = 1.0) -> list[list[float]]:
    """A_ij of one question (eq. 4) from (K, H, d): softmax per head, then the mean over heads."""
    count, heads, width = query.shape
    result = [[0.0] * count for _ in range(count)]
    for h in range(heads):
        for i in range(count):
            scores = [
                sum(float(x * y) for x, y in zip(query[i, h], key[j, h])) / math.sqrt(width) for j in range(count)
            ]
            for j, a in enumerate(softmax([s / temperature for s in scores])):
                result[i][j] += a / heads
    return result
