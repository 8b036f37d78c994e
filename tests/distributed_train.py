"""``python -m compact.train`` for tests/train/test_resume.py, under ``accelerate launch`` with fsdp2.yaml, on CPUs.

accelerate shards on accelerators alone: gloo's processes pass for such here. All else is its own.
"""

from __future__ import annotations

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

import compact.analyze
import compact.tokenization
from compact.train import main
from tests.processes import leave

write_arrow = compact.tokenization.write_arrow


def alone(*arguments) -> None:
    assert PartialState().is_main_process, "two processes write to one file"
    write_arrow(*arguments)


if __name__ == "__main__":
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    compact.tokenization.write_arrow = alone
    compact.analyze._draw = lambda run, content: {}  # pictures take longer than the run
    code = main()
    if code == 0:  # torch's caches keep meshes of FSDP2's, and these gloo's threads
        leave()
    sys.exit(code)
