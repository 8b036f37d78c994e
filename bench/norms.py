"""Whole training steps with and without per-rationale gradient norms, and beside them Opacus' ghost clipping.

A step that measures mutual information is timed here too, against the same step without, and one with MIND's
assistant, against the same step with equal weights given beforehand: both are MIND's loss, with its JSD.

Every arm has a student of its own with the same random weights, so that nothing of one arm's hooks or replaced
forwards is in another's. Eager, compiled (the decoder layers through torch.compile) and captured arms (the whole step,
norms included, in one CUDA graph) come one mode after another: a graph's memory is not an eager step's. Opacus knows
no RMSNorm of transformers and no tied embedding: the works called `linear` train the decoder's linear layers alone,
in all arms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.batches import IGNORE
from bench.shapes import Scale
from bench.steps import CONFIG, Step, prepare_step
from bench.targets import INFORMATION, MIND, WITHOUT, WITHOUT_MIND
from bench.timing import Runner, free_memory, one_line
from compact.config import CompactConfig
from compact.information import InformationLog
from compact.loss import distillation_loss
from compact.models import decoder_layers, unwrap
from compact.strategies import Context, Strategy
from compact.strategies.compact import Compact
from compact.strategies.mind import Mind
from compact_kernels import SampleGradNorms, linear_logprob

KINDS = ("lora", "full", "linear")
NORMS = tuple(f"step_{size}_{kind}_norms" for size in ("0.5b", "1.5b") for kind in KINDS) + (
    "step_0.5b_full_long_norms",
)
LONG_TOKENS, LONG_QUESTIONS = 2048, 2
LONG_WORKSPACE_MIB = 2560  # with norms, a question's logits are there at once where the head trains with a divergence
WARMUP_SECONDS = 120  # compilation
LEARNING_RATE = 1e-4  # the student's, which MIND's assistant follows
OURS = ("compact", WITHOUT)
BY_MODE = {
    "eager": (*OURS, INFORMATION, MIND, WITHOUT_MIND, "opacus_ghost", "opacus_ghost_norms"),
    "compiled": tuple(f"{name}_compiled" for name in OURS),
    "captured": tuple(f"{name}_captured" for name in OURS),
}
ARMS = tuple(name for names in BY_MODE.values() for name in names)

NOTES = {
    INFORMATION: "no norms; curves and controls of mutual information, measured at every step",
    MIND: "no norms; MIND past its warm-up: the mean of four steps, at the last of which its assistant learns",
    WITHOUT_MIND: "no norms; equal weights given beforehand and MIND's divergence: the mean of four steps",
    "opacus_ghost": "two backward passes: norms, then clipped gradients",
    "opacus_ghost_norms": "its first backward pass alone: norms and gradients, nothing clipped",
}


class EqualWeights(Strategy):
    """MIND's loss without its assistant."""

    divergence = Mind.divergence

    def given(self, context: Context) -> Tensor:
        return context.pooled.new_full((context.ragged.num_sequences,), 1 / len(self.teachers))


def scale_of(work: str, scale: Scale) -> Scale:
    """8 rationales of 2048 tokens in the long works."""
    if "_long" not in work:
        return scale
    tokens = LONG_TOKENS if scale.tokens >= 256 else 4 * scale.tokens
    return replace(scale, tokens=tokens, questions=LONG_QUESTIONS)


@contextmanager
def arms(
    work: str, mode: str, scale: Scale, device: torch.device, wanted: Callable[[str], bool]
) -> Iterator[tuple[list[Runner], dict[str, int]]]:
    """Runners of one mode of :data:`BY_MODE`, and the bytes that each one's student holds; freed afterwards."""
    torch._dynamo.reset()
    scale = scale_of(work, scale)
    config = replace(CONFIG, workspace_mib=LONG_WORKSPACE_MIB) if "_long" in work else CONFIG
    # One graph replays at a time and nobody reads what it leaves, so that all of them may share their memory.
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    names = [
        name
        for name in BY_MODE[mode]
        if wanted(name)
        and (not name.startswith("opacus") or "_lora_" in work or "_linear_" in work)
        and (name != INFORMATION or "_full_" in work)
        and (name not in (MIND, WITHOUT_MIND) or "_full_norms" in work)
        and (mode != "captured" or device.type == "cuda")
    ]
    runners, held, students = [], {}, []
    for name in names:
        runner = Runner(name, lambda: None, note=NOTES.get(name, ""))
        try:
            prepared = _student(work, scale, device)
            students.append(prepared)
            held[name] = sum(p.numel() * p.element_size() for p in prepared.model.parameters())
            runner.before = lambda prepared=prepared: prepared.model.zero_grad(set_to_none=True)  # type: ignore[misc]
            if name.startswith("opacus"):
                runner.run = _opacus(name, prepared, scale)
            else:
                runner.run = _ours(name, prepared, scale, config, pool)
            if name in (MIND, WITHOUT_MIND):  # both, for between its steps a window clears gradients
                runner.run, runner.passes = _window(runner, config.mind.accumulation), config.mind.accumulation
            if mode == "captured":
                runner.before = lambda: None
        except Exception as problem:
            runner.error = one_line(problem)
        runners.append(runner)
    try:
        yield runners, held
    finally:
        for prepared in students:
            prepared.model.to("meta")
            prepared.batch.clear()
        runners.clear()
        free_memory()


