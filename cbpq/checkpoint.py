"""Checkpoints of an unfinished run: one file, replaced atomically, refused by a run with other settings."""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cbpq.atomic import atomic_write
from cbpq.checkpoints import claims_more_memory
from cbpq.errors import TrainingError, UsageError

CHECKPOINT_VERSION = 1
_DIGEST_BYTES = hashlib.sha256().digest_size
_REMEDY = "use --overwrite to start again"


def save_checkpoint(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint at ``path``. Killed at any moment, the old one or the new one is there, whole.

    Args:
        path: the file.
        identity: what makes the run this run and no other, as plain values by name; compared on resuming.
        state: tensors and plain values.

    Raises:
        CbpqError: the file cannot be written (disk full, no permission); the old checkpoint is intact.
    """
    buffer = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, "identity": dict(identity), "state": dict(state)}, buffer)
    content = buffer.getvalue()
    atomic_write(path, hashlib.sha256(content).digest() + content)


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state saved at ``path``; nothing in the file is executed.

    Raises:
        TrainingError: the file is damaged or of another version.
        UsageError: it is of another run; the message names each difference.
    """
    with understood(path):
        data = path.read_bytes()
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("the digest does not fit")
        if claims_more_memory(content, io.BytesIO(content)):
            raise ValueError("it is compressed, or claims bytes that it has not")
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise ValueError("it holds no dictionary")
        version, saved, state = loaded["version"], dict(loaded["identity"]), dict(loaded["state"])
    if version != CHECKPOINT_VERSION:
        raise TrainingError(f"{path} was written by another version of cbpq; finish it with that one, or {_REMEDY}")
    if changed := differences(saved, identity):
        raise UsageError(f"cannot resume with other settings than the run began with: {'; '.join(changed)}; {_REMEDY}")
    return state


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """Around whatever takes a checkpoint apart: say in one line that it is not as ``save_checkpoint`` wrote it.

    Raises:
        TrainingError: anything failed.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises almost anything on content that is not its own
        raise TrainingError(f"{path} is damaged and cannot be resumed from; {_REMEDY}") from error


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs, in words: ``epochs was 10, now 20``."""
    names = [*saved, *(name for name in wanted if name not in saved)]
    return [
        f"{name} was {saved.get(name)}, now {wanted.get(name)}" for name in names if saved.get(name) != wanted.get(name)
    ]
