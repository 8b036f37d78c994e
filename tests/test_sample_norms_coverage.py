"""Layers as models use them: which are measured whatever a model does with them, and which are refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from compact.config import LoraConfig
from compact.student import add_lora, prepare
from compact_kernels import Ragged, SampleGradNorms, sample_grad_norms
from tests.architectures import tiny
from tests.norm_cases import batch

LENGTHS = (3, 2, 4)
TOKENS = sum(LENGTHS)
RAGGED = Ragged.build(sequence_lengths=LENGTHS, prompt_lengths=[1] * 3, rationales_per_question=[3])


def together(name: str) -> str:
    return "all"


def truth(model: nn.Module, x: Tensor) -> Tensor:
    """(S,) squared norms by one backward pass a rationale."""
    cu, squared = RAGGED.cu_seqlens.tolist(), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(cu, cu[1:]):
        grads = torch.autograd.grad(model(x)[:, a:b].square().sum(), parameters, allow_unused=True)
        squared.append(sum(g.square().sum() for g in grads if g is not None))
    return torch.stack(squared)


def check(model: nn.Module, products: str = "auto", width: int = 6) -> None:
    """Norms are right, and the model gives what it gives without a recorder."""
    model.double()
    x = torch.randn(1, TOKENS, width, dtype=torch.float64)
    expected, plain = truth(model, x), model(x)
    with sample_grad_norms(model, RAGGED, products=products, groups=together) as norms:
        y = model(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(norms.squared, expected, rtol=1e-9, atol=0)


def module(forward: Callable[..., Tensor], **layers: nn.Module) -> nn.Module:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    model = Model()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("products", ["gram", "own"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_may_be_changed_in_place(products, bias):
    model = module(lambda m, x: m.o(m.l(x).mul_(2).relu_()), l=nn.Linear(6, 6, bias=bias), o=nn.Linear(6, 6))
    check(model, products)


@pytest.mark.parametrize("recomputed", [True, False])
def test_outputs_of_norm_layers_embeddings_and_tied_heads_may_be_changed_in_place(recomputed):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.norm, self.lm_head = nn.Embedding(9, 6), nn.RMSNorm(6), nn.Linear(6, 9, bias=False)
            self.lm_head.weight = self.tokens.weight

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, ids: Tensor) -> Tensor:
            h = self.tokens(ids)
            h += 1
            h = self.norm(h)
            h *= 2
            return self.lm_head(h).div_(3)

    model, ids = Tied().double(), torch.randint(9, (1, TOKENS))
    expected = truth(model, ids)
    with sample_grad_norms(model, RAGGED, groups=together) as norms:
        y = checkpoint(model, ids, use_reentrant=False) if recomputed else model(ids)
        y.square().sum().backward()
    torch.testing.assert_close(norms.squared, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("products", ["auto", "gram", "own"])
def test_a_forward_that_an_instance_was_given_is_the_one_that_runs(products):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    calls, forward = [], model[0].forward
    model[0].forward = lambda x: calls.append(x) or forward(x)  # type: ignore[method-assign]
    check(model, products)
    assert len(calls) == 6  # also when the recorder is made, which tries it
    with pytest.raises(ValueError, match=r"unweighted norms: 0\.weight trains"):
        SampleGradNorms(model, norms="unweighted", groups=together)


@pytest.mark.parametrize("products", ["gram", "own"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_whole_model_may_be_one_layer(products, bias):
    check(nn.Linear(6, 6, bias=bias), products)


def test_layers_may_be_called_by_keyword():
    check(module(lambda m, x: m.l(input=x), l=nn.Linear(6, 6)))
    embedding = nn.Embedding(9, 6)
    with sample_grad_norms(embedding, RAGGED) as norms:
        embedding(input=torch.zeros(1, TOKENS, dtype=torch.long)).sum().backward()
    torch.testing.assert_close(norms.norms, torch.tensor(LENGTHS) * 6**0.5)


@pytest.mark.parametrize("heads", [3, TOKENS])
@pytest.mark.parametrize("heads_first", [True, False])
def test_norm_layers_see_heads_before_or_after_tokens(heads, heads_first):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.l(x).view(1, TOKENS, heads, 4)
        y = m.n(y.transpose(1, 2)).transpose(1, 2) if heads_first else m.n(y)
        return y.reshape(1, TOKENS, -1)

    norm = nn.RMSNorm(4, eps=1e-6)
    nn.init.normal_(norm.weight)
    check(module(forward, l=nn.Linear(6, 4 * heads), n=norm))


class Halved(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, None, None, self.eps) * self.weight / 2 + self.bias


class Spelled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, None, None, self.eps) * self.weight + self.bias


class NamesNoEpsilon(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_the_epsilon_of_a_norm_layer_is_the_one_it_computes_with(dtype, eps):
    model = nn.Sequential(nn.RMSNorm(64, eps=eps)).to(dtype)
    x = torch.randn(1, TOKENS, 64).to(dtype) * 0.02
    with sample_grad_norms(model, RAGGED) as norms:
        y = model(x)
        y.backward(torch.ones_like(y))
    expected = [part.float().sum(0).norm() for part in (y / model[0].weight)[0].split(list(LENGTHS))]
    torch.testing.assert_close(norms.norms, torch.stack(expected), rtol=0.02, atol=0)


def test_a_scale_that_somebody_else_multiplies_an_embedding_by_is_not_the_layers():
    embedding = nn.Embedding(9, 6)
    embedding.embed_scale = 3.0
    with sample_grad_norms(embedding, RAGGED) as norms:
        embedding(torch.zeros(1, TOKENS, dtype=torch.long)).sum().backward()
    torch.testing.assert_close(norms.norms, torch.tensor(LENGTHS) * 6**0.5)


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.LayerNorm(6), nn.RMSNorm(6), nn.Embedding(9, 6)])
def test_a_forward_of_an_instance_that_computes_something_else_is_refused(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)
    with pytest.raises(ValueError, match="in the forward that this instance was given"):
        SampleGradNorms(nn.Sequential(layer), groups=together)


class Gated(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.gate = nn.Parameter(torch.ones(6))


def test_what_only_looks_like_a_layer_that_is_covered_is_refused_by_name():
    check(nn.Sequential(Spelled(6), nn.Linear(6, 6)))
    with pytest.raises(ValueError, match=r"0\.weight .* Halved is not \(x − mean\) / std"):
        SampleGradNorms(nn.Sequential(Halved(6)))
    with pytest.raises(ValueError, match=r"NamesNoEpsilonRMSNorm is not x / rms\(x\) .* with the ε that it names"):
        SampleGradNorms(nn.Sequential(type("NamesNoEpsilonRMSNorm", (NamesNoEpsilon,), {})()))
    with pytest.raises(ValueError, match=r"no rule for a Gated's gate"):
        SampleGradNorms(nn.Sequential(Gated()), groups=together)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(nn.Linear(6, 6))
    with pytest.raises(ValueError, match="no rule for a Linear's weight_g, weight_v"):
        SampleGradNorms(nn.Sequential(normed), groups=together)
    heads = module(lambda m, x: m.l(x.view(1, TOKENS, 2, 3)).flatten(2), l=nn.Linear(3, 4)).double()
    with sample_grad_norms(heads, RAGGED), pytest.raises(RuntimeError, match=r"called on 18 rows, the batch has 9"):
        heads(torch.randn(1, TOKENS, 6, dtype=torch.float64))


def test_a_tied_head_without_its_embeddings_ids_is_refused():
    model = tiny("gpt2")
    assert model.config.tie_word_embeddings
    _, _, ragged = batch()
    embeds = torch.randn(1, int(ragged.cu_seqlens[-1]), 32)
    with (
        sample_grad_norms(model, ragged),
        pytest.raises(RuntimeError, match="tied to an embedding that was not called"),
    ):
        model(inputs_embeds=embeds)


def test_a_second_derivative_of_what_has_none_is_refused():
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(1, TOKENS, 6, requires_grad=True)
    with sample_grad_norms(model, RAGGED, products="own", groups=together):
        loss = model(x).square().sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            loss.backward(create_graph=True)
    with sample_grad_norms(model, RAGGED, products="gram", groups=together) as norms:
        model(x).square().sum().backward(create_graph=True, inputs=list(model.parameters()))
    assert not norms.squared.requires_grad


def test_what_is_made_on_the_host_is_there_whatever_the_default_device_is():
    with torch.device("meta"):
        ragged = Ragged.build(
            sequence_lengths=LENGTHS, prompt_lengths=[1] * 3, rationales_per_question=[3],
            evidence_ids=[[1], [1], []], answer_spans=[(0, 1)] * 3,
        )  # fmt: skip
        labelled = Ragged.from_labels(torch.ones(9, device="cpu").long(), RAGGED.cu_seqlens, RAGGED.cu_questions)
        SampleGradNorms(nn.RMSNorm(6, device="cpu"))
    for made in (ragged, labelled):
        assert {tensor.device.type for tensor in made.tensors()} == {"cpu"}


def test_adapters_of_fused_experts_are_refused_when_the_recorder_is_made():
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_experts": 4}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
    }
    model = prepare(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)), projections=False)
    with pytest.raises(ValueError, match="it adapts experts fused into one parameter"):
        SampleGradNorms(add_lora(model, LoraConfig(rank=2, dropout=0.0)))
