"""The results file, its verdicts and its page, on made-up records; the benchmarked cases themselves run in bench."""

from __future__ import annotations

import math
import time

import pytest
import torch

from bench import attention, norms, page, records
from bench.batches import make_problem
from bench.measure import measure
from bench.shapes import TINY, Shape
from bench.targets import fastest_peer, verdicts
from bench.works import WORKS, Contender, accumulator_mib

HEAD = "151936x896"


def record(work: str, contender: str, ms: float, mib: float | None = 100.0, head: str = HEAD, **more) -> dict:
    times = {"median_ms": ms, "p20_ms": 0.98 * ms, "p80_ms": 1.02 * ms, "peak_mib": mib, "dw_accum_mib": 0.0}
    common = {"device": "a GPU", "versions": {"torch": "2.11"}, "commit": "abc", "run": "1", "floor_ms": 10.0}
    return {"work": work, "head": head, "contender": contender, **times, **common, **more}


def failed(work: str, contender: str, error: str = "OutOfMemoryError: tried to allocate") -> dict:
    kept = ("work", "head", "contender", "device", "versions", "commit", "run")
    return {name: value for name, value in record(work, contender, 1.0).items() if name in kept} | {"error": error}


def verdict(found: list[dict], work: str, unit: str = "×", against: str = ""):
    return next(v for v in verdicts(found) if v.work == work and v.unit == unit and against in v.against)


def test_ratio_is_taken_to_the_fastest_peer_that_ran():
    found = [
        record("loss", "compact", 11.0),
        record("loss", "compact_no_divergence", 1.0),
        record("loss", "cce", 15.0),
        record("loss", "torch_compile", 12.0),
        failed("loss", "liger"),
    ]
    fastest = verdict(found, "loss", against="peer")
    assert fastest.measured == pytest.approx(11 / 12) and fastest.hit and "torch_compile" in fastest.against
    assert verdict(found, "loss", against="floor").measured == pytest.approx(1.1)
    assert verdict(found, "loss", against="floor").hit is False


def test_a_small_workspace_is_held_against_small_peers_only():
    found = [
        record("loss_small_workspace", "compact", 12.0),
        record("loss_small_workspace", "torch_compile", 9.0, mib=2300.0),
        record("loss_small_workspace", "cce", 13.0, mib=20.0),
    ]
    assert verdict(found, "loss_small_workspace").measured == pytest.approx(12 / 13)
    assert "cce" in verdict(found, "loss_small_workspace").against


def test_frozen_and_compiled_contenders_are_compared_with_their_own_kind():
    found = [
        record("long_rationales", "compact", 50.0),
        record("long_rationales", "compact_frozen", 30.0),
        record("long_rationales", "cce", 45.0),
        record("long_rationales", "cce_frozen", 40.0),
    ]
    assert fastest_peer(found, found[0])["contender"] == "cce"
    assert fastest_peer(found, found[1])["contender"] == "cce_frozen"
    steps = [record("step_0.5b_lora", name, ms) for name, ms in (("compact", 93.0), ("compact_compiled", 60.0))]
    peers = (("cce", 100.0), ("cce_compiled", 50.0), ("torch_compile_compacted_compiled", 48.0))
    steps += [record("step_0.5b_lora", name, ms) for name, ms in peers]
    measured = {v.promise.partition("lora")[2]: v.measured for v in verdicts(steps) if v.unit == "×"}
    given = ", peers given the scored rows alone"
    expected = {"": 0.93, given: 0.93, ", compiled": 1.2, f", compiled{given}": 1.25}
    assert measured == pytest.approx(expected)


def test_memory_of_a_step_is_counted_over_the_leanest_peer():
    found = [
        record("step_1.5b_full", "compact", 190.0, mib=27648.0),
        record("step_1.5b_full", "torch_compile", 195.0, mib=29000.0),
        record("step_1.5b_full", "cce", 205.0, mib=26624.0),
    ]
    over = verdict(found, "step_1.5b_full", "GiB", against="leanest")
    assert over.measured == pytest.approx(1.0) and over.hit is False and "cce" in over.against


