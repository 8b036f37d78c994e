"""Whole training steps, without optimizer: COMPACT against plain fine-tuning with each peer's loss.

Every arm shares one student (random weights, Qwen2.5's shapes), its attention, and one packed batch of which 30% are
prompt tokens. Peers call the backbone itself and take the hidden states from there; COMPACT runs its own loss, eq. 2
to 11. Arms whose name ends in `_compiled` run the decoder layers through torch.compile, in place. `mixed` is full
fine-tuning as the trainer has it: weights in float32, and autocast around the forward, the peers' loss included.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.batches import IGNORE
from bench.peers import PEERS
from bench.shapes import Scale, Student
from bench.timing import Runner, free_memory, one_line
from compact.attention import attention_for, packed_rows
from compact.backbone import prepare
from compact.collate import Collator
from compact.config import CompactConfig, LoraConfig
from compact.loss import MODEL_INPUTS, distillation_loss
from compact.models import decoder_layers, unwrap
from compact.strategies.compact import Compact
from compact.student import add_lora

STEPS = tuple(f"step_{size}_{kind}" for size in ("0.5b", "1.5b") for kind in ("lora", "full", "mixed"))
PROMPT_SHARE = 0.3
# name of the arm: the peer, and whether it is given the scored rows alone
ARMS = {
    "torch_eager": ("torch_eager", False),
    "torch_compile": ("torch_compile", False),
    "torch_compile_compacted": ("torch_compile", True),
    "liger": ("liger", False),
    "cce": ("cce", False),
}

CONFIG = CompactConfig()  # what COMPACT does by default
NOTES = {"cce": "drops nearly all of a random student's gradient, whose softmax is flat"}


def student_of(work: str, scale: Scale) -> Student:
    return scale.students[work.split("_")[1]]


def attention(prepared: Step) -> str:
    """The implementation that every arm runs."""
    return unwrap(prepared.model).config._attn_implementation


@dataclass
class Step:
    """A student on the device, its batch, and what runs before every round."""

    model: nn.Module
    batch: dict[str, Any]
    scored: Tensor  # (N,) packed positions of the scored rows
    targets: Tensor  # (T,)
    compiled: dict[nn.Module, Callable]  # the forward that compilation gave each part; empty until then
    autocast: torch.dtype | None = None  # mixed precision's

    def precision(self) -> torch.autocast:
        device = self.targets.device.type
        return torch.autocast(device, self.autocast, enabled=self.autocast is not None)

    def ready(self, compiled: bool) -> None:
        """No gradients, and the layers as this arm wants them."""
        self.model.zero_grad(set_to_none=True)
        for module, forward in self.compiled.items():
            if compiled:
                module.forward = forward
            else:
                module.__dict__.pop("forward", None)  # the class's own is there again

    def compile(self, backend: str) -> None:
        from compact import compilation

        modules = list(decoder_layers(unwrap(self.model)).modules())
        others = {module for module in modules if "forward" in vars(module)}
        compilation.BACKEND = backend
        compilation.compile_layers(self.model)
        self.compiled = {m: vars(m)["forward"] for m in modules if "forward" in vars(m) and m not in others}


@contextmanager
def step(work: str, scale: Scale, device: torch.device):
    """The student and batch of a work; freed afterwards."""
    prepared = prepare_step(work, scale, device)
    try:
        yield prepared
    finally:
        prepared.model.to("meta")
        prepared.batch.clear()
        free_memory()


def runners(prepared: Step, scale: Scale) -> list[Runner]:
    """Every arm, eager first. What cannot be built has its error."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        suffix, error = "", None
        if compiled:
            suffix = "_compiled"
            try:
                prepared.compile(scale.compile_backend)
            except Exception as problem:
                error = one_line(problem)
        for name, build in _arms(prepared, scale).items():
            note = NOTES.get(name, "")
            runner = Runner(name + suffix, lambda: None, before=_before(prepared, compiled), note=note, error=error)
            try:
                runner.run = build()
            except Exception as problem:  # a peer that is not installed, or not for this device
                runner.error = one_line(problem)
            found.append(runner)
    return found


