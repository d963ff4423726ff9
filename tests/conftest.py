"""Tests compute with one thread: sums over several may differ in the last bit, and several tests run at a time."""

from pathlib import Path

import pytest
import torch
from small_job import write_arrays, write_network

torch.set_num_threads(1)


@pytest.fixture
def small_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the network net.safetensors and the data a.npz, the current one."""
    write_network(tmp_path / "net.safetensors", steps=20)
    write_arrays(tmp_path / "a.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path
