"""Tests compute with one thread: sums over several may differ in the last bit, and several tests run at a time."""

import torch

torch.set_num_threads(1)
