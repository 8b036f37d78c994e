"""What became of every row and rationale: read, used, cut, refused and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EXAMPLES = 100  # reasons kept with their place; the counts are complete


def _zeros(*names: str) -> Any:
    return field(default_factory=lambda: dict.fromkeys(names, 0))


@dataclass
class DataReport:
    """Counts of one stage of the data's way; ``read == used + refused`` for questions and for rationales.

    A rationale of a refused question is refused too. `wrong`, `unrecognised_closings` and `all_wrong` count what the
    stage read and could parse, used or not; `cut` counts used rationales whose body was shortened.
    """

    teachers: list[str] = field(default_factory=list)  # in order of first appearance
    questions: dict[str, int] = _zeros("read", "used", "refused", "all_wrong")
    rationales: dict[str, int] = _zeros("read", "used", "cut", "refused", "wrong", "unrecognised_closings")
    reason_counts: dict[str, int] = field(default_factory=dict)  # why something was refused: how often
    reasons: list[str] = field(default_factory=list)  # "place: reason", the first `EXAMPLES`
    # Evaluation tasks that ask what is trained on: how many such questions, and how many they ask.
    trained_on: dict[str, list[int]] = field(default_factory=dict)

    def because(self, place: str, reason: str, detail: str = "") -> None:
        """Note why something was refused; `reason` is counted, `detail` only shown."""
        self.reason_counts[reason] = self.reason_counts.get(reason, 0) + 1
        if len(self.reasons) < EXAMPLES:
            self.reasons.append(f"{place}: {reason}{' ' + detail if detail else ''}")

    def refuse_question(self, place: str, reason: str, detail: str = "", rationales: int = 0) -> None:
        """Refuse a question with its `rationales`, which have been counted as read."""
        self.questions["refused"] += 1
        self.rationales["refused"] += rationales
        self.because(place, reason, detail)

    def refuse_rationale(self, place: str, reason: str, detail: str = "") -> None:
        self.rationales["refused"] += 1
        self.because(place, reason, detail)

    def add_refusals(self, other: DataReport) -> None:
        """What another file's reading refused, and why; what it used is not this report's."""
        self.questions["refused"] += other.questions["refused"]
        self.rationales["refused"] += other.rationales["refused"]
        self.reason_counts = _added(self.reason_counts, other.reason_counts)
        self.reasons = (self.reasons + other.reasons)[:EXAMPLES]

    def then(self, later: DataReport) -> DataReport:
        """This stage and a later one on what it let through, as one: read here, used there, refused in both.

        What the later stage was not given (held-out questions) is neither used nor refused. The later stage's
        order of teachers stands: the indices in its items mean it.
        """
        return DataReport(
            teachers=later.teachers + [name for name in self.teachers if name not in later.teachers],
            questions=_chained(self.questions, later.questions),
            rationales=_chained(self.rationales, later.rationales),
            reason_counts=_added(self.reason_counts, later.reason_counts),
            reasons=(self.reasons + later.reasons)[:EXAMPLES],
            trained_on=self.trained_on | later.trained_on,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self, examples: int = 5, file: Path | None = None) -> str:
        """A few lines for people.

        Args:
            file: where the whole report is, if it is anywhere.
        """
        q, r = self.questions, self.rationales
        held_out = f"{q['held_out']:,} held out, " if "held_out" in q else ""
        lines = [
            f"{q['used']:,} of {q['read']:,} questions used, {held_out}{q['refused']:,} refused; "
            f"{r['used']:,} of {r['read']:,} rationales used, {r['cut']:,} cut, {r['refused']:,} refused, "
            f"{r['wrong']:,} with a wrong answer, {r['unrecognised_closings']:,} without a closing we know; "
            f"teachers: {', '.join(self.teachers) or 'none'}"
        ]
        if q["all_wrong"]:
            lines.append(f"  every rationale wrong: {q['all_wrong']:,} questions")
        lines += [
            f"  {count:,} × {reason}"
            for reason, count in sorted(self.reason_counts.items(), key=lambda item: -item[1])
        ]
        if r.get("left_out"):
            lines.append(f"  {r['left_out']:,} rationales of teachers that the strategy does not train on left out")
        lines += [f"  {reason}" for reason in self.reasons[:examples]]
        more = sum(self.reason_counts.values()) - examples
        if more > 0:
            lines.append(f"  … and {more:,} more" + (f" ({file} has the first {EXAMPLES})" if file else ""))
        lines += [f"  {told}" for told in told_trained_on(self.trained_on)]
        return "\n".join(lines)


def told_trained_on(trained_on: Mapping[str, list[int]]) -> list[str]:
    """A line for each task of which the run trains on questions."""
    return [
        f"{name}: {shared:,} of its {asked:,} questions {'is' if shared == 1 else 'are'} trained on too; its accuracy "
        "counts what was memorised"
        for name, (shared, asked) in trained_on.items()
    ]


def _added(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in [*a, *(key for key in b if key not in a)]}


def _chained(first: dict[str, int], later: dict[str, int]) -> dict[str, int]:
    return {**later, "read": first["read"], "refused": first["refused"] + later["refused"]}
