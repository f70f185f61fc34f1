"""UNets of diffusers as ours and back: ``UNet2DModel`` and ``UNet2DConditionModel``."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from scalelong_fast.data.optional import import_optional
from scalelong_fast.errors import UserError, invalid, unknown_name
from scalelong_fast.integrations.diffusers_config import diffusers_arguments, unet_arguments
from scalelong_fast.integrations.diffusers_names import to_our_names, to_their_names
from scalelong_fast.integrations.patching import apply_scalelong, state_of
from scalelong_fast.integrations.patching.state import NAME
from scalelong_fast.models import UNet, UNetConfig

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNet2DModel

#: Hyperparameters that do not follow from the weights: free to choose.
FREE = (
    *("img_size", "num_clip_token", "dropout", "use_checkpoint", "attention", "fused", "use_new_attention_order"),
    *("scaling", "kappa", "calibration", "reduction", "adapter_reduction", "activation", "init"),
)


#: What the gates of a patch are like; others cannot be carried.
_GATES_OF_A_PATCH = {"calibration": "se", "reduction": 16, "adapter_reduction": 4, "activation": "relu"}


def from_diffusers(
    model: "UNet2DModel | UNet2DConditionModel",
    scaling: str | None = None,
    kappa: float | None = None,
    **overrides: Any,
) -> UNet:
    """Our UNet with the weights of one of diffusers: the same function unless ``scaling`` is given.

    Args:
        model: a ``UNet2DModel`` or a ``UNet2DConditionModel``, e.g. the ``unet`` of a Stable Diffusion 1 or 2 pipeline.
            It is not changed and shares no memory with the result.
        scaling, kappa: coefficients of the long skips, see :func:`scalelong_fast.create_model`; default: those of the
            patch of a model that went through :func:`~scalelong_fast.apply_scalelong`, else ``none``. Gates are new and
            near 1, unless ``init="paper"`` is given.
        **overrides: fields of :class:`~scalelong_fast.models.UNetConfig` that do not follow from the weights:
            ``img_size`` (the model's ``sample_size``), ``num_clip_token``, ``dropout``, ``fused``, ``attention`` …

    Returns:
        The UNet, on the device, in the dtype and in the mode (training or eval) of ``model``. It is called
        as ``unet(x, timesteps, y)``, with class labels or text features as ``y``, and returns the tensor.

    Raises:
        UserError: not one of the two classes, or a subclass with a forward of its own; FreeU; an option that our UNet
            has not; parameters that do not fit; or ``scaling``, or gates of another kind, for a model that is patched.
    """
    diffusers = import_optional("diffusers", "diffusers")
    if not isinstance(model, diffusers.UNet2DModel | diffusers.UNet2DConditionModel):
        raise invalid(
            "model",
            type(model).__name__,
            "a UNet2DModel or UNet2DConditionModel of diffusers",
            "Other networks keep their class and are scaled in place: scalelong_fast.apply_scalelong(model).",
        )
    text = isinstance(model, diffusers.UNet2DConditionModel)
    check_computes(model, diffusers.UNet2DConditionModel if text else diffusers.UNet2DModel)
    for name in overrides:
        if name not in FREE:
            known = {field.name for field in dataclasses.fields(UNetConfig)}
            if name in known:
                raise UserError(f"{name}: it follows from the model and cannot be chosen. Free are: {', '.join(FREE)}.")
            raise unknown_name("override", name, FREE)
    img_size = overrides.pop("img_size", None)
    arguments = unet_arguments(type(model), dict(model.config), text, img_size)
    patch = state_of(model)
    if patch is not None and (scaling, kappa) != (None, None):
        raise UserError(
            f"model: it is patched with scaling {patch.settings['scaling']!r}, which comes along. Leave scaling and "
            "kappa out, or take the patch out first: remove_scalelong(model)."
        )
    given = {"scaling": scaling or "none", "kappa": kappa, "init": "identity"}
    if patch is not None:
        given = {name: patch.settings[name] or given[name] for name in given}
        check_gates(overrides if patch.settings["init"] else {}, "They come from the patch")
    config = UNetConfig(**(arguments | given | overrides))
    weight = model.conv_in.weight
    with torch.device(weight.device):
        ours = UNet(config).to(weight.dtype)
    state = ours.state_dict()
    shapes = {key: value.shape for key, value in state.items()}
    sines_first = not model.config.flip_sin_to_cos
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{NAME}.")}
    converted = to_our_names(config, weights, shapes, sines_first)
    gates = (ours if patch is None else patch).scaling.state_dict(prefix="scaling.")
    ours.load_state_dict(converted | gates)
    return ours.train(model.training)


def to_diffusers(model: UNet) -> "UNet2DModel | UNet2DConditionModel":
    """The model of diffusers that computes what our UNet computes, for its pipelines and tools.

    Args:
        model: it is not changed and shares no memory with the result. Coefficients other than ``none`` become a patch
            of the result, see :func:`~scalelong_fast.apply_scalelong`.

    Returns:
        A ``UNet2DConditionModel`` where the model takes text, else a ``UNet2DModel``; on the device, in the dtype
        and in the mode of ``model``.

    Raises:
        UserError: a U-ViT, of which diffusers has no class; a hyperparameter that diffusers cannot express; or gates
            of another kind than a patch has.
    """
    diffusers = import_optional("diffusers", "diffusers")
    if not isinstance(model, UNet):
        raise invalid(
            "model",
            type(model).__name__,
            "a scalelong_fast UNet",
            "diffusers has no class of the U-ViT: UVit2DModel has no long skips, UniDiffuser's has a norm after each.",
        )
    config = model.config
    gated = config.scaling in ("ls", "ls-individual")
    check_gates({name: getattr(config, name) for name in _GATES_OF_A_PATCH} if gated else {}, "They become a patch")
    cls = diffusers.UNet2DConditionModel if config.clip_dim > 0 else diffusers.UNet2DModel
    weight = model.input_blocks[0][0].weight
    with torch.device(weight.device):
        theirs = cls(**diffusers_arguments(config))
    torch.nn.Module.to(
        theirs, weight.dtype
    )  # their own method warns of parameters to be kept in float32: there are none
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(to_their_names(config, model.state_dict(), shapes))
    if config.scaling != "none":
        kappa = getattr(model.scaling, "base", 0.7)
        name, shared = ("ls", config.scaling == "ls") if gated else (config.scaling, False)
        apply_scalelong(theirs, name, kappa=kappa, shared=shared, init=config.init)
        state_of(theirs).scaling.load_state_dict(model.scaling.state_dict())
    return theirs.train(model.training)


def check_computes(model: torch.nn.Module, base: type) -> None:
    """Refuse a model that does not compute what ``base``, its class in diffusers, does with the same weights."""
    if type(model).forward is not base.forward:
        raise invalid(
            "model",
            type(model).__name__,
            f"{base.__name__} itself: this subclass has a forward of its own, which would be lost",
            "Such networks keep their class and are scaled in place: scalelong_fast.apply_scalelong(model).",
        )
    for number, block in enumerate(model.up_blocks):
        if all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")):
            raise UserError(
                f"model: FreeU is on (up_blocks[{number}]), which our UNet has not. Call disable_freeu() on it first."
            )


def check_gates(options: dict[str, Any], why: str) -> None:
    """Refuse hyperparameters of gates that a patch does not have; ``why`` says what it has to do with one."""
    for name, value in _GATES_OF_A_PATCH.items():
        if options.get(name, value) != value:
            raise invalid(name, options[name], f"{value!r} for the gates", f"{why}, whose gates are like that.")
