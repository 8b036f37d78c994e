"""Norms by hooks, as eager layers give them: what a node of autograd's would do, they do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from compact_kernels import Ragged, SampleGradNorms
from compact_kernels.sample_norms import hooks, layers, ops, plain
from compact_kernels.sample_norms.linear import Family

LENGTHS = (3, 2, 4)


class Siblings(nn.Module):
    """A norm layer, and layers with one input: two with biases (their outputs are views), one without."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 4, bias=False)
        self.o_proj = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm(x)
        return self.q_proj(x), self.k_proj(x), self.o_proj(self.v_proj(x).tanh())


def setting() -> tuple[Siblings, Tensor, Ragged]:
    torch.manual_seed(0)
    ragged = Ragged.build(sequence_lengths=LENGTHS, prompt_lengths=[1] * 3, rationales_per_question=[3])
    return Siblings().double(), torch.randn(1, sum(LENGTHS), 6, dtype=torch.float64), ragged


def recorder_of(model: Siblings) -> SampleGradNorms:
    return SampleGradNorms(model, products="gram", groups=lambda name: "all")  # q, k and v are a family


def rows(*outputs: Tensor) -> Tensor:
    """A loss for every token, (T,)."""
    return sum(y.square().sum((0, 2)) for y in outputs)


def truth(model: nn.Module, losses: Callable[[], Tensor], ragged: Ragged) -> Tensor:
    cu, squared = ragged.cu_seqlens.tolist(), []
    for a, b in zip(cu, cu[1:]):
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(losses()[a:b].sum(), parameters, allow_unused=True)
        squared.append(sum(g.square().sum() for g in grads if g is not None))
    return torch.stack(squared)


def all_of(model: Siblings, x: Tensor) -> Tensor:
    return rows(*model(x))


def without_k(model: Siblings, x: Tensor) -> Tensor:
    q, _, o = model(x)
    return rows(q, o)


def changed_in_place(model: Siblings, x: Tensor) -> Tensor:
    x = model.norm(x)
    q, v = model.q_proj(x), model.v_proj(x)
    return rows(q.mul_(3.0), model.o_proj(v.add_(1.0)).view(1, -1, 3)[..., :2].exp_())


def transposed(model: Siblings, x: Tensor) -> Tensor:
    """Heads before tokens, and the gradient of a sum, which has one element."""
    heads = torch.cat([x, 2 * x, x.flip(-1)]).transpose(0, 1)[None].transpose(1, 2)  # (1, 3, T, 6)
    return model.norm(heads).sum((0, 1, 3)) + model.q_proj(x).sum((0, 2))


def regrouped(model: Siblings, x: Tensor) -> Tensor:
    """A gradient that another hook has changed: weights and norms see it as it is then."""
    q, k, o = model(x)
    for y in (q, k, o):
        y.register_hook(lambda gradient: gradient * 2)
    return rows(q, k, o)


CASES = [all_of, without_k, changed_in_place, transposed, regrouped]


