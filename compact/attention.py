"""Attention over packed rows that never builds a mask over the packed row, and the choice of an implementation.

Importing this module registers two functions with transformers' ``AttentionInterface``:

``compact_varlen``
    Sequences end to end, told apart by ``cu_seq_lens_q`` / ``cu_seq_lens_k`` as flash-attention is told. Runs torch's
    own flash-attention kernel where it can run (CUDA, half precision, see :func:`varlen_can_run`), else
    scaled-dot-product attention sequence by sequence (CPUs, float32, dropout, odd head sizes): slower, as exact, and
    no larger in memory than the longest sequence alone. Without ``cu_seq_lens_q`` — generation with a padding mask
    and a cache — it *is* transformers' ``sdpa``, mask included, so a model may train and generate under it.
``compact_projections``
    Attention in which every token sees itself alone, and which notes the queries and keys it was given
    (:class:`Projections`). Used by :mod:`compact.student` to read a layer's projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from compact.errors import UserError

HALF = (torch.float16, torch.bfloat16)


@dataclass
class _Packed:
    """Whether the forward pass that runs now is a packed one (then ``cu_seq_lens_q`` stands in for the mask)."""

    active: bool = False
    windows: Windows | None = None  # while someone asks


@dataclass
class Windows:
    """The windows, in tokens, of the masks that a packed pass did without, and those its layers handed over."""

    of_masks: set[int]
    of_layers: set[int]


_packed = _Packed()


@contextmanager
def packed_rows() -> Iterator[None]:
    """Inside, ``compact_varlen`` asks for no mask: every layer is given ``cu_seq_lens_q``."""
    before, _packed.active = _packed.active, True
    try:
        yield
    finally:
        _packed.active = before


@contextmanager
def windows_noted() -> Iterator[Windows]:
    """Inside, ``compact_varlen`` notes the windows it meets."""
    _packed.windows = found = Windows(set(), set())
    try:
        yield found
    finally:
        _packed.windows = None


def varlen_can_run(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's varlen kernel takes these tensors (B, H, T, d); the one predicate of ``compact_varlen``."""
    return (
        query.is_cuda
        and query.dtype in HALF
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and dropout == 0.0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def compact_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention of sequences laid end to end.

    Args:
        query: (1, H, T, d) with packed sequences, (B, H, T, d) without.
        key, value: (1, H_kv, T, d); H is a multiple of H_kv (grouped-query attention).
        sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it in its sequence.
        cu_seq_lens_q: (S+1,) int32 token offsets of the sequences; None: not packed, transformers' ``sdpa`` answers.
        max_length_q: the longest sequence, a host int.

    Returns:
        (B, T, H, d) and None (no attention weights).

    Raises:
        UserError: softcap, attention sinks or a position bias, which this implementation does not know.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"student.attention=compact_varlen cannot apply {type(module).__name__}'s {name}; "
                "take student.attention=flex_attention, or eager on a CPU"
            )
    if cu_seq_lens_q is None or attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if _packed.windows is not None and sliding_window:
        _packed.windows.of_layers.add(sliding_window)
    # Rotary embeddings may leave query and key in float32 under autocast, which the kernel does not cast back.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.shape[0] != 1:
        raise ValueError(f"packed sequences come as one row, got a batch of {query.shape[0]}")
    if varlen_can_run(query, value, dropout):
        return _varlen(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
    if torch.compiler.is_compiling() and dropout == 0.0:
        return _by_sequence_op(query, key, value, scaling, sliding_window, cu_seq_lens_q), None
    return _by_sequence(query, key, value, dropout, scaling, sliding_window, cu_seq_lens_q), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    offsets: Tensor,
    longest: int | None,
) -> Tensor:
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # (T, H, d)
    longest = int(offsets.diff().max()) if longest is None else longest
    causal, left = (True, -1) if sliding_window is None else (False, sliding_window - 1)
    # What torch.nn.attention.varlen calls. Its own ops are written in Python and cost a small layer more time on the
    # host than the kernel takes on the GPU; this one has its autograd in C++.
    output = torch.ops.aten._flash_attention_forward(
        query, key, value, offsets, offsets, longest, longest, 0.0, causal, False,
        scale=scaling, window_size_left=left, window_size_right=0,
    )[0]  # fmt: skip
    return output.unsqueeze(0)


def _by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    offsets: Tensor,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    lengths = offsets.diff().tolist()
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value))):
        mask = None
        if sliding_window is not None and sliding_window < q.shape[2]:
            position = torch.arange(q.shape[2], device=q.device)
            distance = position[:, None] - position
            mask = (distance >= 0) & (distance < sliding_window)
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)  # contiguous, as transformers' own functions give it: some modules view it


@torch.library.custom_op("compact::attention_by_sequence", mutates_args=())
def _by_sequence_op(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None, offsets: Tensor
) -> Tensor:
    """:func:`_by_sequence` as one node of a compiled graph, which reading `offsets` on the host would break.

    Backward computes the probabilities again, sequence by sequence. No dropout: it would draw another mask.
    """
    return _by_sequence(query, key, value, 0.0, scaling, sliding_window, offsets)


