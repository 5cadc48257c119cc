"""What every test and every process that it starts begins with."""

from __future__ import annotations

import os
import signal

# One thread for torch, unless a test asks for more: with tensors as small as these, threads wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# A script that runs the tests in the background has SIGINT ignored, nohup has SIGHUP, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
