"""Packed attention: sequence by sequence, whatever kernel runs it, and never a mask over the packed row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.utils import is_flash_attn_4_available

from compact import attention
from compact.attention import attention_for, compact_varlen
from compact.errors import UserError
from compact.student import prepare
from compact_kernels.ragged import Ragged
from tests.architectures import CONFIGS, tiny, token_ids

LENGTHS = (70, 1, 33, 128)


class Layer(nn.Module):
    """What an attention function asks of its module."""

    is_causal = True

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


def tensors(heads: int, groups: int, d: int, dtype=torch.float64, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, sum(LENGTHS), d, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for count in (heads, heads // groups, heads // groups)
    ]


def offsets(device="cpu") -> Tensor:
    return torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float | None = None
) -> Tensor:
    """softmax(mask(cap(scaling · q·k))) · v, every sequence alone. (1, H, T, d) -> (1, T, H, d)."""
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for q, k, v in zip(*(t.split(LENGTHS, dim=2) for t in (query, key, value))):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        logits = q @ k.transpose(-1, -2) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        position = torch.arange(q.shape[2], device=q.device)
        distance = position[:, None] - position
        allowed = (distance >= 0) & (distance < (window or q.shape[2]))
        outputs.append(logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def run(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    module = Layer(query.shape[1] // key.shape[1])
    device = query.device
    output, weights = compact_varlen(
        module, query, key, value, None, cu_seq_lens_q=offsets(device), max_length_q=max(LENGTHS), **options
    )
    assert weights is None
    return output


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 16, 500])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_sequences_attend_within_themselves_grouped_windowed_and_scaled(groups, window, scaling):
    inputs = tensors(4, groups, 8)
    direction = torch.randn(1, sum(LENGTHS), 4, 8, dtype=torch.float64)
    output = run(*inputs, scaling=scaling, sliding_window=window)
    truth = by_definition(*inputs, scaling, window)
    torch.testing.assert_close(output, truth)
    found = torch.autograd.grad((output * direction).sum(), inputs)
    for one, other in zip(found, torch.autograd.grad((truth * direction).sum(), inputs)):
        torch.testing.assert_close(one, other)


def test_under_autocast_all_three_are_of_its_dtype():
    query, key, value = tensors(4, 2, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(query, key, value.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), by_definition(query, key, value, None, None), rtol=0.05, atol=0.05)


def test_dropout_is_applied():
    inputs = tensors(2, 1, 8)
    torch.manual_seed(0)
    dropped = run(*inputs, dropout=0.5)
    assert (dropped - run(*inputs)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_it_cannot_apply_is_refused_and_never_ignored(name):
    with pytest.raises(UserError, match=f"{name}.*flex_attention"):
        run(*tensors(2, 1, 8), **{name: 1.0})


def test_without_packing_it_is_sdpa_with_the_mask_it_is_given():
    query, key, value = tensors(4, 2, 8)
    mask = torch.rand(1, 1, sum(LENGTHS), sum(LENGTHS), generator=torch.Generator().manual_seed(0)) > 0.3
    mask |= torch.eye(sum(LENGTHS), dtype=torch.bool)
    output, _ = compact_varlen(Layer(2), query, key, value, mask, scaling=0.3)
    repeated = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    torch.testing.assert_close(
        output, F.scaled_dot_product_attention(query, *repeated, mask, scale=0.3).transpose(1, 2)
    )


def packed(*lengths: int) -> dict:
    ragged = Ragged.build(
        sequence_lengths=lengths, prompt_lengths=[1] * len(lengths), rationales_per_question=[len(lengths)]
    )
    return {"input_ids": torch.cat(token_ids(*lengths), dim=1), "compact": ragged}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gemma2"])
def test_a_packed_row_asks_for_no_mask(name, monkeypatch):
    def no_mask(*args, **kwargs):
        raise AssertionError("a mask was built")

    model = prepare(tiny(name))
    model.set_attn_implementation("compact_varlen")
    monkeypatch.setattr(attention, "sdpa_mask", no_mask)
    model(**packed(9, 2, 6))
    with pytest.raises(AssertionError, match="a mask was built"):
        model(torch.cat(token_ids(5, 5)), attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))


def test_packed_rows_without_offsets_are_told_apart_by_their_positions():
    model = tiny("llama")
    model.set_attn_implementation("compact_varlen")
    position = torch.cat([torch.arange(9), torch.arange(6)])[None]
    output = model(torch.cat(token_ids(9, 6), dim=1), position_ids=position, use_cache=False).logits[0]
    truth = torch.cat([model(ids, use_cache=False).logits[0] for ids in token_ids(9, 6)])
    torch.testing.assert_close(output, truth, rtol=1e-4, atol=1e-4)


def test_the_choice_follows_model_device_and_dtype(monkeypatch):
    def choose(model_class, device, dtype=torch.bfloat16, **changes):
        config = model_class.config_class(**changes)
        return attention_for(model_class, config, device, dtype)

    llama, gemma = transformers.LlamaForCausalLM, transformers.Gemma2ForCausalLM
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(attention, "is_flash_attn_3_available", lambda: False)
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            assert choose(llama, device, dtype) == "compact_varlen"
            assert choose(transformers.MistralForCausalLM, device, dtype, sliding_window=8) == "compact_varlen"
    assert (choose(gemma, "cpu"), choose(gemma, "cuda")) == ("eager", "flex_attention")
    assert choose(gemma, "cpu", attn_logit_softcapping=None) in ("compact_varlen", "eager")
    assert choose(transformers.GptOssForCausalLM, "cuda") == "flex_attention"  # attention sinks
    assert choose(transformers.StableLmForCausalLM, "cpu") == "sdpa"  # attention of its own

    class Neither(transformers.LlamaForCausalLM):  # of transformers' own fewer and fewer are left
        _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False

    with pytest.raises(UserError, match="student.attention.*Neither"):
        choose(Neither, "cuda")
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert choose(llama, "cuda") == choose(gemma, "cuda") == "flash_attention_2"
    assert choose(llama, "cuda", torch.float32) == "compact_varlen"
    assert choose(llama, "cpu") == "compact_varlen"
    monkeypatch.setattr(attention, "is_flash_attn_3_available", lambda: True)
    assert choose(llama, "cuda", torch.float16) == "flash_attention_3"


# ------------------------------------------------------------------------------------------------------- on a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def errors(outputs: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [(one.double() - exact).norm().item() for one, exact in zip(outputs, truth)]


def output_and_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    return [output, *torch.autograd.grad((output * direction).sum(), inputs)]


@on_gpu
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 16, 500])
@pytest.mark.parametrize("d", [64, 128])
def test_the_varlen_kernel_is_as_exact_as_sdpa_on_each_sequence_alone(groups, window, d, monkeypatch):
    inputs = tensors(8, groups, d, torch.bfloat16, "cuda")
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = output_and_gradients(by_definition(*exact, None, window), exact)
    assert attention.varlen_can_run(inputs[0], inputs[2], 0.0)
    kernel = output_and_gradients(run(*inputs, sliding_window=window), inputs)
    monkeypatch.setattr(attention, "varlen_can_run", lambda *args: False)
    sdpa = output_and_gradients(run(*inputs, sliding_window=window), inputs)
    for ours, theirs in zip(errors(kernel, truth), errors(sdpa, truth)):
        assert ours <= 2 * theirs + 1e-2  # the gradient of a token's only key is zero: both are noise there


@on_gpu
@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "compact_varlen") for name in ("llama", "qwen3", "gemma3", "mistral", "phi3", "gpt2", "gpt_neox")]
    + [(name, "flex_attention") for name in ("qwen3", "gemma3", "gemma2")]  # flex wants heads of 16 and more
    + [(name, "flash_attention_4") for name in ("llama", "qwen3", "mistral")],
)
def test_packed_models_on_a_gpu_are_as_exact_as_sequences_alone(name, implementation):
    if implementation == "flash_attention_4" and not is_flash_attn_4_available():
        pytest.skip("flash-attn-4 is not installed")
    lengths = (40, 2, 17, 60)
    ids = token_ids(*lengths)

    def logits_and_gradient(model: nn.Module, logits: Tensor) -> list[Tensor]:
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
        (logits * direction).sum().backward()
        return [tensor.detach().double().cpu() for tensor in (logits, model.get_input_embeddings().weight.grad)]

    def alone(model: nn.Module) -> list[Tensor]:
        model.set_attn_implementation("eager")
        return logits_and_gradient(
            model, torch.cat([model(part.to(model.device), use_cache=False).logits[0] for part in ids])
        )

    truth = alone(tiny(name).double())
    separate = alone(tiny(name).to("cuda", torch.bfloat16))
    model = prepare(tiny(name).to("cuda", torch.bfloat16))
    model.set_attn_implementation(implementation)
    output = model(**{key: value.to("cuda") for key, value in packed(*lengths).items()})
    together = logits_and_gradient(model, output.head(output.hidden))
    for ours, theirs in zip(errors(together, truth), errors(separate, truth)):
        assert ours <= 2 * theirs


@pytest.mark.parametrize("groups, window, scaling", [(1, None, None), (4, 16, 0.7), (2, 1, None)])
def test_in_a_compiled_graph_it_is_the_same_outputs_and_gradients(groups, window, scaling):
    from compact.attention import _by_sequence_op

    inputs = tensors(4, groups, 8)
    direction = torch.randn(1, sum(LENGTHS), 4, 8, dtype=torch.float64)
    torch.library.opcheck(_by_sequence_op, (*inputs, scaling, window, offsets()))
    torch._dynamo.reset()
    output = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs, scaling=scaling, sliding_window=window)
    truth = by_definition(*inputs, scaling, window)
    torch.testing.assert_close(output, truth)
    found = torch.autograd.grad((output * direction).sum(), inputs)
    for one, other in zip(found, torch.autograd.grad((truth * direction).sum(), inputs)):
        torch.testing.assert_close(one, other)