@pytest.mark.parametrize("case", CASES)
def test_norms_by_hooks_are_those_of_a_backward_pass_per_rationale(monkeypatch, case):
    model, x, ragged = setting()
    expected = truth(model, lambda: case(model, x), ragged)
    recorder = recorder_of(model)
    monkeypatch.setattr(Family, "carrier", lambda *_: pytest.fail("a Function is taken"))
    with recorder.record(ragged) as norms:
        losses = case(model, x)
    losses.sum().backward()
    torch.testing.assert_close(norms.squared, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", [all_of, without_k, regrouped])
def test_under_autocast_the_input_is_what_autograd_keeps_and_nothing_is_kept_beside_it(case):
    model, x, ragged = setting()
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = truth(model, lambda: case(model, x), ragged)
    seen = []
    model.norm.register_forward_hook(lambda _, __, output: seen.append((weakref.ref(output), output.dtype)))
    recorder = recorder_of(model)
    with recorder.record(ragged) as norms, torch.autocast("cpu", torch.bfloat16):
        losses = case(model, x)
    [(normalised, dtype)] = seen
    assert dtype == torch.float32 and normalised() is None
    losses.sum().backward()
    torch.testing.assert_close(norms.squared, expected, rtol=0.02, atol=0)


class Pair(nn.Module):
    """Of a family, whose last member is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 5, bias=False), nn.Linear(6, 5), nn.Linear(6, 4)


def another_layout(model: Pair, x: Tensor) -> Tensor:
    """A bias that is added after the product, to an output that is used alone."""
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    model.q_proj(x)
    return rows(model.k_proj(x))


def changed_between(model: Pair, x: Tensor) -> Tensor:
    x = x.clone()
    q = model.q_proj(x)
    x.add_(1.0)
    return rows(q, model.k_proj(x))


def adapted(model: Pair, x: Tensor) -> Tensor:
    """A forward of the instance's own, which ends in another product."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(6, 2, generator=generator)
    up = torch.randn(2, 5, generator=generator).requires_grad_()
    plain = type(model.q_proj).forward
    model.q_proj.forward = lambda h: torch.addmm(plain(model.q_proj, h)[0], h[0] @ down, up)[None]
    return rows(model.q_proj(x))


@pytest.mark.parametrize("case", [another_layout, changed_between, adapted])
def test_under_autocast_only_the_layers_own_products_are_read(case):
    _, x, ragged = setting()
    torch.manual_seed(0)
    model, x = Pair(), x.float()
    if case is adapted:
        adapted(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = truth(model, lambda: case(model, x), ragged)
    with recorder_of(model).record(ragged) as norms:
        with torch.autocast("cpu", torch.bfloat16):
            losses = rows(model.q_proj(x)) if case is adapted else case(model, x)
        losses.sum().backward()
    torch.testing.assert_close(norms.squared, expected, rtol=0.02, atol=0)


def test_an_input_is_let_go_though_a_further_layer_might_have_come():
    _, x, ragged = setting()
    model = Pair().double()
    with recorder_of(model).record(ragged):
        seen = weakref.ref(x)
        losses = rows(model.q_proj(x), model.k_proj(x))
        del x
        losses.sum().backward()
        assert seen() is None


def test_rows_of_five_dimensions_are_counted():
    _, _, ragged = setting()
    norm = nn.Sequential(LlamaRMSNorm(6))
    with SampleGradNorms(norm).record(ragged), pytest.raises(RuntimeError, match="was called on 54 rows"):
        norm(torch.randn(1, sum(LENGTHS), 2, 3, 6))


@pytest.mark.parametrize("layer", [LlamaRMSNorm(6), nn.Linear(6, 6)])
def test_a_layer_that_checkpoints_itself_unpacks_once(layer):
    _, x, ragged = setting()
    model, own = nn.Sequential(layer), type(layer).forward
    layer.forward = lambda h: checkpoint(own, layer, h, use_reentrant=False)
    with recorder_of(model).record(ragged) as norms, torch.autocast("cpu", torch.bfloat16):
        losses = rows(model(x.float()))
    losses.sum().backward()
    assert norms.norms.min() > 0


def test_a_family_is_one_launch(monkeypatch):
    layers = []

    def counted(x, grads, *rest):
        layers.append(len(grads))
        return plain.gram_norms(x, grads, *rest)

    monkeypatch.setattr(ops, "_gram_norms", counted)
    model, x, ragged = setting()
    recorder = recorder_of(model)
    with recorder.record(ragged):
        all_of(model, x).sum().backward()
    assert sorted(layers) == [1, 3]


@pytest.mark.parametrize("case", [all_of, without_k])
@pytest.mark.parametrize("way", ["saved on the host", "reentrant", "not reentrant"])
def test_where_saved_tensors_have_hooks_norms_are_the_same(case, way):
    model, x, ragged = setting()
    x.requires_grad_()
    expected = truth(model, lambda: case(model, x), ragged)
    around: AbstractContextManager = save_on_cpu() if way == "saved on the host" else nullcontext()
    recorder = recorder_of(model)
    with recorder.record(ragged) as norms, around:
        if way == "saved on the host":
            losses = case(model, x)
        else:
            losses = checkpoint(case, model, x, use_reentrant=way == "reentrant")
        losses.sum().backward()
    torch.testing.assert_close(norms.squared, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("products", ["gram", "own"])
def test_norms_of_two_passes_are_given_if_they_share_no_parameter_and_refused_otherwise(products):
    model, x, ragged = setting()
    expected = truth(model, lambda: all_of(model, x), ragged)
    recorder = SampleGradNorms(model, products=products)
    with recorder.record(ragged) as norms:
        total = all_of(model, x).sum()
        total.backward(retain_graph=True)
        torch.testing.assert_close(norms.squared, expected, rtol=1e-9, atol=0)
        total.backward()
        with pytest.raises(RuntimeError, match=r"two backward passes came to \w+\.weight: .* Add losses up"):
            norms.squared.sum()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            total.backward()
    with recorder.record(ragged) as norms:  # which the next batch does not know of
        all_of(model, x).sum().backward()
    torch.testing.assert_close(norms.squared, expected, rtol=1e-9, atol=0)
    apart = [lambda h: model.q_proj(h), lambda h: model.k_proj(h), lambda h: model.v_proj(h)]
    fixed = model.norm(x).detach()
    expected = sum(truth(model, lambda part=part: rows(part(fixed)), ragged) for part in apart)
    with recorder.record(ragged) as norms:
        outputs = [part(fixed) for part in apart]
        for y in outputs:
            rows(y).sum().backward()
    torch.testing.assert_close(norms.squared, expected, rtol=1e-9, atol=0)


def test_of_biases_alone_the_input_may_change():
    model, x, ragged = setting()
    for layer in (model.norm, model.q_proj):
        layer.weight.requires_grad_(False)
    with recorder_of(model).record(ragged) as norms:
        hidden = x.clone()
        total = model.q_proj(hidden).sum()
        hidden.add_(1)
        total.backward()
        torch.testing.assert_close(norms.squared, 5 * torch.tensor(LENGTHS).double().square())
        total.backward()  # autograd has kept nothing that it could miss
        with pytest.raises(RuntimeError, match="two backward passes"):
            norms.squared.sum()


def test_a_pass_that_returns_gradients_leaves_norms_alone():
    model, x, ragged = setting()
    x.requires_grad_()
    recorder = recorder_of(model)
    with recorder.record(ragged) as norms:
        total = all_of(model, x).sum()
        for inputs in ([x], [model.q_proj.weight], list(model.parameters())):
            torch.autograd.grad(total, inputs, retain_graph=True)
        with pytest.raises(RuntimeError, match="no norms yet"):
            norms.squared.sum()
        total.backward()
    torch.testing.assert_close(norms.squared, truth(model, lambda: all_of(model, x), ragged), rtol=1e-9, atol=0)


def test_what_a_failed_pass_has_left_is_not_of_the_next():
    model, x, ragged = setting()
    expected = truth(model, lambda: rows(*model(x)[:1]), ragged)
    recorder = recorder_of(model)
    with recorder.record(ragged) as norms:
        hidden = model.norm(x)
        q = model.q_proj(hidden)
        broken = q.clone()
        broken.register_hook(lambda gradient: 1 / 0)
        k = model.k_proj(hidden)  # what is made last has its gradient first
        with pytest.raises(ZeroDivisionError):
            (rows(broken) + rows(k)).sum().backward(retain_graph=True)
        model.zero_grad()
        rows(q).sum().backward()
    torch.testing.assert_close(norms.squared, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backward", [True, False])
def test_inputs_are_let_go_when_they_have_been_used_or_never_will_be(backward):
    model, x, ragged = setting()
    recorder = recorder_of(model)
    seen = []
    for module in (model.norm, model.q_proj, model.o_proj):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0])))
    with recorder.record(ragged):
        losses = all_of(model, x + 1)
        assert all(ref() is not None for ref in seen)
        if backward:
            losses.sum().backward()  # the graph itself stays
        else:
            del losses
        assert [ref() for ref in seen] == [None] * 3
    if backward:
        assert losses.grad_fn is not None


