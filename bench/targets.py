"""What was promised, and what the records say of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.records import Record

HEADS = ("151936x896", "128256x2048", "152064x3584")
WITHOUT = "compact_without_norms"
INFORMATION = "compact_with_information"
MIND, WITHOUT_MIND = "compact_with_mind", "compact_without_mind"
MODES = ("_frozen", "_compiled", "_captured")  # endings of names: contenders of one mode are compared with each other


# Of a step with norms over the same step without, by what trains and by mode; Opacus covers `linear` and `lora` alone.
LIMITS: dict[str, dict[str, float]] = {
    "lora": {"": 1.10, "_compiled": 1.03, "_captured": 1.03},
    "full": {"": 1.10, "_compiled": 1.07, "_captured": 1.07},
    "linear": {},
}


@dataclass(frozen=True)
class Verdict:
    """One promise on one head: `measured` must not exceed `limit`."""

    work: str
    head: str
    promise: str
    limit: float
    unit: str  # "×", "MiB" or "GiB"
    measured: float | None  # None: not measured, and `against` says why
    against: str  # what the figure was compared with
    peak_mib: float | None = None  # all that ours held at once, a float32 accumulator included

    @property
    def hit(self) -> bool | None:
        return None if self.measured is None else self.measured <= self.limit


def is_ours(record: Record) -> bool:
    return record["contender"].startswith("compact")


def mode(record: Record) -> str:
    """One of :data:`MODES`, or ""."""
    return next((ending for ending in MODES if record["contender"].endswith(ending)), "")


def fastest_peer(
    records: Sequence[Record], like: Record, *, under_mib: float | None = None, compacted: bool = True
) -> Record | None:
    """The fastest contender that is not ours, of the work, head and mode of `like`.

    With `under_mib`, of those whose peak memory, without a float32 accumulator, stays under it; without `compacted`,
    of those that see every row, as no loss but ours leaves out by itself those that are not scored.
    """
    peers = [
        record
        for record in records
        if (record["work"], record["head"], mode(record)) == (like["work"], like["head"], mode(like))
        and not is_ours(record)
        and "error" not in record
        and (compacted or "_compacted" not in record["contender"])
        and (under_mib is None or (record["peak_mib"] is not None and record["peak_mib"] < under_mib))
    ]
    return min(peers, key=lambda record: record["median_ms"], default=None)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Every promise, in the order of the works; those of cases without any record are left out."""
    return [
        verdict
        for verdict in _promises(list(records))
        if any((record["work"], record["head"]) == (verdict.work, verdict.head) for record in records)
    ]


def _promises(records: list[Record]) -> Iterator[Verdict]:
    for head, loss, frozen, statistics in zip(HEADS, (0.92, 1.02, 1.02), (0.92, 0.98, 1.0), (1.3, 1.2, 1.1)):
        at = _Case(records, head)
        yield at.peer("loss", "by question, everything on", loss)
        yield at.floor("loss", "by question, everything on", 1.08)
        yield at.peer("loss_small_workspace", "the same within 320 MiB", 1.0, under_mib=1024)
        yield at.peer("frozen_head", "frozen head, everything on", frozen)
        yield at.floor("frozen_head", "frozen head, everything on", 1.12)
        yield at.peer("masked_40", "40% of rows masked", 0.92)
        yield at.floor("statistics", "statistics only", statistics)
        yield at.other("given_weights", "compact_rule", "compact_given", "rule and statistics", 1.05)
        yield at.memory("long_rationales", "long rationales, head frozen", 1280, "compact_frozen")
        yield at.memory("long_rationales", "long rationales, head trained", 1280)
        yield at.peer("long_rationales", "long rationales, head frozen", 0.95, "compact_frozen", under_mib=4096)
        yield at.peer("long_rationales", "long rationales, head trained", 1.25, under_mib=4096)
    for size, time_limit in (("0.5b", 0.94), ("1.5b", 1.0)):
        for kind, memory_limit in (("lora", 0.3), ("full", 0.9)):
            work = f"step_{size}_{kind}"
            head = next((record["head"] for record in records if record["work"] == work), "")
            for name in ("compact", "compact_compiled"):
                at = _Case(records, head)
                promise = f"whole step, {size.upper()} {kind}{', compiled' if name != 'compact' else ''}"
                yield at.peer(work, promise, time_limit, name, compacted=False)
                yield at.peer(work, f"{promise}, peers given the scored rows alone", time_limit, name)
                yield at.leanest(work, promise, memory_limit, name)
    yield from _norms(records)


