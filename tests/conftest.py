"""Settings for every test."""

from __future__ import annotations

import torch

# Tiny tensors gain nothing from threads, and threads that wait for a busy core made these tests fifty times slower.
torch.set_num_threads(1)
