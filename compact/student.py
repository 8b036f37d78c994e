"""The student: loaded, checked, wrapped with LoRA, merged again. Everything about how a causal LM is built.

The parts that run in every step (``prepare``, ``head``) are in :mod:`compact.backbone`, attention in
:mod:`compact.attention`; both are exported here.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from compact.attention import attention_for, windows_noted
from compact.backbone import Head, StudentOutput, head, prepare
from compact.compilation import compile_layers
from compact.config import LoraConfig, StudentConfig
from compact.errors import UserError
from compact.gguf_file import load_gguf
from compact.models import decoder_layers, evaluation_mode, unwrap
from compact.randomness import random_state_kept
from compact_kernels.ragged import Ragged

logger = logging.get_logger(__name__)

__all__ = [
    "Head",
    "StudentOutput",
    "add_lora",
    "attention_for",
    "check",
    "compile_layers",
    "compute_dtype",
    "head",
    "load_student",
    "lora_targets",
    "merged",
    "prepare",
    "unwrap",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(config: StudentConfig) -> torch.dtype:
    """What the student computes in, and is saved in."""
    if config.dtype == "auto":
        half = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if half else torch.float32
    if config.dtype not in _DTYPES:
        raise UserError(f"student.dtype={config.dtype}: choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[config.dtype]


def load_student(
    config: StudentConfig, *, seed: int, projections: bool = True
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The student, prepared for training, on the CPU, and its tokenizer.

    Args:
        config: what to load and how. `model` is a folder, a hub id or a ``.gguf`` file (read into an ordinary model).
        seed: draws LoRA's initial weights; the global random state is left alone.
        projections: whether the consensus graph needs the last layer's projections (``consensus.affinity=attention``).

    Returns:
        A transformers model, inside a ``peft.PeftModel`` unless ``config.lora`` is None, and the tokenizer, which
        has an EOS and a padding token.

    Raises:
        UserError: nothing loadable there; package gguf missing; no EOS; tokenizer larger than the embedding; and
            what :func:`check` and :func:`add_lora` raise.
    """
    dtype = compute_dtype(config)
    # AdamW's small steps would be lost in bfloat16 weights: those that train stay float32, and autocast computes.
    kept = torch.float32 if config.lora is None else dtype
    if config.model.endswith(".gguf"):
        model, tokenizer = load_gguf(Path(config.model).expanduser(), kept)
    else:
        model, tokenizer = _load_folder(config, kept)
    _settle_tokens(model, tokenizer, config.model)
    if config.attention == "auto":
        implementation = attention_for(
            type(model), model.config, "cuda" if torch.cuda.is_available() else "cpu", dtype
        )
    else:
        implementation = config.attention
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise UserError(f"student.attention={implementation}: {error}") from error
    prepare(model, projections=projections)
    try:
        check(model)
    except UserError:
        if config.attention != "auto" or implementation != "compact_varlen" or torch.cuda.is_available():
            raise
        model.set_attn_implementation("sdpa")  # some ask for no attention function, or leave its window to the mask
        check(model)
    if config.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"student.gradient_checkpointing: {error}") from error
        model.enable_input_require_grads()  # reentrant checkpoints, if the Trainer asks for them, need it under LoRA
    if config.compile:
        compile_layers(model)
    return (model if config.lora is None else add_lora(model, config.lora, seed=seed)), tokenizer


def _load_folder(config: StudentConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options = {"trust_remote_code": config.trust_remote_code}
    source = config.model
    if source.startswith((".", "/", "~")):
        source = str(Path(source).expanduser())
        if not Path(source).is_dir():
            raise UserError(f"student.model={config.model}: no such folder")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
        model, loading = loaded
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"student.model={config.model}: not a causal LM that transformers can load. {error}\n"
            "Give a folder with config.json, weights and tokenizer, a hub id, or a .gguf file."
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"student.model={config.model}: its weights lack {', '.join(missing[:5])}{' …' * (len(missing) > 5)}, "
            "which would be random. A backbone saved without its head is no causal LM: save the whole model"
        )
    return model, tokenizer


