"""Compiles every Triton kernel for a Hopper GPU as the ops launch it, without one: run in a process of its own.

What the interpreter lets pass, the compiler may not: a missing pointer, a type that changes in a branch. Launches stop
at the binary, so the numbers that come out mean nothing. Prints the kernels' names, and how the head's multiply.
"""

from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from compact_kernels import CompatibilityRule, Ragged, compatibility_loss, dispatch, linear_logprob, question_consensus
from compact_kernels.head import triton_rows
from compact_kernels.sample_norms import launch
from compact_kernels.sample_norms.segments import Segments


class Hopper:
    """What compilation asks of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


compiled = set()


def only_compile(kernel, *arguments, grid, warmup, **options):
    compiled.add(kernel.fn.__name__)
    compiled.update({options["PRECISION"]} if "PRECISION" in options else ())  # the head's
    JITFunction_run(kernel, *arguments, grid=grid, warmup=True, **options)  # and nothing is returned to be launched


def main() -> None:
    batch = Ragged.build(
        sequence_lengths=[40, 50, 45, 38],
        prompt_lengths=[3] * 4,
        rationales_per_question=[2, 2],
        evidence_ids=[[5, 6]] * 4,
        answer_spans=[(20, 3)] * 4,
    )
    tokens = int(batch.cu_seqlens[-1])
    targets, consensus = torch.randint(4096, (tokens,)), torch.rand(4)
    question_consensus(torch.randn(4, 8, 16), torch.randn(4, 8, 16), batch)
    # Compilation takes seconds each: by question in two chunks and in two passes, a capped head with a bias.
    two_passes = {"rule": lambda statistics: CompatibilityRule()(statistics)}
    for dtype, options in (
        (torch.float32, two_passes),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"divergence_weight": 0.1}),
        (torch.bfloat16, two_passes),
    ):
        hidden = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
        weight = torch.randn(4096, 64, dtype=dtype, requires_grad=True)
        loss = compatibility_loss(
            hidden, weight, targets, batch, consensus=consensus, workspace_mib=0 if "rule" in options else 1, **options
        ).loss
        loss.backward()
    hidden = torch.randn(tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(4096, dtype=torch.bfloat16)
    logprob, entropy = linear_logprob(hidden, weight.detach(), targets, bias=bias, softcap=30.0)
    (logprob.sum() + entropy.sum()).backward()
    sample_norms()
    print(*sorted(compiled))


def sample_norms() -> None:
    """Products of LoRA in float32, of a full weight, of stored ones, and whatever surrounds them."""
    cut = Segments.of(torch.tensor([0, 300, 520], dtype=torch.int32), [0, 300, 520])
    x, query, key = (torch.randn(520, width, dtype=torch.bfloat16) for width in (896, 896, 128))
    ids, factor = torch.randint(9, (520,)), torch.rand(520)
    launch.gram_norms(x, [query, key, key], 1, cut.cu, cut.tiles)
    launch.gram_norms(x, [query], 0, cut.cu, cut.tiles, factor)
    launch.token_norms(ids, x, cut.cu, cut.tiles, -1)
    launch.product(x, query, cut.cu, None, None)
    launch.product(x, key, cut.cu, torch.rand(2), cut.offsets)
    launch.product(x.float(), torch.randn(520, 16), cut.cu, None, None)
    for kind in ("rms", "given"):
        launch.scale_gradients(x[:, None], x[:, None], cut.cu, cut.slices, kind, 1e-6)
    launch.token_rows(x, factor, x, cut.cu, ids, cut.cu, 0, cut.longest)


driver.set_active(Hopper())
JITFunction_run, JITFunction.run = JITFunction.run, only_compile
torch.version.cuda = "13.0"  # for whose GPUs kernels differ from others'
dispatch.INTERPRETED = True  # CPU tensors take the kernels
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(shared_memory_per_block_optin=232_448)
triton_rows._multiprocessors = lambda device: 132
if __name__ == "__main__":
    main()
