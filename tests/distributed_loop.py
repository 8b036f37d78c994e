"""What tests/test_adapters.py runs on two gloo processes, by torchrun: the plain loop under DDP.

Each process sees half of the questions, in batches of one; the step must be that of all questions at once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from compact.adapters import Collator, WindowLoader, build_strategy, distillation_loss, prepare
from compact.config import CompactConfig, DataConfig
from compact.data import tokenize_questions
from tests.processes import leave
from tests.toy import toy_tokenizer
from tests.toy_run import toy_model, toy_questions


def main() -> None:
    dist.init_process_group("gloo")
    tokens, report = tokenize_questions(toy_questions(4), toy_tokenizer(), DataConfig(max_length=256))
    config = CompactConfig(sft_reduction="token")  # every rank has another number of tokens
    strategy = build_strategy(config, report.teachers)

    alone = prepare(toy_model())
    distillation_loss(alone, Collator()(list(tokens)), strategy, config)[0].loss.backward()

    model = DistributedDataParallel(prepare(toy_model()))
    sampler = DistributedSampler(tokens, shuffle=False)
    for batch in WindowLoader(tokens, batch_size=1, sampler=sampler, collate_fn=Collator(), accumulate=2):
        distillation_loss(model, batch, strategy, config, replicas=2)[0].loss.backward()
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    if dist.get_rank() == 0:
        print("passed: the loop under ddp", flush=True)
    leave()


if __name__ == "__main__":
    main()