def _settle_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """EOS and padding, the same in tokenizer, model and generation config."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"student.model={name}: its tokenizer has no EOS token, which ends every rationale; set eos_token"
        )
    rows = _embedding(model).shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"student.model={name}: the tokenizer has {len(tokenizer)} tokens, the model embeds {rows}: save it again "
            "after model.resize_token_embeddings(len(tokenizer))"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    if tokenizer.eos_token_id not in stops:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *stops] if stops else tokenizer.eos_token_id
    for kind in ("bos", "eos", "pad"):  # where the Trainer would change them itself, with a warning
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
            setattr(model.config, f"{kind}_token_id", token)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


# ------------------------------------------------------------------------------------------------------------ check


def check_float32_head(dtype: torch.dtype) -> None:
    """What `head_dtype: float32` asks of a student that trains, whose head is in `dtype`.

    Raises:
        UserError: that is another one.
    """
    if dtype != torch.float32:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"head_dtype: float32 needs a head in float32, and this student's is in {kind}: train all of it "
            "(student.lora null), load it in float32 (student.dtype), or set head_dtype to auto"
        )


@torch.no_grad()
def check(model: nn.Module) -> None:
    """Try on two short sequences what COMPACT relies on, for this very model (a few tokens; model on any one device).

    * The head on the hidden states gives the model's own logits: no scale or cap is overlooked.
    * Packed sequences do not see each other: one's logits are those that it has alone, and do not move with its
      neighbour's tokens, of which an untrained convolution lets too little through for the first to tell.
    * The projections of eq. 4 can be read (where :func:`prepare` was asked for them).

    Flash and flex attention, which cannot run everywhere, are stood in for by what runs on CPUs: flex, which is given
    masks as sdpa is, by that.

    Raises:
        UserError: naming what does not hold, and the way out.
    """
    inner = unwrap(model)
    weight = _embedding(inner)
    implementation = inner.config._attn_implementation
    try:
        if implementation == "flex_attention":
            inner.set_attn_implementation("sdpa" if getattr(inner, "_supports_sdpa", False) else "eager")
        elif implementation not in ("sdpa", "eager", "compact_varlen"):
            inner.set_attn_implementation(attention_for(type(inner), inner.config, "cpu", weight.dtype))
        lengths = [7, 5]
        ids = (torch.arange(sum(lengths), device=weight.device) * 37 + 11) % weight.shape[0]
        others = ids.clone()  # the second sequence's neighbour is another
        others[: lengths[0]] = (ids[: lengths[0]] * 3 + 5) % weight.shape[0]
        ragged = Ragged.build(sequence_lengths=lengths, prompt_lengths=[1, 1], rationales_per_question=[2])
        with evaluation_mode(inner):
            try:
                with windows_noted() as windows:
                    output = inner(input_ids=ids[None], compact=ragged)
                logits = head(inner)(output.hidden).float().split(lengths)
                again, beside = (inner(input_ids=tokens[None], compact=ragged).hidden for tokens in (ids, others))
                alone = [inner(input_ids=part[None], use_cache=False).logits[0].float() for part in ids.split(lengths)]
            except (UserError, torch.OutOfMemoryError):
                raise
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{type(inner).__name__} cannot run a packed batch: {error}") from error
    finally:
        inner.set_attn_implementation(implementation)
    if not all(logit.isfinite().all() for logit in alone):
        raise UserError(
            f"{type(inner).__name__}: the student's weights give logits that are not finite; the file is damaged"
        )
    narrow = any(parameter.dtype.itemsize < 4 for parameter in inner.parameters())  # QLoRA embeds in float32
    tolerance = 0.1 if narrow else 1e-3
    if _relative_error(logits[0], alone[0]) > tolerance:
        raise UserError(
            f"{type(inner).__name__} does something between its hidden states and its logits that COMPACT does "
            "not know (it knows bias, logit scale and softcap), so its losses would be wrong; it is not supported"
        )
    # Rows that are computed apart come out the same to the bit; experts' batches and quantised products are rounded
    # by what is in them.
    shares_rounding = getattr(inner, "is_quantized", False) or any("experts" in n for n, _ in inner.named_parameters())
    repeated, moved = (
        _relative_error(states[lengths[0] :], output.hidden[lengths[0] :]) for states in (again, beside)
    )
    bound = tolerance if narrow and shares_rounding else max(10 * repeated, 1e-6)
    if _relative_error(logits[1], alone[1]) > tolerance or moved > bound:
        raise UserError(
            f"{type(inner).__name__} lets packed sequences see each other under student.attention={implementation}, "
            "so its losses would be wrong; choose another student.attention, or another student"
        )
    text = inner.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ("sliding_attention",)
    context = getattr(text, "max_position_embeddings", None) or math.inf
    shorter = {window for window in windows.of_masks if window < context}  # others hide nothing
    in_masks = shorter and not windows.of_layers and "sliding_attention" in kinds
    if in_masks and implementation != "flex_attention":  # which is given masks
        raise UserError(
            f"{type(inner).__name__} keeps its window of {max(shorter)} tokens in its mask, which "
            f"student.attention={implementation} does without; take student.attention=sdpa"
        )


def _embedding(model: PreTrainedModel) -> Tensor:
    """(V, D), the input embedding's weight."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight


