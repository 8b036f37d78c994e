"""What tests/test_sample_norms.py runs on two gloo processes: ``python -m tests.distributed_norms`` under torchrun.

Each process has a batch of its own; its norms must be those of its rationales, its gradients the mean over processes.
Prints one line a check that passed.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from compact_kernels import sample_grad_norms
from tests.distributed_student import whole
from tests.norm_cases import batch, fused, student, truth, uniform
from tests.processes import leave
from tests.student_cases import gradients

LENGTHS = ((9, 2, 6), (12, 5))


def ordinary(model: nn.Module) -> dict[str, torch.Tensor]:
    for lengths in LENGTHS:
        fused(model, *batch(lengths)).backward()
    return {name: gradient / 2 for name, gradient in gradients(model).items()}


def main() -> None:
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    ids, targets, ragged = batch(LENGTHS[rank])
    for name, lora, products in (("llama", True, "own"), ("llama", False, "gram"), ("gpt2", False, "own")):
        model = student(name, lora)
        expected = truth(model, ids, targets, ragged, uniform(ragged))
        mean = ordinary(copy.deepcopy(model))
        for kind in ("ddp", "fsdp2"):
            wrapped = copy.deepcopy(model)
            if kind == "ddp":
                wrapped = DistributedDataParallel(wrapped, find_unused_parameters=not lora)
            else:
                inner = wrapped.get_base_model() if lora else wrapped
                for layer in inner.base_model.layers if name == "llama" else inner.base_model.h:
                    fully_shard(layer, mesh=mesh)
                fully_shard(wrapped, mesh=mesh)
            with sample_grad_norms(wrapped, ragged, products=products) as norms:
                fused(wrapped, ids, targets, ragged).backward()
            torch.testing.assert_close(norms.squared, expected, rtol=1e-7, atol=0)
            for key, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    found = whole(parameter.grad)
                    torch.testing.assert_close(found, mean[key.removeprefix("module.")], rtol=1e-7, atol=1e-10)
            if rank == 0:
                print(f"passed: {name}{' lora' if lora else ''} {products} under {kind}", flush=True)
    leave()


if __name__ == "__main__":
    main()
