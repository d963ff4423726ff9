"""The end of training: every weight on its level, and BatchNorm statistics for the weights as they are then."""

import copy
from collections.abc import Callable
from itertools import islice

import torch

from cbpq import distributed
from cbpq.tracing import batch_norms
from cbpq.training import Run, Training, forward, laid_out


def settling_batches(run: Training) -> int:
    """Batches that ``settle`` re-estimates BatchNorm statistics from.

    None where training did not use batch statistics, or there was no training: such a network relies on the running
    ones, which remember pictures as they were when it was first trained.
    """
    if not run.settings.epochs or run.settings.batchnorm == "frozen":
        return 0
    return min(run.settings.batchnorm_batches, len(run.loader))


@torch.no_grad()
def finish(run: Run, on_batch: Callable[[], None] = lambda: None) -> None:
    """Put every weight on its level, and re-estimate BatchNorm statistics for the weights as they are now."""
    run.constrained.finish()
    settle(run, on_batch)


@torch.no_grad()
def settle(run: Training, on_batch: Callable[[], None] = lambda: None) -> None:
    """The end of training: BatchNorm statistics re-estimated for the weights as they are now, evaluation mode."""
    if run.features is not None:
        run.features.remove()
    run.averaging = None
    count = settling_batches(run)
    norms = [norm for norm in batch_norms(run.model) if norm.track_running_stats]
    run.model.eval()
    if not count or not norms:
        share_statistics(run)
        return
    before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain average over all batches
        norm.train()
    # an epoch number of its own: pictures in an order training did not end on
    for batch in islice(run.loader.epoch(run.settings.epochs), count):
        forward(run, laid_out(run, batch.images))
        on_batch()
    for norm, (momentum, state) in zip(norms, before, strict=True):
        norm.momentum = momentum
        if not norm.num_batches_tracked:  # in an auxiliary head, which only training runs
            norm.load_state_dict(state)
    share_statistics(run)
    run.model.eval()


@torch.no_grad()
def share_statistics(run: Training) -> None:
    """Average BatchNorm's running statistics over the processes."""
    if distributed.world_size() == 1 or run.settings.batchnorm == "frozen":
        return
    for norm in batch_norms(run.model):
        for buffer in (norm.running_mean, norm.running_var):
            if buffer is not None:
                buffer.copy_(distributed.mean(buffer))
