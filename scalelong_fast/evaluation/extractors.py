"""From images to the features that two sets of images are compared by."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scalelong_fast.data.optional import import_optional
from scalelong_fast.errors import UserError, invalid, unknown_name
from scalelong_fast.evaluation.digits_classifier import DigitsClassifier, train_digits_classifier
from scalelong_fast.training.hardware import fp32_products
from scalelong_fast.training.ranks import Ranks

#: Files that are a network in themselves: made by torch.export, or by torch.jit.
_EXPORTED, _SCRIPTED = (".pt2",), (".pt", ".ts", ".jit")

_INCEPTION_WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


@dataclass(frozen=True)
class ExtractorIdentity:
    """Which extractor made some features; two of the same fingerprint are the same network with the same weights.

    Attributes:
        name: as given to ``--extractor``.
        fingerprint: 16 hex digits of the weights, or of the file.
        width: features F of an image.
    """

    name: str
    fingerprint: str
    width: int


class FeatureExtractor:
    """A network that maps uint8 images ``(N, 3, H, W)`` to features ``(N, F)``.

    Args:
        name: what to call it.
        network: the module, on the device to compute on; its output is flattened to ``(N, F)``.
        fingerprint: of its weights; None: computed from its parameters and buffers.
    """

    def __init__(self, name: str, network: Callable[[Tensor], Tensor], fingerprint: str | None = None) -> None:
        self.name, self.network = name, network
        if fingerprint is None:
            fingerprint = weights_fingerprint(network) if isinstance(network, nn.Module) else ""
        self.fingerprint = fingerprint
        self._width: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Features of a batch in float32; grey images ``(N, 1, H, W)`` are repeated to three channels.

        Raises:
            UserError: images that are not uint8, or a network whose output is not one row an image.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise invalid(
                "images", f"{images.dtype} of shape {tuple(images.shape)}", "uint8 of shape (N, 1 or 3, H, W)"
            )
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        kind = images.device.type
        # Neither TF32 nor autocast: features must not depend on the machine's shortcuts.
        with torch.no_grad(), torch.autocast(kind, enabled=False), fp32_products(images.device, tf32=False):
            features = self.network(images.contiguous())
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise invalid("--extractor", f"{self.name} that returns {got}", f"features of shape ({len(images)}, F)")
        features = features.flatten(1).float()
        self._width = features.shape[1]
        return features

    def identity(self) -> ExtractorIdentity:
        """Name, fingerprint and width, the last of which is known once some features were extracted."""
        if self._width is None:
            raise RuntimeError("extract features first: only then their number is known")
        return ExtractorIdentity(self.name, self.fingerprint, self._width)


def create_extractor(
    name: str,
    device: torch.device | str = "cpu",
    weights: Path | None = None,
    ranks: Ranks | None = None,
) -> FeatureExtractor:
    """The extractor called ``name``.

    Args:
        name: ``inception`` (FID's Inception v3, 2048 features, through torchmetrics), ``digits``,
            ``package.module:factory`` (a function without arguments that returns an ``nn.Module``, or a module class),
            or a file: .pt2 of torch.export, .pt of TorchScript.
        device: where to compute.
        weights: file of Inception's weights, where they cannot be downloaded.
        ranks: the processes of the evaluation, all of which call this; the first one trains ``digits`` for all, the
            first one of each machine downloads Inception's weights.

    Raises:
        UserError: unknown name, missing package or weights, or a factory or file that does not give a network.
    """
    device = torch.device(device)
    if weights is not None and name != "inception":
        raise invalid("--extractor-weights", str(weights), "none, since only inception reads them", "Leave it out.")
    ranks = ranks or Ranks()
    if name == "inception":
        network = _inception(weights) if ranks.local_rank == 0 else None
        ranks.barrier()  # the others find what was downloaded
        return FeatureExtractor(name, (network or _inception(weights)).to(device))
    if name == "digits":
        # Another processor may round otherwise while it trains, and all must have the same weights.
        network = train_digits_classifier() if ranks.is_main else DigitsClassifier().eval().requires_grad_(False)
        network.load_state_dict(ranks.broadcast(network.state_dict()))
        return FeatureExtractor(name, network.to(device))
    if Path(name).suffix in (*_EXPORTED, *_SCRIPTED):
        return _from_file(Path(name), device)
    if ":" in name:
        return FeatureExtractor(name, _from_factory(name).to(device).eval())
    raise unknown_name("--extractor", name, ["inception", "digits", "package.module:factory", "network.pt2"])


def weights_fingerprint(network: nn.Module) -> str:
    """16 hex digits of the class and of all parameters and buffers of a network."""
    digest = hashlib.blake2b(type(network).__qualname__.encode(), digest_size=8)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """16 hex digits of a file's content."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _inception(weights: Path | None) -> nn.Module:
    """The network of FID: TensorFlow's Inception of 2015-12-05, up to its last pooling.

    torchmetrics resizes as pytorch-fid does, with which the released code measures: bilinear, to 299 pixels, where
    anti-aliasing makes no difference to images that are enlarged.
    """
    mend = 'pip install "scalelong_fast[eval]"'
    try:
        module = import_optional("torchmetrics.image.fid")
    except UserError as error:
        raise UserError(f"--extractor: inception needs torchmetrics and torch-fidelity: {mend}") from error
    if weights is not None and not weights.is_file():
        raise invalid("--extractor-weights", str(weights), "a file with the weights of Inception")
    try:
        return module.NoTrainInceptionV3("inception-v3-compat", ["2048"], None if weights is None else str(weights))
    except ModuleNotFoundError as error:
        raise UserError(
            f"--extractor: inception needs torch-fidelity, which is not installed: {mend}. Without it, "
            "--extractor takes any network: package.module:factory, or a .pt2 or .pt file."
        ) from error
    except Exception as error:  # a failed download, a damaged file: URLError, RuntimeError, UnpicklingError, KeyError …
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        where = "their download failed" if weights is None else f"{weights} cannot be read"
        raise UserError(
            f"--extractor: inception has no weights, since {where} ({reason}). Fetch {_INCEPTION_WEIGHTS} where "
            "there is a network and give the file with --extractor-weights."
        ) from error


def _from_factory(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise invalid(
            "--extractor", name, "package.module:factory", f"It could not be imported: {error}. Mind the spelling."
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    try:
        network = factory if isinstance(factory, nn.Module) else factory()
    except UserError:
        raise
    except Exception as error:  # it is anybody's code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise invalid("--extractor", name, "a factory that takes no arguments", f"It failed: {reason}") from error
    if not isinstance(network, nn.Module):
        raise invalid("--extractor", name, "a factory that returns an nn.Module", f"It gave {type(network).__name__}.")
    return network


def _from_file(path: Path, device: torch.device) -> FeatureExtractor:
    if not path.is_file():
        raise invalid("--extractor", str(path), "a file that exists")
    try:
        if path.suffix in _EXPORTED:
            network = torch.export.load(path).module().to(device)
        else:
            network = torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # both readers raise whatever their formats' parsers do
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise invalid(
            "--extractor", str(path), "a network stored by torch.export.save (.pt2) or torch.jit.save (.pt)", reason
        ) from error
    call = network
    if path.suffix in _SCRIPTED and "return_features" in [a.name for a in network.forward.schema.arguments]:
        # The Inception file that EDM and StyleGAN publish returns class probabilities unless asked.
        def call(images: Tensor) -> Tensor:
            return network(images, return_features=True)

    return FeatureExtractor(path.name, call, file_fingerprint(path))
