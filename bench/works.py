"""The works on the head alone: who does what on which rows. `python -m bench` and pytest share these cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import peers
from bench.batches import Problem, make_problem
from bench.peers import PEERS, Loss
from bench.shapes import Scale, Shape
from bench.timing import Round, Runner, one_line
from compact_kernels import compatibility_loss, linear_token_stats

WORKSPACE_MIB = 1280
SMALL_WORKSPACE_MIB = 320
LONG_WORKSPACE_MIB = 900  # and the copy of so many scored rows beside it
MASKED_WORKSPACE_MIB = 1536  # what the compacted logits of torch.compile take as well


@dataclass(frozen=True)
class Contender:
    """One way to do the work."""

    name: str
    build: Callable[[Problem, Scale], Round]
    note: str = ""
    workspace_mib: int | None = None  # ours only
    trains_head: bool = True
    accumulates_fp32: bool = False

    def runner(self, problem: Problem, scale: Scale) -> Runner:
        runner = Runner(self.name, _nothing, before=problem.clear, note=self.note)
        try:
            runner.run = self.build(problem, scale)
        except Exception as error:  # a peer that is not installed, or not for this device
            runner.error = one_line(error)
        return runner


@dataclass(frozen=True)
class Work:
    """Contenders on one kind of batch, and the matrix products that bound them."""

    contenders: tuple[Contender, ...]
    products: int  # of the floor: 1 logits, 2 and dX, 3 and dW
    masked: float = 0.0
    long: bool = False
    question: str = ""  # what the work asks, for the page

    def problem(self, shape: Shape, scale: Scale, device: torch.device) -> Problem:
        return make_problem(
            shape,
            questions=scale.long_questions if self.long else scale.questions,
            rationales=scale.rationales,
            tokens=scale.long_tokens if self.long else scale.tokens,
            masked=self.masked,
            dtype=scale.dtype,
            device=device,
        )


def accumulator_mib(contender: Contender, problem: Problem) -> float:
    """The float32 buffer in which a head's gradient is summed over chunks of rows, apart from the workspace.

    None where the head is frozen or is float32 itself, nor where one chunk holds every row.
    """
    head = problem.head
    if not contender.trains_head or head.dtype == torch.float32:
        return 0.0
    if contender.workspace_mib is not None:
        row_bytes = head.shape[0] * head.element_size()
        needed = problem.rows.shape[0] * row_bytes > contender.workspace_mib << 20
    else:
        needed = contender.accumulates_fp32
    return head.numel() * 4 / 2**20 if needed else 0.0


def _nothing() -> None:
    raise RuntimeError("was not built")


# ------------------------------------------------------------------------------------------------------------- ours


def _compact(
    name: str,
    *,
    workspace_mib: int = WORKSPACE_MIB,
    divergence: float = 0.1,
    given: bool = False,
    frozen: bool = False,
) -> Contender:
    """COMPACT's loss with everything that its rule asks for, or with `given` weights."""

    def build(problem: Problem, scale: Scale) -> Round:
        head = problem.frozen_head if frozen else problem.head
        alpha: dict[str, Any] = {"weights": problem.weights} if given else {"consensus": problem.consensus}

        def run() -> None:
            compatibility_loss(
                problem.packed,
                head,
                problem.packed_targets,
                problem.ragged,
                divergence_weight=divergence,
                workspace_mib=workspace_mib,
                **alpha,
            ).loss.backward()

        return run

    return Contender(name, build, workspace_mib=workspace_mib, trains_head=not frozen)


def _compact_statistics(problem: Problem, scale: Scale) -> Round:
    return lambda: linear_token_stats(
        problem.packed.detach(),
        problem.frozen_head,
        problem.packed_targets,
        problem.ragged,
        workspace_mib=WORKSPACE_MIB,
    )


# ------------------------------------------------------------------------------------------------------------ peers


