"""What the tests of the native library share: where it is needed, and a Python of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compact_kernels import native

ROOT = Path(__file__).resolve().parent.parent
NEEDS_LIBRARY = pytest.mark.skipif(not native.LIBRARY.loaded, reason=native.LIBRARY.reason or "loaded")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
