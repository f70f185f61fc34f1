"""What is recorded of a network in training for its oscillation (ScaleLong Fig. 1 and 12)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scalelong_fast.analysis.matrix_training import MatrixTraining, WatchedMatrices, train_matrices
from scalelong_fast.analysis.training import Watched, train_watched, watched_blocks
from scalelong_fast.training import RunConfig

#: A recording in JSON: ``steps``; ``features``, ``batch features`` and ``gradients``, a list over the decoder's blocks
#: (the first block to run first: i = N … 1) for each of these steps; ``loss`` on the probe at the end.
Record = dict[str, Any]


def record_network(config: RunConfig, every: int) -> Record:
    """Train a U-ViT or UNet and record it.

    ``features`` are root mean squares of the blocks' outputs on the probe after the update, ``batch features`` those on
    the step's own batch, ``gradients`` norms of the gradient of each block's parameters at that step.
    """
    found = _empty()
    batch: list[Tensor] = []

    def keep(number: int, block: nn.Module, _: Any, out: Tensor) -> None:
        if block.training:  # not on the probe
            batch[number] = out.detach().float().square().mean().sqrt()

    def observe(watched: Watched) -> None:
        if not watched.step:
            for number, block in enumerate(watched_blocks(watched.model)):
                batch.append(torch.tensor(0.0))
                block.register_forward_hook(partial(keep, number))
            return
        found["steps"].append(watched.step)
        found["features"].append(block_features(watched))
        found["batch features"].append(torch.stack(batch).double().tolist())
        found["gradients"].append(watched.gradients)
        if watched.step == config.train.steps:
            found["loss"] = watched.loss()

    train_watched(config, observe, every)
    return found


def record_matrices(
    training: MatrixTraining, scaling: str, seed: int, learning_rate: float, warmup: int, every: int
) -> Record:
    """The same of a matrix UNet, whose blocks are b_N … b_1 and whose features are h_{N−1} … h_0."""
    found = _empty()

    def observe(watched: WatchedMatrices) -> None:
        found["steps"].append(watched.step)
        found["features"].append(watched.features)
        found["batch features"].append(watched.batch_features)
        found["gradients"].append(watched.gradients)
        found["loss"] = watched.loss

    train_matrices(training, scaling, seed, learning_rate, warmup, observe, every)
    return found


def _empty() -> Record:
    return {"steps": [], "features": [], "batch features": [], "gradients": [], "loss": None}


def block_features(watched: Watched) -> list[float]:
    """Root mean square of the outputs of the decoder's blocks on the probe batch."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out.detach().float().square().mean().sqrt()))
        for block in watched_blocks(watched.model)
    ]
    try:
        watched.predict()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).double().tolist()