def test_norms_are_held_against_the_same_step_without_them_in_each_mode_and_against_ghost_clipping():
    work = "step_0.5b_lora_norms"
    times = {"compact": (108.0, 99.0), "compact_compiled": (62.0, 60.0), "compact_captured": (51.0, 50.0)}
    found = [record(work, "opacus_ghost", 200.0, mib=9000.0)]
    for name, (with_norms, without) in times.items():
        bare = name.replace("compact", "compact_without_norms", 1)
        found += [record(work, name, with_norms, mib=4400.0), record(work, bare, without, mib=4000.0)]
    said = {v.promise: (v.measured, v.hit) for v in verdicts(found)}
    assert said == {
        "norms, 0.5B lora": (pytest.approx(108 / 99), True),
        "norms, 0.5B lora: memory": (pytest.approx(1.1), False),
        "norms, 0.5B lora, compiled": (pytest.approx(62 / 60), False),
        "norms, 0.5B lora, compiled: memory": (pytest.approx(1.1), False),
        "norms, 0.5B lora, captured": (pytest.approx(1.02), True),
        "norms, 0.5B lora, against ghost clipping": (pytest.approx(0.54), True),
    }
    missing = [v for v in verdicts([record("step_0.5b_linear_norms", "compact", 9.0)])]
    assert [(v.hit, v.against) for v in missing] == [(None, "opacus_ghost: not measured")]


def test_mind_is_held_against_the_same_step_without_its_assistant(tmp_path):
    work = "step_1.5b_full_norms"
    times = {"compact_without_norms": 190.0, "compact_without_mind": 200.0, "compact_with_mind": 205.0}
    found = [record(work, name, ms, mib=9000.0) for name, ms in times.items()]
    assistant = next(v for v in verdicts(found) if v.promise == "MIND's assistant, 1.5B full")
    assert assistant.measured == pytest.approx(1.025) and assistant.limit == 1.03
    page.write(found, tmp_path / "gpu.json")
    text = (tmp_path / "gpu.md").read_text()
    assert "| **compact_with_mind** | 205.00 (200.90–209.10) | 1.02 |" in text
    assert "| MIND's assistant, 1.5B full | 151936x896 | ≤ 1.03 × | 1.02 × | hit | compact_without_mind |" in text


def test_mind_and_the_step_without_its_assistant_run_where_all_trains():
    arms = {norms.MIND, norms.WITHOUT_MIND}

    def run(work: str) -> list[dict]:
        shape = TINY.students["0.5b"].head
        wanted = arms.__contains__
        return measure(work, shape, TINY, torch.device("cpu"), wanted=wanted, rounds=1, say=lambda _: None)

    found = run("step_0.5b_full_norms")
    assert {r["contender"] for r in found} == arms and all(r.get("median_ms", 0) > 0 for r in found)
    assert run("step_0.5b_lora_norms") == run("step_0.5b_full_long_norms") == []


def test_what_failed_or_is_missing_is_not_measured_and_says_why():
    found = [failed("loss", "compact", "RuntimeError: boom"), record("loss", "cce", 10.0)]
    assert verdict(found, "loss").hit is None and "boom" in verdict(found, "loss").against
    assert not [v for v in verdicts(found) if v.work == "frozen_head"]


def test_merging_replaces_the_same_case_only(tmp_path):
    old = [record("loss", "compact", 11.0), record("loss", "cce", 15.0)]
    new = [record("loss", "compact", 10.0), record("frozen_head", "compact", 7.0)]
    path = tmp_path / "deep" / "gpu.json"
    records.save(records.merged(old, new), path)
    assert [r["median_ms"] for r in records.load(path)] == [10.0, 15.0, 7.0]


def test_the_page_names_every_contender_and_draws_every_work(tmp_path):
    found = [record(work, "compact", 11.0) for work in (*WORKS, "step_0.5b_lora")]
    found += [record(work, "cce", 15.0, mib=9.0, note="drops gradients") for work in (*WORKS, "step_0.5b_lora")]
    found += [failed("loss", "quack")]
    page.write(found, tmp_path / "gpu.json")
    text = (tmp_path / "gpu.md").read_text()
    for name in ("**compact**", "cce", "quack", "drops gradients", "tried to allocate", "| 0.73 |"):
        assert name in text, name
    for work in (*WORKS, "steps"):
        assert (tmp_path / f"gpu-{work}.png").stat().st_size > 5000


