"""`python -m compact.train` under accelerate's FSDP on CPUs, for tests/test_distributed.py.

accelerate shards on accelerators only: it is told that gloo's processes are some. All else is its own.
"""

from __future__ import annotations

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from compact.train import main

if __name__ == "__main__":
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    sys.exit(main())
