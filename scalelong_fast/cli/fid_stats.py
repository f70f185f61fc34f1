"""``scalelong-fast fid-stats NAME_OR_FOLDER``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from scalelong_fast.cli.evaluate import TIMEOUT
from scalelong_fast.cli.parse import parse
from scalelong_fast.cli.sample import check_writable
from scalelong_fast.errors import UserError, check_range, invalid
from scalelong_fast.evaluation.extractors import create_extractor
from scalelong_fast.evaluation.pool import bounded
from scalelong_fast.evaluation.progress import track
from scalelong_fast.evaluation.reference import load_reference, measure_dataset, save_reference
from scalelong_fast.evaluation.sharing import own_batches
from scalelong_fast.evaluation.sources import check_pixels, decoding_threads, open_images
from scalelong_fast.evaluation.steps import check_alike, explain_memory, identify
from scalelong_fast.training.config import TrainConfig
from scalelong_fast.training.hardware import resolve_device
from scalelong_fast.training.ranks import connect


@dataclasses.dataclass(frozen=True)
class StatsArguments:
    """Mean and covariance of the features of a data set (digits, cifar10, a folder of images or of a packed set), or of
    an .npz file of features, for scalelong-fast evaluate --reference."""

    out: Path
    """.npz to write."""
    extractor: str | None = None
    """inception, digits, package.module:factory, or a network in a .pt2 or .pt file; default: digits for digits, else
    inception."""
    extractor_weights: Path | None = None
    """File of Inception's weights, where they cannot be downloaded."""
    img_size: int | None = None
    """Side that files of a folder are resized and cropped to; default: they are of one size already."""
    path: Path | None = None
    """Local copy of cifar10, read instead of downloading."""
    keep_features: bool = False
    """Store features too, of 50,000 images at most, for evaluate --kid."""
    batch_size: int = 256
    """Images per forward and process."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        check_range("--batch-size", self.batch_size, low=1, integer=True)
        if self.img_size is not None:
            check_range("--img-size", self.img_size, low=1, integer=True)
        if self.out.suffix != ".npz":
            raise invalid("--out", str(self.out), "a file that ends in .npz")


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    prog = "scalelong-fast fid-stats NAME_OR_FOLDER"
    name, rest = (args[0], args[1:]) if args and args[0] not in ("-h", "--help") else ("", ["--help"])
    if name.startswith("-"):
        raise UserError(
            f"NAME_OR_FOLDER: got {name!r}, expected the data first, e.g. scalelong-fast fid-stats cifar10 --out "
            "cifar10.npz."
        )
    try:
        arguments = parse(StatsArguments, rest, prog)
    except SystemExit:
        if args:
            raise
        return 2  # help, since the data was missing
    console = Console()
    if name.endswith(".npz"):
        if arguments.extractor is not None:
            raise invalid("--extractor", arguments.extractor, "none, since the features are extracted already")
        reference = load_reference(Path(name), "NAME_OR_FOLDER")
        check_writable(arguments.out)
        kept = bounded(reference.features) if arguments.keep_features and reference.features is not None else None
        reference, is_main = dataclasses.replace(reference, features=kept), True
    else:
        with connect(TrainConfig(device=arguments.device, timeout=TIMEOUT)) as ranks:
            is_main = ranks.is_main
            if is_main:
                check_writable(arguments.out)
            device = resolve_device(ranks.device_name(arguments.device), "--device")
            with ranks.busy():  # downloads, decoding of images
                dataset = open_images(
                    name,
                    path=arguments.path,
                    img_size=arguments.img_size,
                    progress=is_main and console.is_terminal,
                    workers=decoding_threads(ranks),
                    argument="NAME_OR_FOLDER",
                )
                check_pixels(dataset, "NAME_OR_FOLDER", arguments.img_size)
                if arguments.img_size not in (None, dataset.image_shape[-1]):
                    side = f"{dataset.image_shape[-1]}, which the images of {name} have"
                    raise invalid("--img-size", arguments.img_size, side, "Only files of a folder are resized.")
                chosen = arguments.extractor or ("digits" if name == "digits" else "inception")
                extractor = create_extractor(chosen, device, arguments.extractor_weights, ranks)
                check_alike(identify(extractor, dataset.image_shape, device), ranks)
            batches = len(list(own_batches(len(dataset), arguments.batch_size, ranks)))
            show_progress = track(console, "features", batches * arguments.batch_size, show=is_main)
            with explain_memory(arguments.batch_size), show_progress as show:
                reference = measure_dataset(
                    dataset,
                    extractor,
                    device=device,
                    batch_size=arguments.batch_size,
                    keep=arguments.keep_features,
                    ranks=ranks,
                    progress=lambda done, _: show(done),
                )
    if is_main:
        save_reference(arguments.out, reference)
        made = "" if reference.extractor is None else f" by {reference.extractor.name}"
        console.print(
            f"{reference.moments.width} features{made} of {reference.moments.count:,} images ({reference.name}) in "
            f"{arguments.out}",
            highlight=False,
            soft_wrap=True,
        )
    return 0
