"""AdamW with sensible parameter groups, and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from scalelong_fast.training.config import TrainConfig

_DECAYED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict]:
    """Split parameters into decayed and spared ones.

    Decayed are the weight matrices of linear and convolutional layers; norms, biases, embeddings (labels, positions)
    and scalar coefficients are spared. ``decay_all`` decays everything, as the authors' released code does.
    """
    decayed = {
        id(module.weight) for module in model.modules() if decay_all is False and isinstance(module, _DECAYED_LAYERS)
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if decay_all or id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not decay_all and id(p) not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over :func:`parameter_groups`."""
    groups = parameter_groups(model, train.weight_decay, decay_all=train.compat)
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=True)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``state`` by the names of the parameters, and ``param_groups``; tensors are no copies.

    Moments that are not there yet are made, as zeros, and the next update is what it would have been: PyTorch makes
    them by an update with zero gradients and rate, whose count of steps would spoil the bias correction of all others.
    """
    fresh = not optimizer.state
    state = get_optimizer_state_dict(model, optimizer)
    if fresh:
        for moments in optimizer.state.values():
            moments["step"].zero_()
    return state


def learning_rate(step: int, train: TrainConfig) -> float:
    """Learning rate of the update that follows ``step`` finished ones: linear warm-up, then constant or cosine.

    A function of the step alone, so that resuming needs no scheduler state.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.decay_steps == 0:
        return train.lr
    progress = min(1.0, (step - train.warmup_steps) / (train.decay_steps - train.warmup_steps))
    return train.final_lr + 0.5 * (train.lr - train.final_lr) * (1 + math.cos(math.pi * progress))
