"""The in-degree of eq. 5 in one launch against the plain one, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from compact_kernels import Ragged, question_affinity, question_consensus
from tests.head_cases import use_native_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def launch(request, triton_kernels, monkeypatch) -> None:
    """Who computes: Triton, or the native library where there is a GPU."""
    if request.param == "cuda":
        use_native_cuda(monkeypatch, "consensus", "in_degree")


def make_ragged(counts: tuple[int, ...]) -> Ragged:
    total = sum(counts)
    return Ragged.build(sequence_lengths=[2] * total, prompt_lengths=[1] * total, rationales_per_question=counts)


def states(ragged: Ragged, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    query, key = torch.randn(2, ragged.num_sequences, *shape, generator=generator).to(dtype)
    return query, key


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh outputs full of NaN: an entry that is not written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


@pytest.mark.parametrize("counts", [(1,), (3, 1, 5, 2), (2, 2), (17, 3), (64,)])
@pytest.mark.parametrize("shape", [(7,), (1, 8), (5, 33), (14, 64)])
def test_the_in_degree_is_that_of_the_plain_graph(counts, shape, poisoned):
    from compact_kernels.consensus import in_degree

    if DEVICE == "cpu" and sum(counts) * len(shape) > 60:
        shape = (2, shape[-1])  # the interpreter takes a millisecond for each head of each rationale
    ragged = make_ragged(counts)
    query, key = states(ragged, *shape)
    wanted = question_consensus(query.double(), key.double(), ragged, temperature=1.3)
    actual = in_degree(query.to(DEVICE), key.to(DEVICE), ragged.to(DEVICE), 1.3)
    torch.testing.assert_close(actual.double().cpu(), wanted, rtol=1e-5, atol=1e-6)
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_read_as_stored_and_summed_in_float32(dtype):
    from compact_kernels.consensus import in_degree

    ragged = make_ragged((4, 3))
    query, key = states(ragged, 3, 40, dtype=dtype)
    wanted = question_consensus(query.double(), key.double(), ragged)
    actual = in_degree(query.to(DEVICE), key.to(DEVICE), ragged.to(DEVICE))
    torch.testing.assert_close(actual.double().cpu(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [question_consensus, lambda *given: question_affinity(*given)[0]])
def test_autocast_has_no_part_in_the_graph(op):
    ragged = make_ragged((4, 3))
    query, key = states(ragged, 3, 40)
    query, key, ragged = query.to(DEVICE), key.to(DEVICE), ragged.to(DEVICE)
    wanted = op(query, key, ragged)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(op(query, key, ragged), wanted)


def test_wide_heads_are_summed_block_by_block(monkeypatch):
    from compact_kernels import consensus

    monkeypatch.setattr(consensus, "TILE", 64)
    ragged = make_ragged((3, 4))
    query, key = states(ragged, 3, 100)
    wanted = question_consensus(query.double(), key.double(), ragged)
    actual = consensus.in_degree(query.to(DEVICE), key.to(DEVICE), ragged.to(DEVICE))
    torch.testing.assert_close(actual.double().cpu(), wanted, rtol=1e-5, atol=1e-6)


def test_states_may_be_views_of_one_projection():
    from compact_kernels.consensus import in_degree

    ragged = make_ragged((3, 2))
    both = torch.randn(5, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    query, key = both[:, :, 0], both[:, :2, 1].repeat_interleave(2, 1)  # grouped-query keys
    moved = both.to(DEVICE)
    wanted = question_consensus(query.double(), key.double(), ragged)
    for stored in (key.to(DEVICE), key.mT.contiguous().mT.to(DEVICE)):
        actual = in_degree(moved[:, :, 0], stored, ragged.to(DEVICE))
        torch.testing.assert_close(actual.double().cpu(), wanted, rtol=1e-5, atol=1e-6)


def test_saturated_scores_stay_finite():
    from compact_kernels.consensus import in_degree

    ragged = make_ragged((3,))
    query, key = states(ragged, 2, 8)
    wanted = question_consensus(query.double() * 1e3, key.double(), ragged)
    actual = in_degree((query * 1e3).to(DEVICE), key.to(DEVICE), ragged.to(DEVICE))
    torch.testing.assert_close(actual.double().cpu(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("counts", [(3, 1, 2), (1,), ()])
def test_the_slots_of_a_question_are_those_of_the_affinity(counts):
    from compact_kernels.rule import question_slots

    ragged = make_ragged(counts)
    index, present = question_slots(ragged.to(DEVICE))
    query, key = states(ragged, 2, 8)
    wanted = question_affinity(query, key, ragged)[1]
    assert torch.equal(present.cpu(), wanted)
    assert index.dtype == torch.int64
    assert index[present].tolist() == list(range(sum(counts))) and not index[~present].any()


def test_sizes_that_do_not_fit_are_named():
    from compact_kernels import question_consensus

    ragged = make_ragged((3,))
    with pytest.raises(ValueError, match=r"query \(2, 8\).*3 rationales"):
        question_consensus(torch.zeros(2, 8), torch.zeros(2, 8), ragged)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_none_is_an_error(temperature):
    ragged = Ragged.build(sequence_lengths=[2, 2], prompt_lengths=[1, 1], rationales_per_question=[2])
    for op in (question_consensus, question_affinity):
        with pytest.raises(ValueError, match="temperature is .*; it must be above 0"):
            op(torch.randn(2, 3), torch.randn(2, 3), ragged, temperature=temperature)


@pytest.mark.parametrize("centrality", ["in_degree", "pagerank", "eigenvector"])
def test_states_that_are_not_finite_show_in_their_own_question_alone(centrality):
    ragged = make_ragged((3, 2)).to(DEVICE)
    query, key = torch.randn(2, 5, 8, device=DEVICE)
    query[1] = float("nan")
    found = question_consensus(query, key, ragged, centrality=centrality)
    assert found[:3].isnan().any() and found[3:].isfinite().all()