def test_a_normalised_input_that_autograd_keeps_is_not_kept_again():
    _, x, ragged = setting()
    norm = nn.Sequential(LlamaRMSNorm(6)).bfloat16()
    recorder, found = SampleGradNorms(norm), []
    for changed in (False, True):
        x = x.bfloat16()
        with recorder.record(ragged) as norms:
            losses = rows(norm(x))
            if changed:  # autograd has a copy in float32 and the normalised one
                x.add_(1.0)
            losses.sum().backward()
        found.append(norms.norms)
    assert torch.equal(*found) and found[0].min() > 0


@pytest.mark.parametrize("heads_first", [False, True])
def test_the_gradient_of_a_norm_layers_weight_is_the_sum_of_its_rationales(monkeypatch, heads_first):
    _, x, ragged = setting()
    norm = LlamaRMSNorm(6).double()
    norm.weight.data.normal_()
    x = (torch.cat([x, 2 * x]).transpose(0, 1)[None].transpose(1, 2) if heads_first else x).requires_grad_()

    def losses() -> Tensor:
        y = norm(hidden_states=x).mul_(3.0)  # an output that is changed in place
        return y.square().sum((0, 1, 3) if heads_first else (0, 2))

    expected = truth(norm, losses, ragged)
    plain_grads = torch.autograd.grad(losses().sum(), [norm.weight, x])
    monkeypatch.setattr(layers, "scale_hook", lambda *_: pytest.fail("a hook is taken"))
    with SampleGradNorms(nn.Sequential(norm)).record(ragged) as norms:
        losses().sum().backward()
    torch.testing.assert_close(norms.squared, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close((norm.weight.grad, x.grad), plain_grads, rtol=1e-9, atol=0)


def norm_then_linear() -> tuple[nn.Sequential, Tensor, Ragged]:
    _, x, ragged = setting()
    model = nn.Sequential(LlamaRMSNorm(6), nn.Linear(6, 5, bias=False)).double()
    model[0].weight.data.normal_()
    return model, x, ragged


def test_passes_over_a_norm_layer_that_name_their_inputs_count():
    model, x, ragged = norm_then_linear()
    expected = truth(model, lambda: rows(model(x)), ragged)
    with SampleGradNorms(model, products="gram").record(ragged) as norms:
        loss = rows(model(x)).sum()
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)  # leaves no gradient, and no norm
        loss.backward(inputs=list(model.parameters()))
    torch.testing.assert_close(norms.squared, expected, rtol=1e-9, atol=0)


