"""Fréchet distance of a network's samples from its data set: equal seeds and labels for every network."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from scalelong_fast.analysis.training import open_data
from scalelong_fast.data import TrainingSet
from scalelong_fast.errors import invalid
from scalelong_fast.evaluation.conditions import by_labels
from scalelong_fast.evaluation.drawing import Drawing
from scalelong_fast.evaluation.extractors import FeatureExtractor, create_extractor
from scalelong_fast.evaluation.frechet import frechet_distance
from scalelong_fast.evaluation.reference import Reference, measure_dataset
from scalelong_fast.evaluation.sources import check_pixels
from scalelong_fast.evaluation.steps import draw_features
from scalelong_fast.training import RunConfig
from scalelong_fast.training.hardware import resolve_execution
from scalelong_fast.training.ranks import Ranks

#: Solver of the samples: second order, hence few steps.
SAMPLER = "dpm-solver++"
#: Seed of the samples' noise, whatever the seed of the network.
SEED = 0
BATCH = 256


class SampleDistance:
    """Measures networks of one run's kind; a process measures each data set once.

    Args:
        config: the run: data, noise process, labels.
        samples: images to draw, without guidance and as many of each class.
        steps: of the solver.
        extractor: ``auto`` for ``digits`` on digits and ``inception`` elsewhere, or what ``scalelong-fast evaluate
            --extractor`` takes.

    Raises:
        UserError: latents or text, which need a decoder or prompts; no such extractor, or no weights for it.
    """

    def __init__(self, config: RunConfig, samples: int, steps: int, extractor: str = "auto"):
        if config.model.in_chans not in (1, 3) or config.model.clip_dim > 0:
            raise invalid(
                "--extractor", extractor, "none for latents and text", "scalelong-fast evaluate measures finished runs."
            )
        self.config, self.samples, self.steps = config, samples, steps
        self.device = resolve_execution(config.train).device
        if extractor == "auto":
            extractor = "digits" if config.data.name == "digits" else "inception"
        self._extractor = _shared_extractor(extractor, self.device)
        data = dataclasses.replace(config.data, flip=False)
        dataset = open_data(dataclasses.replace(config, data=data))
        check_pixels(dataset, "--preset", config.model.img_size)
        self._reference = _shared_reference(dataset, extractor, self.device)
        self._conditions = by_labels(samples, config.num_labels, SEED, "balanced")

    def __call__(self, model: nn.Module) -> float:
        """The distance of ``model``'s samples.

        Raises:
            NotFiniteError: images that are not finite.
        """
        drawing = Drawing(model, self.config, self._conditions, SAMPLER, self.steps, 1.0)
        drawn = draw_features(
            drawing,
            self._extractor,
            self.samples,
            device=self.device,
            batch_size=BATCH,
            keep=False,
            ranks=Ranks(),
            track=_silently,
        )
        return frechet_distance(drawn.moments, self._reference.moments)


@functools.cache
def _shared_extractor(name: str, device: torch.device) -> FeatureExtractor:
    """One for all networks of a process: the digits' classifier is trained, Inception's weights are read."""
    return create_extractor(name, device)


#: By content of the data, extractor and device; of each the moments alone are kept.
_REFERENCES: dict[tuple[str, str, torch.device], Reference] = {}


def _shared_reference(dataset: TrainingSet, extractor: str, device: torch.device) -> Reference:
    """One for all networks of a process: with Inception the pass over a data set takes longer than many a training."""
    key = (dataset.fingerprint(), extractor, device)
    if key not in _REFERENCES:
        shared = _shared_extractor(extractor, device)
        _REFERENCES[key] = measure_dataset(dataset, shared, device=device, batch_size=BATCH)
    return _REFERENCES[key]


@contextmanager
def _silently(description: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None