def _before(prepared: Step, compiled: bool) -> Callable[[], None]:
    return lambda: prepared.ready(compiled)


def _arms(prepared: Step, scale: Scale) -> dict[str, Callable[[], Callable[[], None]]]:
    """Builders of a round."""

    def ours() -> Callable[[], None]:
        strategy = Compact(CONFIG, [f"teacher-{k}" for k in range(scale.rationales)])

        def run() -> None:
            distillation_loss(prepared.model, prepared.batch, strategy, CONFIG)[0].loss.backward()

        return run

    def peer(name: str, compacted: bool) -> Callable[[], Callable[[], None]]:
        def build() -> Callable[[], None]:
            loss = PEERS[name].build(scale)
            head = unwrap(prepared.model).get_output_embeddings().weight
            targets = prepared.targets[prepared.scored] if compacted else prepared.targets

            def run() -> None:
                with prepared.precision():
                    hidden = _hidden(prepared)
                    value = loss(hidden[prepared.scored] if compacted else hidden, head, targets, None)
                value.backward()

            return run

        return build

    return {"compact": ours, **{arm: peer(*how) for arm, how in ARMS.items()}}


def _hidden(prepared: Step) -> Tensor:
    """(T, D) of the backbone alone, called as :func:`compact.student.prepare` has it called."""
    inputs = {name: prepared.batch[name] for name in MODEL_INPUTS}
    with packed_rows():
        output = unwrap(prepared.model).base_model(**inputs, use_cache=False)
    return output.last_hidden_state.squeeze(0)


def prepare_step(work: str, scale: Scale, device: torch.device) -> Step:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = student_of(work, scale)
    config = Qwen2Config(
        vocab_size=shape.head.vocabulary,
        hidden_size=shape.head.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    mixed = "_mixed" in work
    nn.Module.to(model, device, torch.float32 if mixed else scale.dtype)
    model.set_attn_implementation(attention_for(type(model), model.config, device.type, scale.dtype))
    prepare(model)
    wrapped: nn.Module = add_lora(model, LoraConfig(rank=16, dropout=0.0)) if "_lora" in work else model
    wrapped.train()
    autocast = scale.dtype if mixed and scale.dtype != torch.float32 else None
    if autocast is not None:  # around the forward alone, as accelerate has it
        wrapped.forward = torch.autocast(device.type, autocast)(wrapped.forward)
    batch = {
        name: value.to(device) if hasattr(value, "to") else value for name, value in Collator()(_items(scale)).items()
    }
    targets = F.pad(batch["labels"][0, 1:], (0, 1), value=IGNORE)
    return Step(wrapped, batch, batch["ragged"].rows, targets, {}, autocast)


def _items(scale: Scale) -> list[dict[str, Any]]:
    """Questions of random tokens as :func:`compact.data.tokenize_questions` gives them."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(student.head.vocabulary for student in scale.students.values())

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    items = []
    for q in range(scale.questions):
        mean = PROMPT_SHARE * scale.tokens
        prompt = round(mean + 0.4 * mean * (2 * q - scale.questions + 1) / scale.questions)
        answer = ids(3 + q % 3)
        rationales = []
        for k in range(scale.rationales):
            count = scale.tokens - prompt
            thinking = (torch.rand(count, generator=generator) < 0.125).tolist()
            start, length = count - len(answer) - 2, len(answer)
            rationales.append(
                {
                    "teacher": k,
                    "completion_ids": ids(start) + answer + ids(count - start - length),
                    "body_length": start,
                    "answer_start": start,
                    "answer_length": length,
                    "thinking": thinking,
                }
            )
        items.append({"id": str(q), "prompt_ids": ids(prompt), "evidence_ids": answer, "rationales": rationales})
    return items