def _relative_error(value: Tensor, truth: Tensor) -> float:
    value, truth = value.float(), truth.float()
    return ((value - truth).norm() / truth.norm().clamp_min(1e-30)).item()


# ------------------------------------------------------------------------------------------------------------- LoRA

# Routers choose experts; they are no part of the feed-forward layers that LoRA adapts.
_ROUTERS = ("gate", "router", "shared_expert_gate")


def lora_targets(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of every linear layer of attention and feed-forward, and of experts' weights fused into one parameter."""
    linear, fused = set(), set()
    for layer in decoder_layers(model):
        for path, module in layer.named_modules():
            name = path.rsplit(".", 1)[-1]
            # Quantised layers have forwards of their own too; an architecture's own kind is no plain product.
            plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
            own_kind = not plain and type(module).__module__.startswith("transformers.models.")
            if isinstance(module, (nn.Linear, Conv1D)) and name not in _ROUTERS and not own_kind:
                linear.add(name)
            if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):  # whose weights have three dimensions too
                fused |= {f"{name}.{key}" for key, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return sorted(linear), sorted(fused)


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int = 0) -> peft.PeftModel:
    """LoRA on every linear layer of attention and feed-forward, or on ``config.targets``; the head stays frozen.

    Raises:
        UserError: a target that the model does not have; dropout with fused experts, which peft cannot give.
    """
    linear, fused = lora_targets(model)
    if config.targets is not None:
        linear, fused = list(config.targets), []
    elif fused and config.dropout:
        raise UserError(
            f"student.lora.dropout={config.dropout}: peft's LoRA on the fused experts ({', '.join(fused)}) knows no "
            f"dropout; set student.lora.dropout=0, or student.lora.targets=[{','.join(linear)}] to leave them out"
        )
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=linear,
        target_parameters=fused or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with random_state_kept(seed=seed):
        try:
            wrapped = peft.get_peft_model(model, settings)
        except ValueError as error:
            raise UserError(f"student.lora.targets={linear}: {error}") from error
    return wrapped


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain model on the CPU with the adapter merged, for saving and evaluation; `model` is left as it is.

    Costs the model's size in host memory and nothing on the device. Sharded (DTensor) parameters are gathered one by
    one: then every rank must call this.

    Returns:
        A model of the transformers class that `model` wraps, in evaluation mode, never prepared for COMPACT.
    """
    inner = unwrap(model)
    adapted = next((module for module in model.modules() if isinstance(module, peft.PeftModel)), None)
    state = {}
    for name, tensor in (inner if adapted is None else adapted).state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        state[name] = whole.detach().to("cpu", copy=True)
    # FSDP2 puts a class of its own before the model's.
    model_class = next(
        c for c in type(inner).__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, FSDPModule)
    )
    with no_init_weights(), random_state_kept():
        plain = model_class(copy.deepcopy(inner.config))
        if adapted is not None:
            adapters = copy.deepcopy(adapted.peft_config)
            for adapter in adapters.values():  # PiSSA and its like would decompose weights that are not there yet
                cast(Any, adapter).init_lora_weights = False
            (first, adapter), *others = adapters.items()
            readapted = peft.get_peft_model(plain, adapter, adapter_name=first)
            for name, adapter in others:
                readapted.add_adapter(name, adapter)
            cast(Any, readapted.base_model).set_adapter(adapted.active_adapters)
    (plain if adapted is None else readapted).load_state_dict(state, assign=True)
    plain.tie_weights()
    if adapted is not None:
        plain = cast(PreTrainedModel, readapted.merge_and_unload())
    plain.generation_config = copy.deepcopy(inner.generation_config)
    return plain.requires_grad_(True).eval()
