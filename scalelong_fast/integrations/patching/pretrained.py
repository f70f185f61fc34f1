"""The patch in the config of a diffusers model: ``save_pretrained`` writes it and ``from_pretrained`` renews it.

The gates are in the weights' file, being parameters of the model. The config says which patch they belong to.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.state import NAME, ScaleLongState, state_of

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The config's entry. Not the name of the child module: diffusers lets a config's entries be read as attributes.
KEY = "scalelong_patch"

#: Part of the entry: diffusers prints entries that it does not know, and so what to do about this one.
NEEDS = "import scalelong_fast.integrations before from_pretrained, or the scaling of the long skips is lost"

#: Where diffusers' models name the children that its layerwise casting leaves alone. Gates are such: they cast their
#: input to the dtype of their weights, which that keeps in a narrow one and widens for the call only.
_NOT_CAST = "_skip_layerwise_casting_patterns"

_MODELS = "diffusers.models.modeling_utils"


def write_config(network: nn.Module, state: ScaleLongState) -> None:
    """Enter the patch into the config of ``network``, if it has one as diffusers' models have."""
    if hasattr(network, "register_to_config"):
        network.register_to_config(**{KEY: {**state.record(), "network": type(network).__name__, "needs": NEEDS}})
    if hasattr(type(network), _NOT_CAST):
        state.before = {key: network.__dict__[key] for key in (_NOT_CAST,) if key in network.__dict__}
        setattr(network, _NOT_CAST, [*(getattr(network, _NOT_CAST) or ()), f"^{NAME}$"])


def clear_config(network: nn.Module, before: dict[str, Any]) -> None:
    """Take the patch out of the config; ``before`` has the attributes of the network that were replaced."""
    entries = network.__dict__.get("_internal_dict")
    if entries is not None and KEY in entries:
        network._internal_dict = type(entries)({key: value for key, value in entries.items() if key != KEY})
    network.__dict__.pop(_NOT_CAST, None)
    network.__dict__.update(before)


def renew_patch(model: Any, record: dict[str, Any] | None) -> None:
    """Patch a model that was made from a config with a patch in it; a patch that does not fit is dropped, and said.

    Raises:
        UserError: the patch is damaged or of another version, so that nobody knows what it would have done.
    """
    from scalelong_fast.integrations.patching.apply import apply_record
    from scalelong_fast.integrations.patching.check import check_record

    if record is None or not isinstance(model, nn.Module) or state_of(model) is not None:
        return
    check_record(record)
    clear_config(model, {})
    compiled = holds_compiled_code()
    try:
        apply_record(model, {key: value for key, value in record.items() if key not in ("network", "needs")})
    except UserError as error:
        warnings.warn(
            f"The config has scaled long skips ({KEY}) that do not fit this {type(model).__name__}, which is left "
            f"without: {error}",
            stacklevel=4,
        )
        return
    if compiled:
        warnings.warn(
            "All code that torch.compile made in this process was dropped, since a model with scaled long skips was "
            "loaded: the next call compiles again. Load such models before you compile.",
            stacklevel=4,
        )
    other = record.get("network", type(model).__name__)
    if other != type(model).__name__ and next(model.scalelong.parameters(), None) is not None:
        # Such as UNetMotionModel.from_unet2d, which copies weights part by part.
        warnings.warn(
            f"This {type(model).__name__} was made from the config of a {other} with scaled long skips. Its gates are "
            "new unless they are loaded from a file: model.scalelong.load_state_dict(other.scalelong.state_dict()) "
            "carries them over.",
            stacklevel=4,
        )


def holds_compiled_code() -> bool:
    """Whether anything was compiled in this process, as far as the compiler says."""
    tracker = getattr(sys.modules.get("torch._dynamo.convert_frame"), "input_codes", None)
    return bool(getattr(tracker, "seen", ()))


def renew_missing_gates(model: nn.Module, missing: Sequence[str]) -> None:
    """Give new gates to a model whose file had a patch in its config and no gates; what loads it left them empty."""
    from scalelong_fast.integrations.patching.apply import make_scaling, place

    state = state_of(model)
    prefix = f"{NAME}.scaling."
    lost = {key.removeprefix(prefix) for key in missing if key.startswith(prefix)}
    if state is None or not lost:
        return
    found = {key: value for key, value in state.scaling.state_dict().items() if key not in lost}
    del state.scaling
    state.scaling = make_scaling(state.settings, state.sites)
    place(state, model)
    state.scaling.load_state_dict(found, strict=False)
    warnings.warn(
        f"{type(model).__name__}: its config has scaled long skips, but {len(lost)} tensors of their gates are missing "
        "in the file of its weights: these gates start anew. The file was written without scalelong_fast.integrations.",
        stacklevel=3,
    )


def follow_diffusers() -> None:
    """Let diffusers' models renew their patch when they are loaded, now or as soon as somebody imports diffusers."""
    if _MODELS in sys.modules:
        extend_loading(sys.modules[_MODELS])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Sees diffusers being imported, which takes seconds that those who do not use it should not wait."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODELS:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_extend(module: ModuleType) -> None:
            try:
                execute(module)
            except BaseException:
                sys.meta_path.insert(0, self)  # somebody may mend it and try again
                raise
            extend_loading(module)

        spec.loader.exec_module = execute_and_extend
        return spec


def extend_loading(models: ModuleType) -> None:
    """Wrap ``from_config`` and ``from_pretrained`` of diffusers' models, once.

    The patch has to be there between the two: ``from_pretrained`` makes the network from its config, and then loads
    the tensors that the network has a place for.
    """
    try:
        base = importlib.import_module("diffusers.configuration_utils").ConfigMixin
        if hasattr(base.from_config, "without_scalelong"):
            return
        make, load = base.__dict__["from_config"].__func__, models.ModelMixin.__dict__["from_pretrained"].__func__
    except (AttributeError, KeyError) as error:
        warnings.warn(
            f"This version of diffusers loads models in a way that is not known ({error!r}): from_pretrained will not "
            "renew scaled long skips. Keep them with save_scalelong and load_scalelong, or update scalelong_fast.",
            stacklevel=2,
        )
        return

    @functools.wraps(make)
    def from_config(cls: type, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        record = None
        if isinstance(config, dict) and KEY in config:
            record = config[KEY]
            config = {key: value for key, value in config.items() if key != KEY}
        made = make(cls, config, return_unused_kwargs, **kwargs)
        model = made[0] if return_unused_kwargs else made
        # A config given as a path was read in there.
        renew_patch(model, getattr(model, "_internal_dict", {}).get(KEY) if record is None else record)
        return made

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_flashpack"):
            return load(cls, *args, **kwargs)
        wanted = kwargs.pop("output_loading_info", False)
        model, info = load(cls, *args, output_loading_info=True, **kwargs)
        renew_missing_gates(model, info["missing_keys"])
        return (model, info) if wanted else model

    from_config.without_scalelong, from_pretrained.without_scalelong = make, load
    base.from_config = classmethod(from_config)
    models.ModelMixin.from_pretrained = classmethod(from_pretrained)
