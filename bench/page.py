"""The readable page: what was promised and what came, then every work's table and picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench import pictures
from bench.records import Record
from bench.shapes import ATTENTION
from bench.targets import MIND, WITHOUT, WITHOUT_MIND, Verdict, fastest_peer, is_ours, mode, verdicts
from bench.works import WORKS

MEMORY = "peak beyond inputs and gradients, dW included"

STEP_QUESTION = (
    "A whole training step without optimizer on one packed batch of which 30% are prompt tokens: COMPACT with eq. 2 "
    "to 11 against plain fine-tuning with each peer's loss on the same backbone, attention and packing. Names that "
    "end in `_compiled` have their decoder layers compiled and are compared with each other. Memory is the step's "
    "whole peak, weights and activations included. `_mixed`: all parameters train, in float32, under autocast, as in "
    "the trainer."
)
NORMS_QUESTION = (
    "The same step with the exact norm of every rationale's gradient over all trainable parameters, against the step "
    "without (`× without`, in the same mode), and Opacus' ghost clipping on the same batch. `compact_with_mind` is "
    "MIND's step, against the same step without its assistant (`compact_without_mind`). Names that end in `_captured` "
    "are one CUDA graph, whose memory is not counted. `_long`: 8 rationales of 2048 tokens; `_linear`: only the "
    "decoder's linear layers train."
)
ATTENTION_QUESTION = (
    "Forward and backward of one causal attention layer (heads × size / key-value heads) over a packed batch, without "
    "projections; written by `python -m bench.attention`. *Synced* is the time with the device idle before, launches "
    "included; the time itself is taken with the launches queued, as in a step. *Share* is the useful products' rate "
    "over that of a matrix product of 8192³; the floor is that rate, or every tensor once at the measured copy "
    "bandwidth where this takes longer. *Error* is the worst of output, dq, dk and dv against float64, by norm and by "
    "largest element, over that of SDPA on every sequence alone (at most 2 is passed). A mask over the packed row "
    "(`sdpa_masked`) and flex's block mask are made beforehand, once for all layers."
)
READING = """\
Every round of a case runs each contender once, in turn; times are medians with the 20% and 80% quantiles, gradients
of hidden states and head included. *Peak* is the most memory allocated in a round beyond inputs and returned
gradients; the float32 buffer in which a head's gradient is summed over chunks stands apart as *dW* and is not in it.
The *floor* is the head's matrix products through cuBLAS plus four bytes a logit at the measured copy bandwidth
(statistics: one product alone), timed in the same rounds. Batches are 8 questions of 4 rationales of 256 rows unless a
work says otherwise; hidden states are drawn so that the target's mean probability is {mean_p}.
"""


def write(records: Sequence[Record], path: Path) -> None:
    """`<path>.md` and its pictures, beside the results file `path`."""
    if not records:
        return
    parts = [f"# Losses side by side on {records[-1]['device']}", _provenance(records)]
    mean_p = sorted({record["mean_p"] for record in records if "mean_p" in record})
    parts.append(
        READING.format(mean_p=" to ".join(dict.fromkeys(f"{p:.2f}" for p in (*mean_p[:1], *mean_p[-1:]))) or "-")
    )
    if not pictures.AVAILABLE:
        parts.append("Without pictures: matplotlib is not installed.")
    promised = verdicts(records)
    if promised:
        parts += ["## Targets", _target_table(promised)]
    for work in dict.fromkeys(record["work"] for record in records if record["work"] in WORKS):
        here = [record for record in records if record["work"] == work]
        parts += [f"## {work}", WORKS[work].question]
        image = path.with_name(f"{path.stem}-{work}.png")
        if pictures.draw(here, f"{work}, {here[-1]['device']}", image, memory=MEMORY):
            parts.append(f"![{work}: time against memory]({image.name})")
        parts.append(_work_table(here))
    if layers := [record for record in records if record["work"] == ATTENTION]:
        parts += ["## Packed attention", ATTENTION_QUESTION]
        image = path.with_name(f"{path.stem}-{ATTENTION}.png")
        title = f"packed attention, {layers[-1]['device']}"
        if pictures.draw(layers, title, image, memory=MEMORY):
            parts.append(f"![packed attention: time against memory]({image.name})")
        parts.append(_attention_table(layers))
    whole = [record for record in records if record["work"] not in (*WORKS, ATTENTION)]
    for title, name, question, column, ratio in (
        ("Whole steps", "steps", STEP_QUESTION, "× fastest peer", _against_peers),
        ("Steps with gradient norms", "norms", NORMS_QUESTION, "× without", _against_without),
    ):
        some = [record for record in whole if record["work"].endswith("_norms") == (name == "norms")]
        if not some:
            continue
        parts += [f"## {title}", question]
        image = path.with_name(f"{path.stem}-{name}.png")
        if pictures.draw(some, f"{title.lower()}, {some[-1]['device']}", image, memory="whole peak", panel="work"):
            parts.append(f"![{title.lower()}: time against memory]({image.name})")
        parts.append(_step_table(some, column, ratio))
    path.with_suffix(".md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


def _provenance(records: Sequence[Record]) -> str:
    commits = dict.fromkeys(record["commit"] for record in records)
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for package, version in record["versions"].items():
            versions.setdefault(package, {})[version] = None
    listed = ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items())
    runs = len({record.get("run") for record in records})
    backends = {record.get("compile_backend", "inductor") for record in records} - {"inductor"}
    return (
        f"Written by `python -m bench`, commit {', '.join(commits)}; {listed}."
        + (f" The cases come from {runs} runs." if runs > 1 else "")
        + (f" Toy sizes; torch.compile with the backend {', '.join(backends)}." if backends else "")
    )


def _target_table(promised: Sequence[Verdict]) -> str:
    counted = [verdict.hit for verdict in promised if verdict.hit is not None]
    left = len(promised) - len(counted)
    lines = [
        f"{sum(counted)} of {len(counted)} hit" + (f", {left} not measured." if left else "."),
        "",
        "| work | head | target | measured | | against | our whole peak |",
        "|---|---|---:|---:|---|---|---:|",
    ]
    for verdict in promised:
        measured = "–" if verdict.measured is None else _figure(verdict.measured, verdict.unit)
        peak = "" if verdict.peak_mib is None else f"{verdict.peak_mib / 1024:.2f} GiB"
        cells = [verdict.promise, verdict.head, f"≤ {_figure(verdict.limit, verdict.unit)}", measured]
        lines.append(f"| {' | '.join([*cells, _word(verdict), verdict.against, peak])} |")
    return "\n".join(lines)


def _work_table(records: Sequence[Record]) -> str:
    lines = [
        "| head | contender | ms (p20–p80) | × fastest peer | × floor | peak MiB | dW MiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for head in dict.fromkeys(record["head"] for record in records):
        here = _by_time(records, "head", head)
        floor = next((record["floor_ms"] for record in here if record.get("floor_ms")), None)
        first = head.replace("x", " × ") + (f"<br>floor {floor:.2f} ms" if floor else "")
        for record in here:
            ratios = [_against_peers(records, record), _ratio(record["median_ms"], record.get("floor_ms"))]
            memory = [_number(record["peak_mib"]), _number(record["dw_accum_mib"] or None)]
            lines.append(f"| {' | '.join([first, _name(record), _time(record), *ratios, *memory])} |")
            first = ""
    return "\n".join(lines + _remarks(records, "head"))


def _step_table(records: Sequence[Record], column: str, ratio: Callable[[Sequence[Record], Record], str]) -> str:
    lines = [f"| step | contender | ms (p20–p80) | {column} | peak GiB |", "|---|---|---:|---:|---:|"]
    for work in dict.fromkeys(record["work"] for record in records):
        first = work
        for record in _by_time(records, "work", work):
            memory = "–" if record["peak_mib"] is None else f"{record['peak_mib'] / 1024:.2f}"
            cells = [first, _name(record), _time(record), ratio(records, record), memory]
            lines.append(f"| {' | '.join(cells)} |")
            first = ""
    return "\n".join(lines + _remarks(records, "work"))


def _against_without(records: Sequence[Record], record: Record) -> str:
    name = WITHOUT_MIND if record["contender"] in (MIND, WITHOUT_MIND) else WITHOUT + mode(record)
    found = next((r for r in records if r["work"] == record["work"] and r["contender"] == name), None)
    return "–" if found is None or "error" in found else _ratio(record["median_ms"], found["median_ms"])


def _attention_table(records: Sequence[Record]) -> str:
    lines = [
        "| layer, batch | path | ms (p20–p80) | synced | × floor | share | peak MiB | error |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for head in dict.fromkeys(record["head"] for record in records):
        first = head.replace("x", " × ")
        for record in _by_time(records, "head", head):
            share = "–" if record["share_of_gemm"] is None else f"{record['share_of_gemm']:.0%}"
            error = "–"
            if "exact" in record:
                error = f"{record['error_ratio']:.2f}, {record['max_error_ratio']:.2f}"
                error += "" if record["exact"] else " **too large**"
            ratio, peak = _ratio(record["median_ms"], record["floor_ms"]), _number(record["peak_mib"])
            time = f"{record['median_ms']:.3f} ({record['p20_ms']:.3f}–{record['p80_ms']:.3f})"
            cells = [first, _name(record), time, f"{record['synchronized_ms']:.3f}", ratio, share, peak, error]
            lines.append(f"| {' | '.join(cells)} |")
            first = ""
    masks = [f"{r['mask_ms']:.2f} ms ({r['head']})" for r in records if "mask_ms" in r]
    said = ["", f"- flex's block mask: {', '.join(masks)}"] if masks else []
    return "\n".join(lines + _remarks(records, "head") + said)


def _by_time(records: Sequence[Record], field: str, value: str) -> list[Record]:
    return sorted((r for r in records if r[field] == value and "error" not in r), key=lambda r: r["median_ms"])


def _name(record: Record) -> str:
    return f"**{record['contender']}**" if is_ours(record) else record["contender"]


def _remarks(records: Sequence[Record], where: str) -> list[str]:
    """What contenders do not do (on which `where`, if one has more than one note), and those that could not run."""
    notes: dict[str, dict[str, list[str]]] = {}
    for record in records:
        if record.get("note"):
            notes.setdefault(record["contender"], {}).setdefault(record["note"], []).append(record[where])
    failures: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if "error" in record:
            failures.setdefault((record[where], record["error"]), []).append(f"`{record['contender']}`")
    together: dict[tuple[str, str], list[str]] = {}
    for (place, error), names in failures.items():
        together.setdefault((", ".join(names), error), []).append(place)
    lines = []
    for name, said in notes.items():
        for note, places in said.items():
            on = f" on {', '.join(dict.fromkeys(places))}" if len(said) > 1 else ""
            lines.append(f"- `{name}`{on}: {note}")
    lines += [f"- {names} did not run on {', '.join(places)}: {error}" for (names, error), places in together.items()]
    return ["", *lines] if lines else []


def plain_table(records: Sequence[Record]) -> str:
    """For a terminal."""
    lines = []
    for record in records:
        where = f"{record['work']:27}{record['head']:13}{record['contender']:28}"
        if "error" in record:
            lines.append(f"{where}{record['error'][:60]}")
            continue
        peak = "" if record["peak_mib"] is None else f"{record['peak_mib']:9.0f} MiB + {record['dw_accum_mib']:.0f}"
        lines.append(
            f"{where}{record['median_ms']:9.2f} ms  peer {_against_peers(records, record):>5}  "
            f"floor {_ratio(record['median_ms'], record.get('floor_ms')):>5} {peak}"
        )
    return "\n".join(lines)


def plain_targets(records: Sequence[Record]) -> str:
    return "\n".join(
        f"{_word(v):13}{v.work:27}{v.head:13}"
        f"{'–' if v.measured is None else _figure(v.measured, v.unit)} (≤ {_figure(v.limit, v.unit)}) {v.against}"
        for v in verdicts(records)
    )


def _against_peers(records: Sequence[Record], record: Record) -> str:
    peer = fastest_peer(records, record)
    return "–" if peer is None else _ratio(record["median_ms"], peer["median_ms"])


def _ratio(value: float, other: float | None) -> str:
    return f"{value / other:.2f}" if other else "–"


def _time(record: Record) -> str:
    return f"{record['median_ms']:.2f} ({record['p20_ms']:.2f}–{record['p80_ms']:.2f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _figure(value: float, unit: str) -> str:
    return f"{value:.2f} ×" if unit == "×" else f"{value:,.0f} MiB" if unit == "MiB" else f"{value:.2f} GiB"


def _word(verdict: Verdict) -> str:
    return {True: "hit", False: "missed", None: "not measured"}[verdict.hit]