def test_a_norm_layer_whose_norms_are_recorded_has_a_second_derivative():
    model, x, ragged = norm_then_linear()
    x.requires_grad_()

    def penalised() -> Tensor:
        loss = rows(model(x)).sum()
        [gradient] = torch.autograd.grad(loss, [x], create_graph=True)
        return loss + gradient.square().sum()

    expected = torch.autograd.grad(penalised(), [*model.parameters(), x])
    with SampleGradNorms(model, products="gram").record(ragged):
        found = torch.autograd.grad(penalised(), [*model.parameters(), x])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_what_another_class_does_with_its_output_is_seen():
    class MyRMSNorm(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            self.out = super().forward(x)
            return self.out

    _, x, ragged = setting()
    norm = MyRMSNorm(6).double()

    def losses() -> Tensor:
        return rows(norm(x), norm.out * 3)

    expected = truth(norm, losses, ragged)
    with SampleGradNorms(nn.Sequential(norm)).record(ragged) as norms:
        losses().sum().backward()
    torch.testing.assert_close(norms.squared, expected, rtol=1e-6, atol=0)  # its class normalises in float32


def test_a_norm_layer_without_a_gradient_leaves_none():
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    model, x, ragged = norm_then_linear()
    with SampleGradNorms(nn.Sequential(model[0])).record(ragged):
        (rows(Nothing.apply(model[0](x))).sum() + x.sum().requires_grad_()).backward()
    assert model[0].weight.grad is None


def test_an_input_that_was_changed_is_an_error_though_autograd_has_a_copy():
    _, x, ragged = setting()
    norm = nn.Sequential(Gemma3RMSNorm(6)).bfloat16()  # its factor is 1 + weight
    recorder = SampleGradNorms(norm)
    x = x.bfloat16()
    with recorder.record(ragged):
        losses = rows(norm(x))
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="a layer whose norms are recorded has been modified by an inplace"):
            losses.sum().backward()


def test_no_hook_where_it_would_miss_the_gradient():
    y = nn.Linear(4, 4)(torch.randn(2, 3, 4))
    assert hooks.source(y) is not None
    assert hooks.source(y[:1]) is None and hooks.source(y.transpose(1, 2)) is None
    assert hooks.source(torch.randn(2, 2)) is None
    with save_on_cpu():
        assert hooks.source(y) is None