def _student(work: str, scale: Scale, device: torch.device) -> Step:
    prepared = prepare_step(work.removesuffix("_norms").removesuffix("_long"), scale, device)
    if "_linear_" in work:
        prepared.model.requires_grad_(False)
        for module in decoder_layers(unwrap(prepared.model)).modules():
            if isinstance(module, nn.Linear):
                module.requires_grad_(True)
    return prepared


def _ours(
    name: str, prepared: Step, scale: Scale, config: CompactConfig, pool: tuple[int, int] | None
) -> Callable[[], object]:
    if name.endswith("_compiled"):
        prepared.compile(scale.compile_backend)
        prepared.ready(True)
    teachers = [f"teacher-{k}" for k in range(scale.rationales)]
    strategy: Strategy = Compact(config, teachers)
    if name == MIND:
        strategy = Mind(config, teachers)
    elif name == WITHOUT_MIND:
        strategy = EqualWeights(config, teachers)
    information = InformationLog(Path("information.jsonl"), teachers, config) if name == INFORMATION else None

    def plain() -> Tensor:
        result, context = distillation_loss(prepared.model, prepared.batch, strategy, config)
        strategy.observe(result.statistics, context, result.alpha)
        if information is not None:  # not started for writing: it keeps what it measures
            information.measure(0, context.output, result, prepared.batch)
        result.loss.backward()
        strategy.step(LEARNING_RATE)
        return result.loss

    run: Callable[[], object] = plain
    if name.removesuffix("_compiled").removesuffix("_captured") == "compact":
        recorder = SampleGradNorms(prepared.model)

        def with_norms() -> Tensor:
            with recorder.record(prepared.batch["ragged"]) as norms:
                plain()
            return norms.squared

        run = with_norms
    return _captured(prepared, run, pool) if name.endswith("_captured") else run


def _window(runner: Runner, steps: int) -> Callable[[], object]:
    """As many steps of the runner's, of which the assistant learns at the last."""
    step, before = runner.run, runner.before

    def run() -> None:
        for number in range(steps):
            if number:
                before()
            step()

    return run


def _captured(prepared: Step, run: Callable[[], object], pool: tuple[int, int] | None) -> Callable[[], object]:
    """The step as one CUDA graph, gradients in the graph's own memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            prepared.model.zero_grad(set_to_none=True)
            run()
    torch.cuda.current_stream().wait_stream(stream)
    prepared.model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _opacus(name: str, prepared: Step, scale: Scale) -> Callable[[], object]:
    """Opacus on the same rationales, one a row (they have one length), with COMPACT's own fused log-probs as loss."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    model = prepared.model
    ids = prepared.batch["input_ids"].view(-1, scale.tokens)
    targets = prepared.targets.view(ids.shape)
    counts = (targets != IGNORE).sum(1)
    inner = unwrap(model)
    inner.set_attn_implementation("sdpa")
    ghost = GradSampleModuleFastGradientClipping(model, batch_first=True, loss_reduction="mean", strict=False)
    head = inner.get_output_embeddings().weight

    def run() -> object:
        ghost.enable_hooks()
        hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logprob = linear_logprob(hidden, head, targets)[0]
        losses = -logprob.sum(1) / counts
        clips = name == "opacus_ghost"
        losses.mean().backward(retain_graph=clips)
        if not clips:
            return ghost.get_norm_sample()
        model.zero_grad(set_to_none=True)
        ghost.disable_hooks()
        (ghost.get_clipping_coef() * losses).sum().backward()
        return ghost.per_sample_gradient_norms

    return run
