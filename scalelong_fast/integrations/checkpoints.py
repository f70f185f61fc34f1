"""Weights published with U-ViT and ScaleLong."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.models import UViT

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
    source = path_or_state_dict
    if isinstance(source, Mapping) and not _holds_tensors(source):
        raise UserError(
            "state_dict: holds values that are no tensors; expected a state dict, i.e. tensors by parameter name."
        )
    state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
    state = convert_uvit_keys(state, model.config.num_skips)
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
    return model


def _shorten(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
