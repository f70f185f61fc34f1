"""What is checked before a run starts or goes on."""

from pathlib import Path
from typing import Any

from scalelong_fast.data import TrainingSet
from scalelong_fast.errors import UserError, invalid
from scalelong_fast.training.config import RunConfig, changed_fields, to_dict
from scalelong_fast.training.posthoc_ema import check_profiles

#: Sections and fields that may not change when a run is resumed: they decide what is trained, and on what.
_FIXED = ("model.", "data.", "diffusion.", "train.batch_size", "train.seed", "train.compat")
#: … except for these, which change how it is computed, not what.
_FREE = ("model.attention", "model.fused", "model.use_checkpoint", "data.path")


def check_model(config: RunConfig) -> None:
    """Raise unless the loss trains all that the model predicts."""
    if getattr(config.model, "learn_sigma", False):
        raise invalid(
            "model.learn_sigma",
            True,
            "False in training, since the loss is of the predicted noise alone",
            "Set --model.no-learn-sigma. Models with learned variances can be sampled from.",
        )


def check_data(dataset: TrainingSet, config: RunConfig) -> None:
    """Raise unless model and data fit together."""
    model = config.model
    if model.clip_dim > 0 and dataset.text_shape is None:
        raise invalid("model.clip_dim", model.clip_dim, f"0, since data set {dataset.name!r} has no text features")
    if model.clip_dim > 0 and dataset.text_shape != (model.num_clip_token, model.clip_dim):
        tokens, width = dataset.text_shape
        raise UserError(
            f"model: it takes text features of {model.num_clip_token}×{model.clip_dim}, but data set {dataset.name!r} "
            f"has {tokens}×{width} (tokens × width). Set --model.num-clip-token {tokens} --model.clip-dim {width}."
        )
    if dataset.image_shape != (model.in_chans, model.img_size, model.img_size):
        channels, height, width = dataset.image_shape
        raise UserError(
            f"model: it takes images of {model.in_chans}×{model.img_size}×{model.img_size}, but data set "
            f"{dataset.name!r} has {channels}×{height}×{width} (channels × height × width). Set --model.in-chans "
            f"{channels} --model.img-size {height}."
        )
    if model.num_classes <= 0:
        return
    if dataset.num_classes == 0:
        raise invalid("model.num_classes", model.num_classes, f"-1, since data set {dataset.name!r} has no labels")
    dropout = config.diffusion.label_dropout
    expected = dataset.num_classes + (dropout > 0)
    if model.num_classes != expected:
        null = " and the null class of label dropout" if dropout > 0 else " (no label dropout, so no null class)"
        raise invalid("model.num_classes", model.num_classes, f"{expected}: {dataset.num_classes} classes{null}")


def check_same_options(configs: list[dict[str, Any]]) -> None:
    """Raise unless every process was given the same options; one :func:`to_dict` output per process.

    Copies of a model that are updated in different ways drift apart without a sound. Where data lie and which device a
    process takes are a machine's own business.
    """
    for rank, config in enumerate(configs):
        changes = [c for c in changed_fields(configs[0], config) if c[0] not in ("data.path", "train.device")]
        if changes:
            name, first, here = changes[0]
            raise UserError(
                f"{name}: process {rank} was given {here!r}, process 0 {first!r}. Start every machine's processes with "
                "the same command."
            )


def check_same_precision(dtypes: list[str]) -> None:
    """Raise unless every process computes in the same dtype, ``auto`` being what its hardware can; one per process.

    Gradients that one scales, for fp16, and another does not would be averaged without a word.
    """
    for rank, dtype in enumerate(dtypes):
        if dtype != dtypes[0]:
            raise UserError(
                f"train.precision: process {rank} computes in {dtype}, process 0 in {dtypes[0]}: their GPUs differ. "
                "Name one that all can: --train.precision fp16 or fp32."
            )


def check_same_data(fingerprints: list[str]) -> None:
    """Raise unless every process has opened the same data; one fingerprint per process."""
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise UserError(
                f"data.path: process {rank} has other data (fingerprint {fingerprint}) than process 0 "
                f"({fingerprints[0]}). Give every machine the same files."
            )


def check_same_run(folder: Path, old: RunConfig, old_facts: dict[str, Any], new: RunConfig, fingerprint: str) -> None:
    """Raise unless the run that lies in ``folder`` may go on with another config.

    Args:
        folder: the run folder, named in messages.
        old, old_facts: what is stored there.
        new: the config now.
        fingerprint: of the data now.
    """
    changes = changed_fields(to_dict(old), to_dict(new))
    fatal = [c for c in changes if c[0].startswith(_FIXED) and not c[0].startswith(_FREE)]
    if fatal:
        listed = "; ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in fatal)
        raise UserError(
            f"out: {folder} holds a run of another kind ({listed}). Give the old values again to go on "
            "with it, or another --out to start a new run; nothing was changed."
        )
    if old_facts.get("data_fingerprint") != fingerprint:
        raise UserError(
            f"data.name: {folder} was trained on other images than {new.data.name!r} gives now. "
            "Bring the old data back to go on, or use another --out."
        )
    check_profiles(old.train.ema_profiles, new.train.ema_profiles, folder)
