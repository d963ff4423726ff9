"""Tests run in several processes at a time, so each of them computes with one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which is after this