@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_every_layout_of_a_problem_has_the_same_scored_rows(masked):
    problem = make_problem(
        Shape(1000, 48),
        questions=4,
        rationales=3,
        tokens=50,
        masked=masked,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    scored = problem.dense_targets != -100
    assert scored.float().mean().item() == pytest.approx(1 - masked, abs=0.01)
    assert torch.equal(problem.dense[scored], problem.rows)
    assert torch.equal(problem.packed[problem.ragged.rows], problem.rows)
    assert torch.equal(problem.packed_targets[problem.ragged.rows], problem.row_targets)
    assert torch.equal(problem.packed_targets[problem.packed_targets != -100], problem.row_targets)
    logits = problem.rows @ problem.head.T
    p = torch.nn.functional.cross_entropy(logits, problem.row_targets, reduction="none").neg().exp()
    assert 0.5 < p.mean() < 0.7 and (p > 0.99).any() and (p < 0.05).any()
    assert math.isclose(problem.row_weights.sum().item(), 1.0, rel_tol=1e-5)


def test_contenders_of_a_work_give_the_same_gradient_per_row():
    problem = WORKS["given_weights"].problem(Shape(512, 64), TINY, torch.device("cpu"))
    gradients = {}
    for contender in WORKS["given_weights"].contenders:
        if contender.name not in ("compact_given", "torch_eager", "torch_linear_cross_entropy"):
            continue
        runner = contender.runner(problem, TINY)
        if runner.error is not None:  # this torch may not have the op
            continue
        problem.clear()
        runner.run()
        packed = problem.packed.grad
        gradients[contender.name] = problem.rows.grad if packed is None else packed[problem.ragged.rows]
    reference = gradients.pop("torch_eager")
    assert "compact_given" in gradients
    for name, gradient in gradients.items():
        assert (gradient - reference).norm() < 1e-4 * reference.norm(), name


def test_the_accumulator_is_counted_where_a_low_precision_head_trains_in_several_chunks():
    problem = make_problem(
        Shape(512, 64), questions=2, rationales=2, tokens=1100, dtype=torch.bfloat16, device=torch.device("cpu")
    )  # 4400 rows of 1 KiB

    def counted(**options) -> float:
        return accumulator_mib(Contender("x", lambda *_: None, **options), problem)

    assert counted(workspace_mib=4) == 512 * 64 * 4 / 2**20
    assert counted(workspace_mib=5) == 0
    assert counted(workspace_mib=4, trains_head=False) == 0
    assert counted(accumulates_fp32=True) > 0 and counted() == 0


def test_packed_attention_adds_its_records_and_its_section(tmp_path):
    path = tmp_path / f"{records.file_stem()}.json"
    records.save([record("loss", "compact", 11.0)], path)
    attention.main(["--out", str(tmp_path), "--rounds", "2", "--cases", "ragged", "--commit", "abc"])
    found = {r["contender"]: r for r in records.load(path) if r["work"] == "attention"}
    assert {"sdpa_separate", "sdpa_padded", "sdpa_masked", "compact_varlen", "flex"} <= found.keys()
    for one in found.values():
        assert "error" in one or one["median_ms"] > 0
    for name in ("sdpa_padded", "sdpa_masked", "compact_varlen"):
        assert found[name]["error_ratio"] < 2  # the largest single error may be noise where all are rounding alone
    written = path.with_suffix(".md").read_text()
    assert "## Packed attention" in written and "**compact_varlen**" in written and "## Whole steps" not in written
    assert len([r for r in records.load(path) if r["work"] == "loss"]) == 1


def test_a_path_passes_up_to_twice_the_error_of_sdpa_alone_in_norm_and_in_its_largest():
    def errors(norm: float, largest: float) -> dict[str, list[float]]:
        return {name: [norm if name == "dk" else 0.001, largest if name == "dv" else 0.01] for name in attention.NAMES}

    alone = errors(0.001, 0.01)
    assert attention.against(errors(0.0019, 0.019), alone)["exact"]
    assert attention.against(errors(0.0021, 0.01), alone) == {
        "error_ratio": 2.1,
        "max_error_ratio": 1.0,
        "exact": False,
    }
    assert not attention.against(errors(0.001, 0.021), alone)["exact"]


def test_what_attention_must_do_is_counted_by_hand():
    case = attention.Case(4, 2, 16, "2 sequences", (1, 3))
    pairs = 1 + 6
    assert case.flop == 7 * 2 * 16 * 4 * pairs  # q·k and p·v; again q·k, dp, dv, dq, dk
    assert case.bytes_moved(2) == 2 * 16 * 4 * (6 * 4 + 6 * 2)
    lengths = attention.ragged_lengths(32, 8192)
    assert len(lengths) == 32 and sum(lengths) == 8192 and min(lengths) >= 1 and max(lengths) > 2 * 256


def test_a_contender_that_never_warms_up_is_given_up(monkeypatch):
    from bench import timing

    monkeypatch.setattr(timing, "WARMUP_SECONDS", 1)
    slow = timing.Runner("slow", lambda: time.sleep(30))
    quick = timing.Runner("quick", lambda: None)
    timing.time_rounds([slow, quick], rounds=5, say=lambda _: None)
    assert "took more than 1 s" in str(slow.error)
    assert quick.error is None and len(quick.seconds) == 5