def _norms(records: list[Record]) -> Iterator[Verdict]:
    """Steps with norms, information or MIND: each mode against the same step without, eager against Opacus."""
    works = [
        (f"step_{size}_{kind}_norms", f"{size.upper()} {kind}", kind) for size in ("0.5b", "1.5b") for kind in LIMITS
    ]
    works.append(("step_0.5b_full_long_norms", "0.5B full, 8 × 2048", "long"))
    for work, label, kind in works:
        at = _Case(records, next((record["head"] for record in records if record["work"] == work), ""))
        for ending, limit in LIMITS.get(kind, {"_compiled": 1.15, "_captured": 1.15}).items():
            name, without = f"compact{ending}", f"{WITHOUT}{ending}"
            if ending == "_compiled" and at.find(work, name) is None and at.find(work, "compact_captured"):
                continue  # compiled or captured: either will do
            promise = f"norms, {label}{', ' + ending[1:] if ending else ''}"
            yield at.other(work, name, without, promise, limit)
            if ending != "_captured":  # a graph's memory is its own from capture on
                yield at.memory_ratio(work, name, without, f"{promise}: memory", 1.05)
        if kind in ("lora", "linear"):
            yield at.other(work, "compact", "opacus_ghost", f"norms, {label}, against ghost clipping", 0.6)
        if kind == "full":
            promise = f"information at every step, {label}"
            yield at.other(work, INFORMATION, WITHOUT, promise, 1.02)
            yield at.other(work, MIND, WITHOUT_MIND, f"MIND's assistant, {label}", 1.03)


@dataclass(frozen=True)
class _Case:
    """The promises on one head."""

    records: list[Record]
    head: str

    def find(self, work: str, name: str) -> Record | None:
        wanted = (work, self.head, name)
        return next((r for r in self.records if (r["work"], r["head"], r["contender"]) == wanted), None)

    def ratio(self, work: str, promise: str, limit: float, name: str, other: float | None, against: str) -> Verdict:
        ours = self.find(work, name)
        if ours is None or "error" in ours:
            return Verdict(work, self.head, promise, limit, "×", None, _missing(name, ours))
        if not other:
            return Verdict(work, self.head, promise, limit, "×", None, f"{against}: not measured")
        total = None if ours["peak_mib"] is None else ours["peak_mib"] + ours["dw_accum_mib"]
        return Verdict(work, self.head, promise, limit, "×", ours["median_ms"] / other, against, total)

    def peer(
        self,
        work: str,
        promise: str,
        limit: float,
        name: str = "compact",
        under_mib: float | None = None,
        compacted: bool = True,
    ) -> Verdict:
        like = {"work": work, "head": self.head, "contender": name}
        peer = fastest_peer(self.records, like, under_mib=under_mib, compacted=compacted)
        against = "fastest peer" + (f" under {under_mib / 1024:g} GiB" if under_mib else "")
        if peer is None:
            return self.ratio(work, promise, limit, name, None, against)
        against += f": {peer['contender']}"
        ours = self.find(work, name)
        if ours is not None and ours.get("run") != peer.get("run"):
            against += " (another run)"
        return self.ratio(work, promise, limit, name, peer["median_ms"], against)

    def floor(self, work: str, promise: str, limit: float, name: str = "compact") -> Verdict:
        ours = self.find(work, name) or {}
        against = "one matrix product" if work == "statistics" else "floor"
        return self.ratio(work, promise, limit, name, ours.get("floor_ms"), against)

    def other(self, work: str, name: str, other: str, promise: str, limit: float) -> Verdict:
        found = self.find(work, other) or {}
        return self.ratio(work, promise, limit, name, found.get("median_ms"), other)

    def memory_ratio(self, work: str, name: str, other: str, promise: str, limit: float) -> Verdict:
        ours, theirs = self.find(work, name), self.find(work, other) or {}
        if ours is None or ours.get("peak_mib") is None:
            return Verdict(work, self.head, promise, limit, "×", None, _missing(name, ours))
        if not theirs.get("peak_mib"):
            return Verdict(work, self.head, promise, limit, "×", None, f"{other}: not measured")
        ratio = ours["peak_mib"] / theirs["peak_mib"]
        return Verdict(work, self.head, promise, limit, "×", ratio, f"memory of {other}", ours["peak_mib"])

    def memory(self, work: str, promise: str, limit: float, name: str = "compact") -> Verdict:
        ours = self.find(work, name)
        if ours is None or "error" in ours or ours["peak_mib"] is None:
            return Verdict(work, self.head, promise, limit, "MiB", None, _missing(name, ours))
        return Verdict(work, self.head, promise, limit, "MiB", ours["peak_mib"], "peak without dW")

    def leanest(self, work: str, promise: str, limit: float, name: str) -> Verdict:
        """GiB of peak memory over the peer of the same mode that needs least."""
        ours = self.find(work, name)
        if ours is None or "error" in ours or ours["peak_mib"] is None:
            return Verdict(work, self.head, promise, limit, "GiB", None, _missing(name, ours))
        peers = [
            r
            for r in self.records
            if (r["work"], r["head"], mode(r)) == (work, self.head, mode(ours))
            and not is_ours(r)
            and r.get("peak_mib") is not None
        ]
        if not peers:
            return Verdict(work, self.head, promise, limit, "GiB", None, "leanest peer: not measured")
        peer = min(peers, key=lambda r: r["peak_mib"])
        over = (ours["peak_mib"] - peer["peak_mib"]) / 1024
        return Verdict(work, self.head, promise, limit, "GiB", over, f"over the leanest peer: {peer['contender']}")


def _missing(name: str, record: Record | None) -> str:
    return f"{name}: {'not measured' if record is None else record.get('error', 'memory not measured')}"