@_by_sequence_op.register_fake
def _(query, key, value, scaling, sliding_window, offsets):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _save_inputs(ctx, inputs, output) -> None:
    query, key, value, ctx.scaling, ctx.sliding_window, offsets = inputs
    ctx.save_for_backward(query, key, value, offsets)


@torch.library.custom_op("compact::attention_by_sequence_backward", mutates_args=())
def _by_sequence_backward_op(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = offsets.diff().tolist()
    parts = []
    for g, q, k, v in zip(
        gradient.transpose(1, 2).split(lengths, 2), *(t.split(lengths, 2) for t in (query, key, value))
    ):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        distance = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(q.shape[2], device=q.device)
        hidden = (distance < 0) | (distance >= (sliding_window or q.shape[2]))
        p = (q @ k.mT * scale).masked_fill_(hidden, -torch.inf).softmax(-1)  # (1, H, t, t)
        dp = g @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        parts.append((ds @ k, *(t.unflatten(1, (-1, groups)).sum(2) for t in (ds.mT @ q, p.mT @ g))))
    dq, dk, dv = (torch.cat(tensors, dim=2) for tensors in zip(*parts))
    return dq, dk, dv


@_by_sequence_backward_op.register_fake
def _(gradient, query, key, value, scaling, sliding_window, offsets):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value))


def _by_sequence_backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, offsets = ctx.saved_tensors
    found = _by_sequence_backward_op(gradient, query, key, value, ctx.scaling, ctx.sliding_window, offsets)
    return *found, None, None, None


_by_sequence_op.register_autograd(_by_sequence_backward, setup_context=_save_inputs)


def compact_varlen_mask(*args, **kwargs) -> Tensor | None:
    """No mask for a packed row; transformers' ``sdpa`` mask (B, 1, T, T_kv) otherwise."""
    if not _packed.active:
        return sdpa_mask(*args, **kwargs)
    if _packed.windows is not None and kwargs.get("local_size"):
        _packed.windows.of_masks.add(kwargs["local_size"])
    return None


@dataclass
class Projections:
    """What ``compact_projections`` was given: query (B, H, T, d), key (B, H_kv, T, d), the layer's logit scale."""

    query: Tensor
    key: Tensor
    scaling: float | None


_projections: list[Projections] = []


def compact_projections(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Attention of every token to itself alone, that is its value; notes query and key for :func:`noted`."""
    _projections.append(Projections(query, key, kwargs.get("scaling")))
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None


@contextmanager
def noted(config: PretrainedConfig) -> Iterator[list[Projections]]:
    """Inside, attention modules of `config` run ``compact_projections``; yields the list that they append to."""
    before = config._attn_implementation
    config._attn_implementation_internal = "compact_projections"
    _projections.clear()
    try:
        yield _projections
    finally:
        config._attn_implementation_internal = before
        _projections.clear()


AttentionInterface.register("compact_varlen", compact_varlen)
AttentionInterface.register("compact_projections", compact_projections)
AttentionMaskInterface.register("compact_varlen", compact_varlen_mask)


def attention_for(model_class: type[PreTrainedModel], config: PretrainedConfig, device, dtype: torch.dtype) -> str:
    """The attention implementation for packed training, none of which builds a mask over the packed row on a GPU.

    * Attention that is no more than causality, a window and dropout: ``compact_varlen``, on CPUs and on GPUs; on
      GPUs in half precision ``flash_attention_3`` / ``flash_attention_2`` where installed (``flash_attention_4``,
      a prerelease that compiles its kernels at the first batches, only where it is asked for by name).
    * Softcaps, attention sinks, chunked attention (Gemma 2): ``flex_attention`` on GPUs (``flash_attention_2`` where
      installed and enough), ``eager`` or ``sdpa`` on CPUs. gpt-oss and Llama 4 have such, but transformers makes their
      masks without position ids: their packed sequences see each other, and :func:`compact.student.check` says so.

    On CPUs ``compact_varlen`` is sdpa sequence by sequence: the numbers of ``sdpa`` over the packed row, without its
    mask of all tokens by all tokens (3 to 5 times faster a training step on 1,500 to 3,200 packed tokens).

    Args:
        model_class: the causal LM's class. config: its configuration. device, dtype: where and in what it trains.

    Raises:
        UserError: no implementation can run this model packed on a GPU without a dense mask.
    """
    text = config.get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None) is not None
    plain = model_class._supports_sdpa and not softcap  # a softmax of scaled, masked logits
    cuda = torch.device(device).type == "cuda"
    # Models that run under flash-attention hand their window to the attention function; others hide it in a mask.
    flash = model_class._supports_flash_attn and not model_class._compatible_flash_implementations
    if cuda and flash and dtype in HALF:
        if is_flash_attn_3_available() and plain:
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    kinds = set(getattr(text, "layer_types", None) or ())
    if (
        plain
        and flash
        and model_class._supports_attention_backend
        and kinds <= {"full_attention", "sliding_attention"}
    ):
        return "compact_varlen"
    if not cuda:
        return "sdpa" if plain else "eager"
    if model_class._supports_flex_attn:
        return "flex_attention"
    raise UserError(
        f"student.attention: no packed attention for {model_class.__name__} on a GPU (neither flash-attention, "
        "torch's varlen nor flex attention); choose student.attention=sdpa or eager, "
        "which build a mask of all tokens by all tokens"
    )
