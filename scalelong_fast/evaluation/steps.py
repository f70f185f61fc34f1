"""The steps of an evaluation: draw and extract, measure the reference, compare."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from scalelong_fast.data import TrainingSet
from scalelong_fast.errors import UserError, invalid
from scalelong_fast.evaluation.decoder import LatentDecoder
from scalelong_fast.evaluation.drawing import Drawing
from scalelong_fast.evaluation.extractors import ExtractorIdentity, FeatureExtractor
from scalelong_fast.evaluation.frechet import KID_SUBSET_SIZE, KID_SUBSETS, import_kernel_distance, kernel_distance
from scalelong_fast.evaluation.moments import Moments, RunningMoments
from scalelong_fast.evaluation.picture import SHOWN
from scalelong_fast.evaluation.pool import FeaturePool, bounded
from scalelong_fast.evaluation.reference import Reference, measure_dataset
from scalelong_fast.evaluation.sharing import own_batches
from scalelong_fast.training.ranks import Ranks

#: ``track(description, total)``: a context that gives a function to call with the number done.
Track = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass
class Parts:
    """What an evaluation works with; either ``stored`` or ``dataset`` is the reference."""

    device: torch.device
    model: nn.Module
    step: int | None
    weights: str
    prompts: TrainingSet | None
    decoder: LatentDecoder | None
    extractor: FeatureExtractor
    identity: ExtractorIdentity
    stored: Reference | None
    dataset: TrainingSet | None


@dataclass
class Drawn:
    """What came of the generated images.

    Attributes:
        moments: of all features.
        features: ``(K, F)``, if kept, on the main process.
        first: the first few images and their features, on the main process.
        seconds: that drawing and extracting took.
    """

    moments: Moments
    features: Tensor | None
    first: tuple[Tensor, Tensor] | None
    seconds: float


def identify(extractor: FeatureExtractor, image_shape: tuple[int, int, int], device: torch.device) -> ExtractorIdentity:
    """The extractor's identity, by a first use on blank images; finds what cannot work before images are drawn.

    Raises:
        UserError: the network fails, e.g. because it takes another size or one number of images only.
    """
    for count in (1, 2):
        images = torch.zeros(count, *image_shape, dtype=torch.uint8, device=device)
        try:
            extractor(images)
        except UserError:
            raise
        except Exception as error:  # it may be anybody's network
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise invalid(
                "--extractor",
                extractor.name,
                f"a network that takes uint8 images (N, 3, {image_shape[1]}, {image_shape[2]}) for any N",
                f"With {count} of them it failed: {reason}",
            ) from error
    return extractor.identity()


def check_alike(identity: ExtractorIdentity, ranks: Ranks) -> None:
    """Raise unless the extractor has the same weights in all processes."""
    found = ranks.gather(identity.fingerprint)
    if len(set(found)) > 1:
        raise invalid(
            "--extractor",
            f"{identity.name} with {len(set(found))} sets of weights in {ranks.world} processes",
            "the same weights in all",
            "Let its factory load stored weights, or seed it.",
        )


def draw_features(
    drawing: Drawing,
    extractor: FeatureExtractor,
    total: int,
    *,
    device: torch.device,
    batch_size: int,
    keep: bool,
    ranks: Ranks,
    track: Track,
) -> Drawn:
    """Draw ``total`` images and extract their features, each process its share of the batches.

    Args:
        keep: keep features, for the kernel distance.

    Raises:
        UserError: features that are not finite: the model has diverged.
    """
    running: RunningMoments | None = None
    pool = FeaturePool(total) if keep else None
    first: tuple[Tensor, Tensor] | None = None
    batches = list(own_batches(total, batch_size, ranks))
    start = time.perf_counter()
    with track("drawing", len(batches) * drawing.steps) as show:
        for number, indices in enumerate(batches):

            def step_taken(done: int, _: int, before: int = number * drawing.steps) -> None:
                ranks.beat()
                show(before + done)

            images = drawing(indices, step_taken)
            features = extractor(images)
            running = running or RunningMoments(features.shape[1], device)
            running.add(features)
            if pool is not None:
                pool.add(indices, features)
            if ranks.is_main and first is None:
                first = images[:SHOWN].cpu(), features[:SHOWN].cpu()
    if running is None:  # fewer batches than processes
        running = RunningMoments(extractor.identity().width, device)
    running.merge_across_ranks()
    moments = running.result()
    features = None if pool is None else pool.gather(ranks)
    return Drawn(moments, features, first, time.perf_counter() - start)


def measure_reference(
    dataset: TrainingSet,
    extractor: FeatureExtractor,
    *,
    device: torch.device,
    batch_size: int,
    ranks: Ranks,
    track: Track,
) -> Reference:
    """Statistics of a data set; features are kept for neighbours and for the kernel distance."""
    with track("reference", len(list(own_batches(len(dataset), batch_size, ranks))) * batch_size) as show:
        return measure_dataset(
            dataset,
            extractor,
            device=device,
            batch_size=batch_size,
            keep=True,
            ranks=ranks,
            progress=lambda done, _: show(done),
        )


def check_sizes(dataset: TrainingSet, image_shape: tuple[int, int, int]) -> None:
    """Raise unless the reference has images of the size that the model draws."""
    if dataset.image_shape[1:] != image_shape[1:]:
        had, drawn = ("×".join(map(str, shape[1:])) for shape in (dataset.image_shape, image_shape))
        raise UserError(
            f"--reference: {dataset.name!r} has images of {had}, the model draws {drawn}. Give one of that size, or "
            "statistics of a folder brought to it: scalelong-fast fid-stats FOLDER --img-size …"
        )


def compare_kernels(features: Tensor, reference: Tensor, device: torch.device, seed: int) -> dict[str, Any]:
    """The kernel distance of two sets of features, as a result holds it; on the CPU where the GPU's memory is short."""
    features, reference = bounded(features), bounded(reference)
    try:
        mean, deviation = kernel_distance(features, reference, seed, device)
    except torch.OutOfMemoryError:
        mean, deviation = kernel_distance(features, reference, seed, "cpu")
    return {
        "mean": mean,
        "std": deviation,
        "subsets": KID_SUBSETS,
        "size": min(KID_SUBSET_SIZE, len(features), len(reference)),
        "of_generated": len(features),
        "of_reference": len(reference),
    }


