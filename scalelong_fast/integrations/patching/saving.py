"""The patch of any network in a folder of its own: the gates, and what is needed to patch such a network again."""

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.integrations.patching.apply import apply_record, remove_scalelong
from scalelong_fast.integrations.patching.check import check_module, check_record
from scalelong_fast.integrations.patching.state import NAME, ScaleLongState, state_of, unwrapped
from scalelong_fast.scaling import LongSkipScaling

GATES, SETTINGS = "scalelong.safetensors", "scalelong.json"

#: Version of the two files.
FORMAT = 1


def save_scalelong(model: nn.Module, folder: str | Path) -> Path:
    """Write the patch of ``model`` into ``folder``, which is made where it is missing.

    Args:
        model: a patched network. Its own weights are not written.
        folder: gets ``scalelong.safetensors``, the gates, and ``scalelong.json``, the settings and sites. Both replace
            older ones only once they are complete.

    Returns:
        The folder.

    Raises:
        UserError: the network is not patched; its gates are sharded; the folder is a file; safetensors is missing.
    """
    # Imported here: who only imports the library shall not wait for its training.
    from scalelong_fast.training.files import write_atomically, write_json

    check_module(model)
    state = state_of(model)
    if state is None:
        raise UserError(f"model: {type(model).__name__} is not patched, so there is nothing to save. {mend_of(model)}")
    if not isinstance(state.scaling, LongSkipScaling):
        raise UserError(
            f"model: its gates are wrapped ({type(state.scaling).__name__}). Save them together with the adapter, or "
            "take the adapter off first (PEFT: merge_and_unload())."
        )
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise invalid("folder", str(folder), "a folder: there is a file of that name")
    safetensors = import_safetensors()
    gates = {}
    for name, value in state.state_dict().items():
        if hasattr(value, "device_mesh"):
            raise UserError(
                "model: its gates are sharded (FSDP). Gather them first, on every process: "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True."
            )
        gates[name] = value.detach().contiguous().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    content = safetensors.save(gates, {"format": "pt"})
    network = unwrapped(model)
    record = {
        "format": FORMAT,
        "network": type(network).__name__,
        # A crash between the two files would leave new gates beside old settings.
        "gates": hashlib.sha256(content).hexdigest(),
        "shapes": shapes_at_sites(network, state),
        "patch": state.record(),
    }
    write_atomically(folder / GATES, lambda file: file.write(content))
    write_json(folder / SETTINGS, record)
    return folder


