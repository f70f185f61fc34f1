"""Weights published with U-ViT and ScaleLong, and those of the openai UNets."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.models import UNet, UViT

_LAYERS = {"layer1": "down", "layer2": "up"}
_GATE_KEY = re.compile(r"^se\.(?:(?P<block>\d+)\.)?(?P<layer>layer[12])\.(?P<leaf>weight|bias)$")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read tensors from a ``.safetensors`` or a PyTorch file (``weights_only=True``: no code is ever run).

    Raises:
        UserError: the file is missing, unreadable or holds something other than named tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torn zips, foreign pickles and missing files raise a dozen different types
        raise UserError(f"path: could not read {str(path)!r} ({type(error).__name__}: {error}).") from error
    if not _holds_tensors(state):
        raise invalid("path", str(path), "a file that holds a state dict, i.e. tensors by parameter name")
    return dict(state)


def _holds_tensors(state: object) -> bool:
    return isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())


def convert_uvit_keys(state_dict: Mapping[str, Tensor], num_skips: int) -> dict[str, Tensor]:
    """Translate the authors' names to ours.

    Backbone names are equal. The gates are ``se.layer1.*`` / ``se.layer2.*`` there (one shared), or
    ``se.<block>.layer1.*`` with block 0 the first decoder block, which merges the innermost skip i = N.
    """

    def translate(key: str) -> str:
        match = _GATE_KEY.match(key)
        if match is None:
            return key
        gate = "gate" if match["block"] is None else f"gates.{num_skips - 1 - int(match['block'])}"
        return f"scaling.{gate}.{_LAYERS[match['layer']]}.{match['leaf']}"

    return {translate(key): value for key, value in state_dict.items()}


def load_uvit_checkpoint(model: UViT, path_or_state_dict: str | Path | Mapping[str, Tensor]) -> UViT:
    """Load weights published with U-ViT or ScaleLong, strictly.

    Args:
        model: a :class:`~scalelong_fast.models.UViT` of the same shape; for LS weights built with ``scaling="ls"`` or
            ``"ls-individual"``.
        path_or_state_dict: a ``.pth`` / ``.safetensors`` file, or the tensors by the authors' parameter names.

    Returns:
        ``model``.

    Raises:
        UserError: unreadable file, or names and shapes that differ; the model is then unchanged.
    """
    state = convert_uvit_keys(_tensors_of(path_or_state_dict), model.config.num_skips)
    _load(model, state)
    return model


def load_unet_checkpoint(model: UNet, path_or_state_dict: str | Path | Mapping[str, Tensor]) -> UNet:
    """Load weights published with the openai UNets (IDDPM, ADM), or saved from a :class:`UNet`, strictly.

    Args:
        model: a :class:`~scalelong_fast.models.UNet` of the same shape; ``learn_sigma=True`` for weights that also
            predict the variance, as most published ones do. Heads (``num_heads``, ``num_head_channels``) and their
            order (``use_new_attention_order``) leave no trace in names and shapes: they must be those of the training.
        path_or_state_dict: a ``.pt`` / ``.pth`` / ``.safetensors`` file, or the tensors by parameter name. Of any
            floating dtype: the model keeps its own.

    Returns:
        ``model``. Where it has parameters of its coefficients and the file has none, as published weights have, they
        keep their values, and a warning says so.

    Raises:
        UserError: unreadable file, or names and shapes that differ; the model is then unchanged.
    """
    state = _tensors_of(path_or_state_dict)
    gates = {key: value for key, value in model.state_dict().items() if key.startswith("scaling.")}
    without_gates = bool(gates) and not any(key.startswith("scaling.") for key in state)
    _load(model, state | gates if without_gates else state)
    if without_gates:
        disturbed = model.config.scaling.startswith("ls") and model.config.init == "paper"
        mend = ' Build the model with init="identity" to start from the network as it was trained.' if disturbed else ""
        warnings.warn(
            f"checkpoint: it has no parameters of the long skips' coefficients; those of scaling "
            f"{model.config.scaling!r} keep their values.{mend}",
            stacklevel=2,
        )
    return model


def _tensors_of(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file or a mapping, by name."""
    if isinstance(source, Mapping) and not _holds_tensors(source):
        raise UserError(
            "state_dict: holds values that are no tensors; expected a state dict, i.e. tensors by parameter name."
        )
    return dict(source) if isinstance(source, Mapping) else read_state_dict(source)


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load ``state`` strictly, or refuse it and leave the model alone."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [
        f"{key} {tuple(state[key].shape)} (expected {tuple(own[key].shape)})"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    if missing or unexpected or reshaped:
        parts = [
            f"{label}: {_shorten(names)}"
            for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if names
        ]
        gates = any(key.startswith("scaling.") for key in missing + unexpected)
        mend = (
            f"The model was built with scaling {model.config.scaling!r}: build it with the scaling of the checkpoint."
            if gates
            else "Build the model with the preset and overrides that the checkpoint was trained with."
        )
        raise UserError(f"checkpoint: its parameters do not fit the model ({'; '.join(parts)}). {mend}")
    model.load_state_dict(state, strict=True)


def _shorten(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
