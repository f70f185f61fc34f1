"""The generated images of an evaluation, batch by batch and never on disk."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalelong_fast.data import to_uint8
from scalelong_fast.diffusion import create_schedule, sample_images
from scalelong_fast.errors import UserError
from scalelong_fast.evaluation.conditions import Conditions
from scalelong_fast.evaluation.decoder import LatentDecoder
from scalelong_fast.training.config import RunConfig
from scalelong_fast.training.hardware import autocast_dtype


class NotFiniteError(UserError):
    """A network draws images that are NaN or infinite."""


@dataclass
class Drawing:
    """Draws images of a run by their number; image k is the same in every batch and on every process.

    Attributes:
        model: the averaged network, on the device to draw on.
        config: the run.
        conditions: seeds and conditions of all images.
        sampler, steps, guidance: see :func:`scalelong_fast.diffusion.sample_images`.
        decoder: for a model of latents.
    """

    model: nn.Module
    config: RunConfig
    conditions: Conditions
    sampler: str
    steps: int
    guidance: float
    decoder: LatentDecoder | None = None

    def __post_init__(self) -> None:
        config = self.config
        self._schedule = create_schedule(
            config.diffusion.schedule, beta_min=config.diffusion.beta_min, beta_max=config.diffusion.beta_max
        )
        self._device = next(self.model.parameters()).device
        # As in generate(): the dtype of training on a GPU; on a CPU float32, which is the same in every batch.
        on_gpu = self._device.type == "cuda"
        self._dtype = autocast_dtype(config.train.precision, self._device) if on_gpu else None
        prompts = self.conditions.prompts
        self._null = config.null_label if prompts is None else prompts.null_text

    @property
    def precision(self) -> str:
        """What the network computes in; latents are decoded in float32."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[self._dtype]

    def __call__(self, images: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Draw the images of these numbers.

        Args:
            images: int64 ``(B,)`` on the CPU.
            progress: called with (done, total) solver steps.

        Returns:
            uint8 ``(B, C, H, W)`` on the model's device.

        Raises:
            NotFiniteError: images that are not finite.
        """
        null = self._null
        if isinstance(null, Tensor):
            null = null.to(self._device, torch.float32)
        with torch.autocast(self._device.type, dtype=self._dtype or torch.bfloat16, enabled=self._dtype is not None):
            drawn = sample_images(
                self.model,
                self._schedule,
                image_shape=self.model.input_shape,
                seeds=[self.conditions.seeds[k] for k in images.tolist()],
                y=self.conditions.of(images),
                null_y=null,
                guidance=self.guidance,
                sampler=self.sampler,
                steps=self.steps,
                batch_size=len(images),
                device=self._device,
                clip_denoised=self.decoder is None,  # latents are not bounded
                progress=progress,
            )
            if not drawn.isfinite().all():  # as bytes it would pass for a black image
                raise NotFiniteError(
                    "RUN: the model draws images that are NaN or infinite. Look at its loss curve; another "
                    "--sampler or --train.precision fp32 in the training may help."
                )
        if self.decoder is not None:
            return self.decoder(drawn)
        return to_uint8(drawn.float()).to(self._device)