@contextmanager
def explain_memory(batch_size: int) -> Iterator[None]:
    """One line with the mend where a GPU's memory is too small for a batch.

    Raises:
        UserError: it is.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])
        smaller = f", e.g. --batch-size {batch_size // 2}" if batch_size > 1 else " by another process on this GPU"
        raise UserError(
            f"--batch-size: {batch_size} images at once need more memory than the GPU has ({reason}). Take less"
            f"{smaller}; the result is the same."
        ) from error


def check_kid(kid: bool, reference: Reference | None, argument: str = "--reference") -> None:
    """Raise if the kernel distance is wanted and torchmetrics or the features of a stored reference are missing."""
    if kid:
        import_kernel_distance()
    if kid and reference is not None and reference.features is None:
        raise UserError(
            f"{argument}: {reference.name} holds moments alone, and --kid compares the features themselves. Make it "
            "with scalelong-fast fid-stats … --keep-features, give a data set, or leave --kid out."
        )


def check_same_weights(weights: str, ranks: Ranks) -> None:
    """Raise unless all processes have read the same model: a training may be replacing it."""
    if len(set(ranks.gather(weights))) > 1:
        raise UserError(
            "RUN: the processes read different weights, so the model was replaced meanwhile (by a training?) or the "
            "run folder is not the same for all. Copy the run and evaluate the copy."
        )


def circumstances(device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """When, with what and on what a result was made."""
    versions = {}
    for package in ("scalelong_fast", "torch", "torchmetrics", "torch-fidelity", "diffusers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "device": name,
        "processes": ranks.world,
    }
