"""What the processes of a run must agree on: the plan they begin with, and the weights they train."""

import hashlib

from cbpq import distributed
from cbpq.checkpoint import differences
from cbpq.errors import TrainingError, UsageError
from cbpq.planning import Plan
from cbpq.training import Run


def check_same_plan(job: Plan) -> None:
    """Refuse processes that would not do the same, as where the data on their machines differ.

    Raises:
        UsageError: naming each difference.
    """
    first, *others = distributed.gathered(job.identity())
    for number, other in enumerate(others, 1):
        if changed := differences(first, other):
            raise UsageError(
                f"process {number} would not do what process 0 does: {'; '.join(changed)}; give all the same"
            )


def check_same_weights(run: Run) -> None:
    """Make sure that codes, multipliers and whatever else is kept of a weight are the same in every process.

    Raises:
        TrainingError: naming the first weight that is not.
    """
    if distributed.world_size() == 1:
        return
    first, *others = distributed.gathered(digests(run))
    for number, other in enumerate(others, 1):
        wrong = next((name for name in first if first[name] != other[name]), None)
        if wrong is not None:
            raise TrainingError(
                f"process {number} no longer has the {wrong} of process 0 after step {run.step} of epoch "
                f"{run.epoch + 1}: its machine may be faulty; the last checkpoint is whole, go on from it with --resume"
            )


def digests(run: Run) -> dict[str, bytes]:
    """SHA-256 of the codes and of each tensor that the method keeps, such as ``multiplier of conv.weight``."""
    found = {}
    for name in run.constrained.names:
        latent, grid, state = run.constrained.latent(name), run.constrained.grid(name), run.constrained.state(name)
        kept = {"codes": grid.codes(latent), "scale": grid.scale.detach(), **state}
        for part, tensor in kept.items():
            content = tensor.cpu().contiguous().numpy().tobytes()
            found[f"{part} of {name}"] = hashlib.sha256(content).digest()
    return found
