"""One evaluation, from the run's folder to the stored result."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scalelong_fast.data import TrainingSet, open_training_set
from scalelong_fast.data.packed import PackedSet
from scalelong_fast.data.packed.format import MANIFEST
from scalelong_fast.errors import invalid
from scalelong_fast.evaluation.conditions import Conditions, by_labels, by_prompts
from scalelong_fast.evaluation.decoder import LatentDecoder, create_decoder
from scalelong_fast.evaluation.drawing import Drawing
from scalelong_fast.evaluation.extractors import create_extractor, weights_fingerprint
from scalelong_fast.evaluation.frechet import frechet_distance
from scalelong_fast.evaluation.options import EvaluationOptions
from scalelong_fast.evaluation.picture import save_picture
from scalelong_fast.evaluation.progress import track
from scalelong_fast.evaluation.reference import Reference, check_extractor, load_reference
from scalelong_fast.evaluation.results import append_result, complete_result, read_results
from scalelong_fast.evaluation.settings import (
    Settings,
    check_settings,
    find_protocol,
    parse_count,
    prompt_deviations,
    resolve_settings,
)
from scalelong_fast.evaluation.sources import check_pixels, decoding_threads, open_images
from scalelong_fast.evaluation.steps import (
    Parts,
    check_alike,
    check_kid,
    check_same_weights,
    check_sizes,
    circumstances,
    compare_kernels,
    draw_features,
    explain_memory,
    identify,
    measure_reference,
)
from scalelong_fast.training.checkpoint import CheckpointFolder
from scalelong_fast.training.hardware import resolve_device
from scalelong_fast.training.ranks import Ranks
from scalelong_fast.training.run import RunFolder

if TYPE_CHECKING:
    from rich.console import Console


class Evaluation:
    """An evaluation of the run in a folder.

    Args:
        folder: the run's.
        options: what was asked for.
        ranks: the processes that share the work.
        console: where messages and progress of the main process go.
    """

    def __init__(self, folder: RunFolder, options: EvaluationOptions, ranks: Ranks, console: "Console") -> None:
        self.folder, self.options, self.ranks, self.console = folder, options, ranks, console
        self.results_file = folder.path / "evaluation.json"
        self.picture_file = folder.path / "evaluation.png"
        read_results(self.results_file)  # a damaged file is found before the work
        self.config, self.facts = folder.read_config()
        self._shown: tuple[Any, ...] | None = None
        self._sides: tuple[Any, ...] = ()  # features of both sides, for the kernel distance, and where to compute it

    def run(self) -> dict[str, Any] | None:
        """Evaluate, and on the main process store and return the result.

        Raises:
            UserError: bad input, or images that are not finite.
        """
        result = self._from_features() if self.options.features is not None else self._from_model()
        if result is None:
            return None
        # What is computed is stored before anything else can fail.
        append_result(self.results_file, result)
        if self.options.kid:
            self._say(f"The distance {result['fid']:.4f} is stored in {self.results_file}. Now the kernel distance.")
            with self.ranks.busy():
                result["kid"] = compare_kernels(*self._sides, seed=self.options.seed)
            complete_result(self.results_file, result)
        if self._shown is not None:
            save_picture(self.picture_file, *self._shown)
        return result

    def _from_features(self) -> dict[str, Any] | None:
        """Compare features that were extracted elsewhere."""
        options = self.options
        drawn = load_reference(options.features, "--features")
        reference = load_reference(Path(options.reference))
        if drawn.moments.width != reference.moments.width:
            raise invalid(
                "--features",
                f"{drawn.moments.width} an image in {options.features}",
                f"{reference.moments.width}, as in {options.reference}",
            )
        if drawn.extractor is not None:
            self._warn(check_extractor(reference, drawn.extractor))
        check_kid(options.kid, reference)
        check_kid(options.kid, drawn, "--features")
        if not self.ranks.is_main:
            return None
        self._sides = (drawn.features, reference.features, torch.device("cpu"))
        extractor = drawn.extractor or reference.extractor
        unknown = {"name": "unknown", "fingerprint": "unknown", "width": drawn.moments.width}
        return {
            "fid": frechet_distance(drawn.moments, reference.moments),
            "kid": None,
            "n": drawn.moments.count,
            "extractor": unknown if extractor is None else vars(extractor),
            "reference": reference.describe(),
            "sampling": None,
            "features": str(options.features),
            "protocol": None,
            "deviations": [],
            **circumstances(torch.device("cpu"), self.ranks),
        }

    def _from_model(self) -> dict[str, Any] | None:
        options, ranks = self.options, self.ranks
        protocol = find_protocol(options.protocol, self.config, self.facts.get("preset"))
        settings = resolve_settings(
            self.config,
            protocol,
            images=None if options.fid is None else parse_count(options.fid),
            sampler=options.sampler,
            steps=options.steps,
            guidance=options.guidance,
            labels=options.labels,
            extractor=options.extractor,
        )
        check_settings(self.config, settings)
        with ranks.busy():  # downloads, decoding of images
            parts = self._open(settings)
        if settings.images <= parts.identity.width:
            self._warn(
                f"{settings.images} images for {parts.identity.width} features: the distance is mostly bias. Take more."
            )
        follow = functools.partial(track, self.console, show=ranks.is_main)
        common = {"device": parts.device, "batch_size": options.batch_size, "ranks": ranks, "track": follow}
        with explain_memory(options.batch_size):
            reference = parts.stored or measure_reference(parts.dataset, parts.extractor, **common)
            conditions = self._conditions(settings, parts.prompts, ranks.broadcast(reference.label_counts))
            drawing = Drawing(
                parts.model, self.config, conditions, settings.sampler, settings.steps, settings.guidance, parts.decoder
            )
            self._say(
                f"Drawing {settings.images:,} images by {settings.sampler} in {settings.steps} steps"
                + (f" on {ranks.world} processes." if ranks.several else ".")
            )
            drawn = draw_features(drawing, parts.extractor, settings.images, keep=options.kid, **common)
        if not ranks.is_main:
            return None
        with ranks.busy():
            distance = frechet_distance(drawn.moments, reference.moments)
        self._sides = (drawn.features, reference.features, parts.device)
        self._shown = (*drawn.first, parts.dataset, reference)
        prompts, decoder = parts.prompts, parts.decoder
        return {
            "fid": distance,
            "kid": None,
            "n": drawn.moments.count,
            "extractor": vars(parts.identity),
            "reference": reference.describe(),
            "sampling": {
                "sampler": settings.sampler,
                "steps": settings.steps,
                "guidance": settings.guidance,
                "condition": settings.labels,
                "seed": options.seed,
                "precision": drawing.precision,
                "step": parts.step,
                "weights": parts.weights,
                "prompts": None if prompts is None else {"name": prompts.name, "fingerprint": prompts.fingerprint()},
                "decoder": None if decoder is None else decoder.describe(),
                "batch_size": options.batch_size,
                "seconds": round(drawn.seconds, 3),
            },
            "features": None,
            "protocol": settings.protocol,
            "deviations": [*settings.deviations, *prompt_deviations(settings, options.prompts)],
            **circumstances(parts.device, ranks),
        }

    def _open(self, settings: Settings) -> Parts:
        """Load all that is needed, and see that it fits together, before anything is drawn."""
        options, ranks = self.options, self.ranks
        device = resolve_device(ranks.device_name(options.device), "--device")
        model = self.folder.load_ema(device, options.model)
        # Of what was loaded: a training that goes on may have replaced the file by now.
        step, weights = self._step(), weights_fingerprint(model)
        check_same_weights(weights, ranks)
        prompts = self._prompts()
        decoder = self._decoder(device, prompts)
        extractor = create_extractor(settings.extractor, device, options.extractor_weights, ranks)
        image_shape = tuple(model.input_shape)
        if decoder is not None:
            image_shape = tuple(decoder(torch.zeros(1, *image_shape)).shape[1:])
        identity = identify(extractor, image_shape, device)
        check_alike(identity, ranks)
        stored, dataset = self._reference(image_shape)
        if stored is not None:
            self._warn(check_extractor(stored, identity))
        else:
            check_sizes(dataset, image_shape)
            if settings.labels == "data":
                by_labels(0, self.config.num_labels, 0, "data", (1,) * dataset.num_classes or None)
        check_kid(options.kid, stored)
        return Parts(device, model, step, weights, prompts, decoder, extractor, identity, stored, dataset)

    def _reference(self, image_shape: tuple[int, ...]) -> tuple[Reference | None, TrainingSet | None]:
        """The reference: stored statistics, or a data set still to be measured."""
        name = self.options.reference
        if name is not None and name.endswith(".npz"):
            return load_reference(Path(name)), None
        progress = self.ranks.is_main and self.console.is_terminal
        workers = decoding_threads(self.ranks)
        if name is not None:
            dataset = open_images(name, img_size=image_shape[-1], progress=progress, workers=workers)
        elif self.config.data.name == "folder" and self.config.data.path is not None:
            # Each process decodes its share, where a training decodes all.
            dataset = open_images(str(self.config.data.path), img_size=image_shape[-1], workers=workers)
        else:
            dataset = self._training_set(progress)
        check_pixels(dataset, "--reference", image_shape[-1])
        return None, dataset

    def _training_set(self, progress: bool = False) -> TrainingSet:
        """The data that the run was trained on; flips are no matter here."""
        data = dataclasses.replace(self.config.data, flip=False)
        dropout = self.config.diffusion.label_dropout
        return open_training_set(data, self.config.model, label_dropout=dropout, progress=progress)

    def _prompts(self) -> TrainingSet | None:
        """The set whose captions a text model draws."""
        text = self.config.model.clip_dim > 0
        if self.options.prompts is None:
            return self._training_set() if text else None
        if not text:
            raise invalid("--prompts", str(self.options.prompts), "none, since the model takes no text")
        return PackedSet(self.options.prompts)

    def _decoder(self, device: torch.device, prompts: TrainingSet | None) -> LatentDecoder | None:
        """The decoder of a model of latents; None for one of pixels."""
        options, data, model = self.options, self.config.data, self.config.model
        latents = prompts
        if latents is None and data.name == "packed" and data.path is not None and (data.path / MANIFEST).is_file():
            latents = self._training_set()
        # Latents of three channels exist too, and would pass for pictures.
        shape = (model.in_chans, model.img_size, model.img_size)
        packed = latents is not None and latents.latent and latents.image_shape == shape
        if options.autoencoder is None and model.in_chans in (1, 3) and not packed:
            return None
        return create_decoder(options.autoencoder, options.latent_scale, latents, device)

    def _conditions(
        self, settings: Settings, prompts: TrainingSet | None, label_counts: tuple[int, ...] | None
    ) -> Conditions:
        seed, model = self.options.seed, self.config.model
        if prompts is not None:
            return by_prompts(settings.images, prompts, (model.num_clip_token, model.clip_dim), seed)
        return by_labels(settings.images, self.config.num_labels, seed, settings.labels, label_counts)

    def _step(self) -> int | None:
        """Step of the newest checkpoint, with which the averaged model was stored."""
        steps = CheckpointFolder(self.folder.checkpoints).steps()
        return steps[-1] if steps and self.options.model is None else None

    def _say(self, message: str, style: str | None = None) -> None:
        if self.ranks.is_main:
            self.console.print(message, style=style, highlight=False, soft_wrap=True, markup=False)

    def _warn(self, message: str | None) -> None:
        if message is not None:
            self._say(message, "yellow")