def load_scalelong(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give ``model`` the patch in ``folder``: the gates, and where it is not patched yet, the hooks first.

    Args:
        model: a network like the one the patch was saved from; not patched, or patched with the same settings.
        folder: what :func:`save_scalelong` wrote.

    Returns:
        ``model``, its gates on its device and in the dtype they had there.

    Raises:
        UserError: no such folder, damaged or newer files, another network or other settings, with what differs. The
            network is left as it was then.
    """
    check_module(model)
    record = read_settings(Path(folder))
    gates = read_gates(Path(folder), record.get("gates"))
    state, patch = state_of(model), record["patch"]
    check_record(patch)
    network = unwrapped(model)
    differences = differing_shapes(network, record["shapes"])
    if differences:
        raise UserError(
            f"model: this {type(network).__name__} is not like the {record['network']} that the patch in {folder} was "
            f"saved from:\n{listed(differences)}"
        )
    if state is not None:
        check_same_patch(state, patch, folder)
        check_gates(state, gates, folder)
        state.load_state_dict(gates)
        return model
    apply_record(model, patch)
    state = state_of(model)
    try:
        check_gates(state, gates, folder)
    except UserError:
        remove_scalelong(model)
        raise
    state.load_state_dict(gates)
    return model


def mend_of(model: nn.Module) -> str:
    """What to do about a module that is not patched."""
    inside = [name.rpartition(".")[0] for name, part in model.named_modules() if isinstance(part, ScaleLongState)]
    return f"Its part {inside[0]!r} is: pass that." if inside else "Call apply_scalelong first."


def import_safetensors() -> ModuleType:
    """``safetensors.torch``; a missing package becomes an error that says how to install it."""
    from scalelong_fast.data.optional import import_optional

    return import_optional("safetensors.torch")


def read_settings(folder: Path) -> dict[str, Any]:
    """``scalelong.json``, of a version that is known."""
    path = folder / SETTINGS
    if not path.is_file():
        raise invalid("folder", str(folder), f"a folder with {SETTINGS}, as save_scalelong writes it")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"folder: {path} is damaged ({error!r}). Save the patch again.") from error
    if version != FORMAT:
        raise invalid(f"format of {path}", version, f"{FORMAT}", "Update scalelong_fast.")
    absent = [key for key in ("network", "shapes", "patch") if key not in record]
    if absent:
        raise UserError(f"folder: {path} is damaged: it has no {', '.join(absent)}. Save the patch again.")
    return record


def read_gates(folder: Path, fingerprint: str | None) -> dict[str, Tensor]:
    """``scalelong.safetensors``, whose SHA-256 is in the settings where these are not of the first such files."""
    path = folder / GATES
    if not path.is_file():
        raise invalid("folder", str(folder), f"a folder with {GATES}, as save_scalelong writes it")
    safetensors = import_safetensors()
    content = path.read_bytes()
    try:
        gates = safetensors.load(content)
    except Exception as error:  # its errors are of a class of its own, made in Rust
        raise UserError(f"folder: {path} is damaged ({error}). Save the patch again.") from error
    if fingerprint not in (None, hashlib.sha256(content).hexdigest()):
        raise UserError(
            f"folder: {path} is not of the save that {SETTINGS} is of: one of them was replaced, or saving was "
            "interrupted. Save the patch again."
        )
    return gates


def shapes_at_sites(network: nn.Module, state: ScaleLongState) -> dict[str, list[int]]:
    """Shapes of the parameters of the modules that receive a skip: by them another network is told."""
    modules = {site.module for site in state.sites}
    return {
        name: list(parameter.shape)
        for name, parameter in network.named_parameters()
        if not name.startswith(f"{NAME}.") and any(not m or name.startswith(f"{m}.") for m in modules)
    }


def differing_shapes(network: nn.Module, shapes: dict[str, list[int]]) -> list[str]:
    """What of the shapes is not as in ``network``; parameters that it has under other names (LoRA) are passed over."""
    parameters = dict(network.named_parameters())
    return [
        f"{name}: {tuple(parameters[name].shape)}, saved {tuple(shape)}"
        for name, shape in shapes.items()
        # Quantised weights have shapes of their own.
        if name in parameters and parameters[name].is_floating_point() and list(parameters[name].shape) != shape
    ]


def check_same_patch(state: ScaleLongState, patch: dict[str, Any], folder: str | Path) -> None:
    """Refuse a patch other than the one that is there; how it is computed (fused) and found (expect) may differ."""
    ours = json.loads(json.dumps(state.record()))
    free = ("fused", "expect", "init", "sites")
    differences = [
        f"{key}: {ours.get(key)!r}, saved {patch.get(key)!r}"
        for key in sorted(ours.keys() | patch.keys())
        if key not in free and ours.get(key) != patch.get(key)
    ]
    places = [[(s["i"], s["module"], s["width"]) for s in record["sites"]] for record in (ours, patch)]
    if places[0] != places[1]:
        differences.append(f"long skips (i, module, width): {places[0]}, saved {places[1]}")
    if differences:
        raise UserError(
            f"model: it is patched already, and otherwise than in {folder}:\n{listed(differences)}\n"
            "Call remove_scalelong(model) first; that drops its gates."
        )


def check_gates(state: ScaleLongState, gates: dict[str, Tensor], folder: str | Path) -> None:
    """Refuse gates that are not those of the patch."""
    own = state.state_dict()
    differences = [f"{name} is missing in the file" for name in own if name not in gates]
    differences += [f"{name} is not known" for name in gates if name not in own]
    differences += [
        f"{name}: {tuple(own[name].shape)}, saved {tuple(gates[name].shape)}"
        for name in own
        if name in gates and own[name].shape != gates[name].shape
    ]
    if differences:
        raise UserError(f"folder: the gates in {folder} are not those of its settings:\n{listed(differences)}")


def listed(differences: list[str]) -> str:
    """At most eight of them, one a line."""
    lines = [f"- {line}" for line in differences[:8]]
    if len(differences) > len(lines):
        lines.append(f"- and {len(differences) - len(lines)} more")
    return "\n".join(lines)
