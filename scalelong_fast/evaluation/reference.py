"""What generated images are compared with: a stored file of statistics or features, or a data set."""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalelong_fast.data.training_set import HostBatch, TrainingSet
from scalelong_fast.errors import UserError, invalid
from scalelong_fast.evaluation.extractors import ExtractorIdentity, FeatureExtractor
from scalelong_fast.evaluation.moments import Moments, RunningMoments, moments_of
from scalelong_fast.evaluation.pool import FeaturePool
from scalelong_fast.evaluation.sharing import own_batches
from scalelong_fast.training.files import write_atomically
from scalelong_fast.training.ranks import Ranks
from scalelong_fast.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class Reference:
    """Statistics of a set of images.

    Attributes:
        name: of the data set, or the file.
        moments: of its features.
        extractor: what made the features; None where a file does not say.
        data_fingerprint: of the data set; None where a file does not say.
        label_counts: images of each class, of a labelled data set.
        features: ``(K, F)`` float32, where they were kept; of a large data set those of some images, see
            :mod:`scalelong_fast.evaluation.pool`.
        kept: int64 ``(K,)``, which images of a data set these are.
    """

    name: str
    moments: Moments
    extractor: ExtractorIdentity | None = None
    data_fingerprint: str | None = None
    label_counts: tuple[int, ...] | None = None
    features: Tensor | None = None
    kept: Tensor | None = None

    def describe(self) -> dict[str, Any]:
        """What a result says of its reference."""
        return {"name": self.name, "n": self.moments.count, "data_fingerprint": self.data_fingerprint}


def save_reference(path: Path, reference: Reference) -> None:
    """Write ``.npz``: mean, covariance, n, features if kept, and a JSON string with where they come from."""
    facts = {
        "format": FORMAT,
        "name": reference.name,
        "data_fingerprint": reference.data_fingerprint,
        "label_counts": reference.label_counts,
        "extractor": None if reference.extractor is None else vars(reference.extractor),
        "version": __version__,
    }
    arrays = {
        "mean": reference.moments.mean.numpy(),
        "covariance": reference.moments.covariance.numpy(),
        "n": np.int64(reference.moments.count),
        "facts": np.array(json.dumps(facts)),
    }
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    try:
        write_atomically(path, lambda file: np.savez(file, **arrays))
    except OSError as error:
        raise UserError(f"--out: cannot write {path} ({error}). Choose another place or free some space.") from error


