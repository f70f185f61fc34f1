"""AdamW with sensible parameter groups, and the learning-rate schedule."""

import math

import torch
from torch import nn

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
