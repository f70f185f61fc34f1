"""The batch of any step, drawn from (seed, step) alone."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from scalelong_fast.data import HostBatch, ShuffledOrder, TrainingSet, make_resident, to_network_range
from scalelong_fast.data.prefetch import Prefetcher
from scalelong_fast.data.training_set import draw_captions
from scalelong_fast.diffusion import stratified_uniform
from scalelong_fast.training.config import RunConfig
from scalelong_fast.training.ranks import Ranks
from scalelong_fast.training.seeds import step_seed

#: Data sets up to this size live on the device.
DEVICE_RESIDENT_BYTES = 4 << 30

#: Which of a step's streams of random numbers captions and latents are drawn from; the batch has the one without a
#: number, dropout the first (training/step.py).
_CAPTIONS, _LATENTS = 2, 3


@dataclass
class Draw:
    """Everything random about one step, of the samples of one process."""

    x0: Tensor  # (B, C, H, W) float32 in [-1, 1], or latents
    labels: Tensor | None  # (B,) int64, the null label where dropped; or text features (B, L, D) bfloat16
    noise: Tensor  # like x0
    u: Tensor  # (B,) float32, uniforms that the schedule maps to times

    def split(self, parts: int) -> "list[Draw]":
        """The samples in ``parts`` equal pieces, in order; views, not copies."""
        if parts == 1:
            return [self]
        size = self.x0.shape[0] // parts

        def piece(tensor: Tensor | None, number: int) -> Tensor | None:
            return None if tensor is None else tensor[number * size : (number + 1) * size]

        names = [field.name for field in dataclasses.fields(self)]
        return [Draw(**{name: piece(getattr(self, name), number) for name in names}) for number in range(parts)]


class BatchSource:
    """Draws the batch of any step from (seed, step) alone: nothing to save, nothing to restore.

    Random numbers are drawn for the whole batch on every process, which then takes its part: each is a function of
    (seed, step, number of the sample in the batch), on however many processes. Samples are fetched for the part alone.

    Args:
        dataset: the samples.
        config: the run; ``train.batch_size`` is that of all processes together.
        device: where the draws go.
        ranks: which part is this process's.
        prefetch: batches read ahead, of a set too large for the device.
    """

    def __init__(
        self,
        dataset: TrainingSet,
        config: RunConfig,
        device: torch.device,
        ranks: Ranks | None = None,
        prefetch: int = 2,
    ):
        ranks = ranks or Ranks()
        self.config, self.device = config, device
        self.size = config.train.batch_size
        share = self.size // ranks.world
        self.part = slice(ranks.rank * share, (ranks.rank + 1) * share)
        self.order = ShuffledOrder(len(dataset), self.size, config.train.seed)
        resident = make_resident(dataset, device, DEVICE_RESIDENT_BYTES)
        self.resident = resident is not None
        self.dataset: TrainingSet = dataset if resident is None else resident
        self.prefetch = Prefetcher(self._read, device, 0 if self.resident else prefetch)
        null_text = dataset.null_text if config.model.clip_dim > 0 else None
        self.null_text = None if null_text is None else null_text.to(device)
        self.generator = torch.Generator(device)
        self.latent_generator = torch.Generator(device)

    def __call__(self, step: int) -> Draw:
        """This process's part of the batch of the step that follows ``step`` finished ones."""
        config, part = self.config, self.part
        samples = self._fetch(step)
        labels = samples.labels if config.model.num_classes > 0 else None
        text = samples.text if config.model.clip_dim > 0 else None

        self.generator.manual_seed(step_seed(config.train.seed, step))
        flip = self._uniform()[part] < 0.5 if config.data.flip else None
        x0 = to_network_range(samples, flip=flip, noise=self._latent_noise(step), scale=self.dataset.latent_scale)
        if labels is not None and config.null_label is not None:
            dropped = self._uniform()[part] < config.diffusion.label_dropout
            labels = labels.masked_fill(dropped, config.null_label)
        elif text is not None and config.diffusion.label_dropout > 0:
            dropped = self._uniform()[part] < config.diffusion.label_dropout
            labels = torch.where(dropped[:, None, None], self.null_text, text)
        elif text is not None:
            labels = text
        if config.train.compat:
            u = self._uniform()
        else:
            u = stratified_uniform(self.size, generator=self.generator, device=self.device)
        noise = self._normal(self.generator)[part]
        if noise.shape[0] < self.size:
            noise = noise.clone()  # a view would keep the noise of all processes for the whole step
        return Draw(x0, labels, noise, u[part])

    def close(self) -> None:
        """Stop reading ahead."""
        self.prefetch.close()

    def _fetch(self, step: int) -> HostBatch:
        """The samples of this process's part, on the device."""
        if self.resident:
            return self.dataset.fetch(self._upload(self.order.batch_indices(step)[self.part]))
        return self.prefetch(step)

    def _read(self, step: int) -> HostBatch:
        """The samples of this process's part, on the host; called in the prefetching thread."""
        indices = self.order.batch_indices(step)[self.part]
        captions = None
        if self.dataset.num_captions > 1:
            captions = draw_captions(step_seed(self.config.train.seed, step, _CAPTIONS), self.size)[self.part]
        return self.dataset.fetch(indices, captions)

    def _latent_noise(self, step: int) -> Tensor | None:
        if not self.dataset.latent:
            return None
        self.latent_generator.manual_seed(step_seed(self.config.train.seed, step, _LATENTS))
        return self._normal(self.latent_generator)[self.part]

    def _uniform(self) -> Tensor:
        return torch.rand(self.size, generator=self.generator, device=self.device)

    def _normal(self, generator: torch.Generator) -> Tensor:
        return torch.randn((self.size, *self.dataset.image_shape), generator=generator, device=self.device)

    def _upload(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
