"""Before anything imports torch: no hub. Full size on a GPU, toy size on a CPU (see shapes.scale)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