def load_reference(path: Path, argument: str = "--reference") -> Reference:
    """Read a file of statistics or features.

    Known are our own files; ``mu`` and ``sigma`` as pytorch-fid, U-ViT's and ADM's files have them; and ``features``
    ``(N, F)`` alone, from any program.

    Raises:
        UserError: not such a file, or values that are not finite or do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key in _KNOWN}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise invalid(argument, str(path), "an .npz file of statistics", f"It cannot be read: {error}") from error
    for key, array in arrays.items():
        if key != "facts" and not (array.dtype.kind in "fiu" and np.isfinite(array).all()):
            raise invalid(argument, str(path), "finite numbers", f"{key} holds others.")
    features = _features(arrays, path, argument)
    names = ("mean", "covariance") if "mean" in arrays else ("mu", "sigma")
    if all(name in arrays for name in names):
        mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in names)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise invalid(argument, str(path), f"{names[0]} (F,) and {names[1]} (F, F)", f"Their shapes are {shapes}.")
        moments = Moments(int(arrays.get("n", 0)), mean, covariance)
    elif features is not None:
        moments = moments_of(features)
    else:
        raise invalid(
            argument,
            str(path),
            "arrays mean and covariance (of scalelong-fast fid-stats), mu and sigma, or features",
            f"It holds {', '.join(sorted(arrays)) or 'none of them'}.",
        )
    facts = _facts(arrays, path, argument)
    extractor = facts.get("extractor")
    return Reference(
        name=facts.get("name", path.name),
        moments=moments,
        extractor=None if extractor is None else ExtractorIdentity(**extractor),
        data_fingerprint=facts.get("data_fingerprint"),
        label_counts=None if facts.get("label_counts") is None else tuple(facts["label_counts"]),
        features=features,
    )


_KNOWN = ("mean", "covariance", "mu", "sigma", "n", "features", "facts")


def _features(arrays: dict[str, np.ndarray], path: Path, argument: str) -> Tensor | None:
    if "features" not in arrays:
        return None
    features = torch.from_numpy(np.asarray(arrays["features"], np.float32))
    if features.ndim != 2 or len(features) < 2:
        raise invalid(argument, str(path), "features (N, F) of at least 2 images", f"Got {tuple(features.shape)}.")
    return features


def _facts(arrays: dict[str, np.ndarray], path: Path, argument: str) -> dict[str, Any]:
    if "facts" not in arrays:
        return {}
    try:
        facts = json.loads(str(arrays["facts"]))
        known = facts["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise invalid(
            argument, str(path), "statistics of scalelong-fast fid-stats", "Its facts are damaged."
        ) from error
    if not known:
        raise invalid(
            argument,
            f"format {facts['format']} in {path}",
            f"format {FORMAT}",
            f"It is of scalelong_fast {facts.get('version')}; make it anew with scalelong-fast fid-stats.",
        )
    return facts


def check_extractor(reference: Reference, extractor: ExtractorIdentity) -> str | None:
    """See that a reference is of the extractor in use.

    Returns:
        A warning where the reference does not say what it was made with, else None.

    Raises:
        UserError: it is of another extractor, or of other weights, or of another width.
    """
    made = reference.extractor
    if made is not None and (made.name, made.fingerprint) != (extractor.name, extractor.fingerprint):
        raise UserError(
            f"--reference: {reference.name} was made with extractor {made.name!r} ({made.fingerprint}), but now it is "
            f"{extractor.name!r} ({extractor.fingerprint}), and features of two networks cannot be compared. Give "
            f"--extractor {made.name} with the same weights, or make the reference anew: scalelong-fast fid-stats … "
            f"--extractor {extractor.name}."
        )
    if reference.moments.width != extractor.width:
        raise UserError(
            f"--reference: {reference.name} has {reference.moments.width} features an image, but extractor "
            f"{extractor.name!r} gives {extractor.width}. Make it anew: scalelong-fast fid-stats … --extractor "
            f"{extractor.name}."
        )
    if made is not None:
        return None
    return f"{reference.name} does not say which extractor it was made with; see that it was {extractor.name}."


def measure_dataset(
    dataset: TrainingSet,
    extractor: FeatureExtractor,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    keep: bool = False,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Statistics of all images of a data set, each process taking its share; a batch is read while the one before it
    is gone through.

    Args:
        dataset: a set of pixels.
        extractor: on ``device``.
        keep: keep features too (on the main process), see :mod:`scalelong_fast.evaluation.pool`.
        progress: called with (images of this process done, their number).

    Raises:
        UserError: a single image, or features that are not finite.
    """
    ranks = ranks or Ranks()
    if len(dataset) < 2:
        raise invalid("--reference", f"{len(dataset)} image in {dataset.name!r}", "at least 2")
    running: RunningMoments | None = None
    pool = FeaturePool(len(dataset)) if keep else None
    counts = torch.zeros(dataset.num_classes, dtype=torch.int64)
    # Every process extracts something, so that all know the width even if there are fewer batches than processes.
    batches = list(own_batches(len(dataset), batch_size, ranks))
    every = batches or [torch.arange(1)]
    for number, (indices, batch) in enumerate(zip(every, _read_ahead(dataset, every), strict=True)):
        assert batch.images is not None
        features = extractor(batch.images.to(device))
        ranks.beat()
        running = running or RunningMoments(features.shape[1], device)
        if batches:
            running.add(features)
            if batch.labels is not None:
                counts += batch.labels.bincount(minlength=len(counts))
            if pool is not None:
                pool.add(indices, features)
            if progress is not None:
                progress(min((number + 1) * batch_size, len(batches) * batch_size), len(batches) * batch_size)
    assert running is not None
    running.merge_across_ranks()
    label_counts = tuple(map(sum, zip(*ranks.gather(counts.tolist()), strict=True))) or None
    moments = running.result()
    fingerprint = ranks.broadcast(dataset.fingerprint() if ranks.is_main else None)
    reference = Reference(dataset.name, moments, extractor.identity(), fingerprint, label_counts)
    if pool is None:
        return reference
    return replace(reference, features=pool.gather(ranks), kept=pool.images)


def _read_ahead(dataset: TrainingSet, batches: list[Tensor]) -> Iterator[HostBatch]:
    """The samples of each batch; the next one is read in a thread meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="reference") as thread:
        coming = thread.submit(dataset.fetch, batches[0])
        for following in batches[1:]:
            batch, coming = coming.result(), thread.submit(dataset.fetch, following)
            yield batch
        yield coming.result()
