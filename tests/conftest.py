"""Before anything imports torch: one thread a worker, no hub."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails
os.environ["HF_DATASETS_OFFLINE"] = "1"
