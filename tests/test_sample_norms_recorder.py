"""The recorder of norms: how it plans a batch, groups, estimates, and what it refuses by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compact_kernels import Ragged, SampleGradNorms, sample_grad_norms
from compact_kernels.sample_norms import costs
from compact_kernels.sample_norms.result import SampleNorms
from compact_kernels.sample_norms.segments import Segments
from tests.architectures import tiny
from tests.norm_cases import batch, fused, recorded, student


def cut(*lengths: int) -> Segments:
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return Segments.of(torch.tensor(offsets, dtype=torch.int32), offsets)


RAGGED = (1500, 2500, 1501, 2499, 2047, 2049, 4000, 288)  # tokens in all as eight of 2048


@pytest.mark.parametrize(
    ("lengths", "own", "stored"),  # of 896 → 2 × 4864; of weights of 4864, 896, 128 and 16 outputs
    [
        ((256,) * 32, False, [False, False, False, False]),
        ((512,) * 8, False, [False, False, False, False]),
        ((2048,) * 8, True, [True, True, False, False]),
        (RAGGED, True, [True, False, False, False]),  # one rationale's small product would leave a device idle
        ((2048,) * 40, True, [False, True, True, False]),  # 4864 outputs are 665 MiB
    ],
)
def test_long_rationales_have_their_products_stored_where_that_is_less_work(lengths, own, stored):
    segments = cut(*lengths)
    assert costs.own(896, [4864, 4864], segments) is own
    assert [costs.stored(896, outputs, segments) for outputs in (4864, 896, 128, 16)] == stored
    assert costs.own(896, [16], segments)


@pytest.mark.parametrize("products", ["auto", "own", "gram"])
def test_a_recorder_plans_each_batch_by_its_lengths(products):
    model = nn.Sequential(nn.Linear(896, 4864))
    recorder = SampleGradNorms(model, products=products)
    for lengths, own in (((2048,) * 8, True), ((256,) * 4, False), ((2048,) * 8, True)):
        ragged = Ragged.build(
            sequence_lengths=lengths, prompt_lengths=[1] * len(lengths), rationales_per_question=[len(lengths)]
        )
        with recorder.record(ragged):
            (family,) = recorder._families
            assert family.own is (own if products == "auto" else products == "own")
            assert family.stored == [own]


def test_norms_of_one_batch_are_never_anothers():
    model, ragged = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double(), batch()[2]
    recorder = SampleGradNorms(model, products="gram")
    x = torch.randn(1, int(ragged.cu_seqlens[-1]), 6, dtype=torch.float64)

    def step(scale: float) -> tuple[SampleNorms, Tensor]:
        with recorder.record(ragged) as norms:
            return norms, model(scale * x).square().sum()

    first, loss = step(1.0)
    loss.backward()
    one = first.squared
    second, loss = step(2.0)
    with pytest.raises(RuntimeError, match="norms of an earlier batch"):
        _ = first.squared
    loss.backward()
    two = second.squared
    (later, loss), (last, other) = step(1.0), step(2.0)  # two forward passes, then their backward passes
    other.backward()
    loss.backward()
    torch.testing.assert_close(later.squared, one)
    torch.testing.assert_close(last.squared, two)


def test_parameters_that_train_or_freeze_later_are_an_error():
    model, ragged = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), batch()[2]
    model[0].weight.requires_grad_(False)
    recorder = SampleGradNorms(model)
    for name, parameter in (("0.weight trains now", model[0].weight), ("1.bias trains no more", model[1].bias)):
        parameter.requires_grad_(not parameter.requires_grad)
        with pytest.raises(RuntimeError, match=name), recorder.record(ragged):
            pass
        parameter.requires_grad_(not parameter.requires_grad)
    with recorder.record(ragged):
        pass


def test_a_recorder_that_cannot_be_made_leaves_no_layer_changed():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False))
    recorder = SampleGradNorms(model[2])
    with pytest.raises(ValueError, match="2.weight's layer has a recorder already"):
        SampleGradNorms(model)
    recorder.remove()
    assert not any("_sample_norms" in layer.__dict__ or "forward" in layer.__dict__ for layer in model)
    SampleGradNorms(model)


def test_groups_add_up_and_name_the_parts():
    model = student("gpt2")
    ids, targets, ragged = batch()
    with sample_grad_norms(model, ragged) as norms:
        fused(model, ids, targets, ragged).backward()
    groups = norms.by_group
    assert set(groups) == {"wte", "wpe", "ln_1", "attn", "ln_2", "mlp", "ln_f"}
    torch.testing.assert_close(sum(groups.values()), norms.squared)
    by_layer = lambda name: "first" if ".0." in name else "rest"  # noqa: E731
    with sample_grad_norms(model, ragged, groups=by_layer) as norms:
        fused(model, ids, targets, ragged).backward()
    assert set(norms.by_group) == {"first", "rest"}


def test_hutchinson_is_unbiased_and_knows_its_error():
    model = student("llama", lora=False)
    ids, targets, ragged = batch()
    exact = recorded(model, lambda: fused(model, ids, targets, ragged), ragged)
    torch.manual_seed(0)
    estimates, errors = [], []
    recorder = SampleGradNorms(model, method="hutchinson", probes=8)
    for _ in range(40):
        with recorder.record(ragged) as norms:
            fused(model, ids, targets, ragged).backward()
        estimates.append(norms.squared)
        errors.append(norms.standard_error)
    mean, spread = torch.stack(estimates).mean(0), torch.stack(estimates).std(0)
    assert ((mean - exact).abs() < 4 * spread / 40**0.5).all()
    assert (spread > 0).all()
    torch.testing.assert_close(torch.stack(errors).square().mean(0).sqrt(), spread, rtol=0.5, atol=0)


def test_an_error_of_a_batch_that_is_past_is_no_other_batch_s():
    model = student("llama", lora=False)
    ids, targets, ragged = batch()
    recorder = SampleGradNorms(model, method="hutchinson", probes=4)
    found = []
    for _ in range(2):
        with recorder.record(ragged) as norms:
            fused(model, ids, targets, ragged).backward()
        found.append(norms)
    with pytest.raises(RuntimeError, match="norms of an earlier batch"):
        found[0].standard_error  # noqa: B018
    assert (found[1].standard_error > 0).all()


def test_a_layer_that_is_the_model_is_recorded():
    layer, x = nn.Linear(4, 3).double(), torch.randn(1, 5, 4).double()
    ragged = Ragged.build(sequence_lengths=[2, 3], prompt_lengths=[1, 1], rationales_per_question=[2])
    with SampleGradNorms(layer).record(ragged) as norms:
        layer(x).square().sum().backward()
    expected = []
    for part in x.split([2, 3], dim=1):
        gradients = torch.autograd.grad(layer(part).square().sum(), layer.parameters())
        expected.append(sum(gradient.square().sum() for gradient in gradients))
    torch.testing.assert_close(norms.by_group["model"], torch.stack(expected))


@pytest.mark.parametrize("probes", [2, 33, 64])
def test_as_many_probes_as_there_may_be(probes):
    model = student("llama", lora=False)
    ids, targets, ragged = batch()
    recorder = SampleGradNorms(model, method="hutchinson", probes=probes)
    with recorder.record(ragged) as norms:
        fused(model, ids, targets, ragged).backward()
    assert (norms.squared > 0).all() and (norms.standard_error > 0).all()


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)) * self.gain


def test_what_is_not_covered_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"gain trains, but its norm is not covered.*no rule for a _Odd"):
        SampleGradNorms(_Odd())
    model = _Odd()
    recorder = SampleGradNorms(model, uncovered="skip")
    assert recorder.skipped == ["gain"]
    ragged = Ragged.build(sequence_lengths=[2, 3], prompt_lengths=[1, 1], rationales_per_question=[2])
    with recorder.record(ragged), pytest.raises(RuntimeError, match="layer.weight is used twice"):
        model(torch.randn(5, 4))
    with recorder.record(ragged), pytest.raises(RuntimeError, match=r"two passes want a record\(\) each"):
        model.layer(torch.randn(5, 4))
        model.layer(torch.randn(5, 4))
    with recorder.record(ragged), pytest.raises(RuntimeError, match="called on 6 rows, the batch has 5"):
        model(torch.randn(6, 4))
    with pytest.raises(ValueError, match="no rule for a MixtralTopKRouter"):
        SampleGradNorms(tiny("mixtral"))
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match=r"0\.weight trains.*shared with 1\.weight"):
        SampleGradNorms(shared)
