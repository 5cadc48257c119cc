"""One thread for torch, unless a test asks for more: with tensors as small as these, threads wait for each other."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