def _peer(
    name: str, *, rows: str = "rows", frozen: bool = False, weighted: bool = False, suffix: str = ""
) -> Contender:
    """A peer on `rows` (the scored ones) or on `dense` ones (masked by their targets)."""
    peer = PEERS[name]
    targets = {"rows": "row_targets", "dense": "dense_targets"}[rows]

    def build(problem: Problem, scale: Scale) -> Round:
        loss: Loss = peer.build(scale)
        head = problem.frozen_head if frozen else problem.head
        hidden, wanted = getattr(problem, rows), getattr(problem, targets)
        weights = problem.row_weights if weighted and peer.weights else None

        def run() -> None:
            loss(hidden, head, wanted, weights).backward()

        return run

    notes = [peer.note] if peer.note else []
    if weighted and not peer.weights:
        notes.append("knows no per-token weights: timed on the mean")
    return Contender(
        name + suffix, build, "; ".join(notes), trains_head=not frozen, accumulates_fp32=peer.accumulates_fp32
    )


def _peers(**options) -> tuple[Contender, ...]:
    return tuple(_peer(name, **options) for name in PEERS)


def _compiled_statistics(problem: Problem, scale: Scale) -> Round:
    score = peers.scoring(scale)

    def run() -> None:
        with torch.no_grad():
            score(problem.rows, problem.frozen_head, problem.row_targets)

    return run


def _logprob_only(name: str) -> Contender:
    def build(problem: Problem, scale: Scale) -> Round:
        loss = PEERS[name].build(scale)

        def run() -> None:
            with torch.no_grad():
                loss(problem.rows, problem.frozen_head, problem.row_targets, problem.row_weights)

        return run

    return Contender(name, build, "log-probs only", trains_head=False)


def _statistics() -> Iterator[Contender]:
    yield Contender("compact", _compact_statistics, workspace_mib=WORKSPACE_MIB, trains_head=False)
    yield Contender("torch_compile", _compiled_statistics, "log-prob and entropy only", trains_head=False)
    yield _logprob_only("liger")
    yield _logprob_only("cce")


WORKS: dict[str, Work] = {
    "loss": Work(
        (_compact("compact"), _compact("compact_no_divergence", divergence=0.0), *_peers()),
        products=3,
        question="Forward and backward of the head, gradients of hidden states and head. COMPACT: weights by question "
        "from evidence, consensus and difficulty, answer divergence on, 1280 MiB of logits; peers: the mean loss.",
    ),
    "loss_small_workspace": Work(
        (_compact("compact", workspace_mib=SMALL_WORKSPACE_MIB), *_peers()),
        products=3,
        question="The same with 320 MiB of logits, against those peers that stay under 1 GiB.",
    ),
    "frozen_head": Work(
        (_compact("compact", frozen=True), *_peers(frozen=True)),
        products=2,
        question="The same with the head frozen, for everyone.",
    ),
    "masked_40": Work(
        (
            _compact("compact", workspace_mib=MASKED_WORKSPACE_MIB),
            *_peers(rows="dense"),
            _peer("torch_compile", suffix="_compacted"),
        ),
        products=3,
        masked=0.4,
        question="40% of the rows are prompts. Peers are told by the ignored index; torch_compile_compacted is given "
        "the scored rows alone, picked beforehand. 1536 MiB of logits for COMPACT, where they all fit.",
    ),
    "long_rationales": Work(
        (
            _compact("compact"),
            _compact("compact_frozen", frozen=True, workspace_mib=LONG_WORKSPACE_MIB),
            *_peers(),
            *_peers(frozen=True, suffix="_frozen"),
        ),
        products=3,
        long=True,
        question="2 questions of 4 rationales of 4096 tokens: a question does not fit the workspace of 1280 MiB. Head "
        "trained, and frozen with 900 MiB of logits, so that all is under 1280. The floor is of the trained head.",
    ),
    "statistics": Work(
        tuple(_statistics()),
        products=1,
        question="Log-prob, entropy, answer evidence and gradient norm of every row, no gradients. The floor is one "
        "matrix product.",
    ),
    "given_weights": Work(
        (
            _compact("compact_given", divergence=0.0, given=True),
            _compact("compact_rule", divergence=0.0),
            *_peers(weighted=True),
        ),
        products=3,
        question="Per-token weights given beforehand, and for COMPACT also decided in the pass (compact_rule).",
    ),
}
