"""Whether a recipe computes what the plain model computes in float32: its prediction, and the gradients of its loss.

The loss itself says little: that of a network that predicts next to nothing hardly depends on what it computes.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: How many times the error of the plain model under the same autocast a recipe may make, and what is rounding anyway.
ERROR_FACTOR, ERROR_FLOOR = 4.0, 1e-4
#: By what a loss is multiplied before its backward under float16, whose smallest numbers gradients would fall below.
FP16_SCALE = 1024.0


class LossMismatchError(RuntimeError):
    """A recipe computes something else than the plain model in float32, so that its time would mean nothing."""


class Built(NamedTuple):
    """A recipe as functions.

    Attributes:
        take: takes the next training step; returns the loss.
        loss: returns the loss of the first draw, with its graph.
        model: whose gradients they compute.
        predict: returns the noise that the network predicts from the first draw; compiled where the network itself is,
            not where forward and loss are one graph.
        renamed: gradients by the model's names to those by the plain model's.
    """

    take: Callable[[], Tensor]
    loss: Callable[[], Tensor]
    model: nn.Module
    predict: Callable[[], Tensor]
    renamed: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict


class Errors(NamedTuple):
    """Relative errors ‖difference‖ / ‖exact‖: of the prediction, and of all gradients together."""

    prediction: float
    gradients: float

    def of(self, direction: str) -> float:
        """The error that says whether a direction computes the right thing."""
        return self.prediction if direction == "fwd" else self.gradients


class Outcome(NamedTuple):
    """What a recipe computes of the first draw: the prediction ``(B, C, H, W)``, and gradients by parameter; float32,
    in the host's memory."""

    prediction: Tensor
    gradients: dict[str, Tensor]


def outcome(built: Built, autocast: torch.dtype | None) -> Outcome:
    """Compute it once; no gradient is left behind."""
    prediction = built.predict().detach().float().cpu()
    scale = FP16_SCALE if autocast == torch.float16 else 1.0
    forget_gradients(built.model)
    (built.loss() * scale).backward()
    found = {name: p.grad for name, p in built.model.named_parameters() if p.grad is not None}
    gradients = {name: gradient.float().cpu() / scale for name, gradient in built.renamed(found).items()}
    forget_gradients(built.model)
    return Outcome(prediction, gradients)


def forget_gradients(model: nn.Module) -> None:
    """Free the gradients of a model."""
    for parameter in model.parameters():
        parameter.grad = None


def errors(found: Outcome, exact: Outcome) -> Errors:
    """Errors of an outcome; a gradient that one of the two lacks counts as zero there."""
    difference = total = 0.0
    for name in found.gradients.keys() | exact.gradients.keys():
        own, right = found.gradients.get(name), exact.gradients.get(name)
        wrong = right if own is None else own if right is None else own - right
        difference += float(wrong.norm()) ** 2
        total += 0.0 if right is None else float(right.norm()) ** 2
    prediction = float((found.prediction - exact.prediction).norm() / exact.prediction.norm())
    return Errors(prediction, math.sqrt(difference / total))


def check(name: str, own: Errors, usual: Errors) -> None:
    """Compare the errors of a recipe with those of the plain model under the same autocast.

    Raises:
        LossMismatchError: one is more than :data:`ERROR_FACTOR` times as large, or not a number.
    """
    for what, error, plain in zip(("prediction", "gradients"), own, usual, strict=True):
        limit = max(ERROR_FACTOR * plain, ERROR_FLOOR)
        if not error < limit:
            raise LossMismatchError(
                f"{name}: with equal weights, images, times and noise the error of its {what}, relative to the plain "
                f"model in float32, is {error:.2g}; the limit is {limit:.2g}."
            )
