"""How an evaluation is made: what was asked for, else the protocol's, else the run's."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalelong_fast.diffusion import default_steps, resolve_sampler
from scalelong_fast.errors import check_range, invalid
from scalelong_fast.evaluation.protocols import Protocol, get_protocol, list_protocols, protocol_for
from scalelong_fast.training.config import RunConfig

#: Images where neither ``--fid`` nor a protocol says how many.
DEFAULT_IMAGES = 10_000


@dataclass(frozen=True)
class Settings:
    """How images are drawn and compared; ``deviations`` says where that differs from the protocol."""

    images: int
    sampler: str
    steps: int
    guidance: float
    labels: str
    extractor: str
    protocol: str | None
    deviations: tuple[str, ...]


def parse_count(text: str | int) -> int:
    """``"50k"`` as 50,000; plain numbers stay.

    Raises:
        UserError: anything else, or fewer than 2.
    """
    match = re.fullmatch(r"(\d+)(k?)", str(text).strip().lower())
    if match is None:
        raise invalid("--fid", text, "a number of images, e.g. 10k, 50k or 5000")
    count = int(match[1]) * (1000 if match[2] else 1)
    check_range("--fid", count, low=2, high=10_000_000, integer=True)
    return count


def find_protocol(name: str | None, config: RunConfig, preset: str | None) -> Protocol | None:
    """The protocol called ``name``; ``auto`` is that of the run's preset or data set.

    Raises:
        UserError: an unknown one, or a run for which there is none.
    """
    if name != "auto":
        return None if name is None else get_protocol(name)
    path = config.data.path
    protocol = protocol_for(preset, config.data.name, None if path is None else path.name)
    if protocol is None:
        known = ", ".join(list_protocols())
        raise invalid(
            "--protocol", "auto", f"one of {known}", f"None belongs to preset {preset!r} on data {config.data.name!r}."
        )
    return protocol


def resolve_settings(
    config: RunConfig,
    protocol: Protocol | None,
    *,
    images: int | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    labels: str | None = None,
    extractor: str | None = None,
) -> Settings:
    """Fill what was not asked for from the protocol, and from the run where there is none.

    A number of steps belongs to its sampler: with another sampler the default of that one counts.
    """
    run = config.sample
    run_steps = run.steps or default_steps(run.sampler)
    from_sampler, from_steps = (run.sampler, run_steps) if protocol is None else (protocol.sampler, protocol.steps)
    chosen = resolve_sampler(sampler or from_sampler)
    if steps is None:
        steps = from_steps if chosen == resolve_sampler(from_sampler) else default_steps(chosen)
    if guidance is None:
        guidance = run.guidance if protocol is None else protocol.guidance
    if extractor is None:
        extractor = protocol.extractor if protocol is not None else _usual_extractor(config)
    if labels is not None and not config.num_labels:
        raise invalid("--labels", labels, "none, since the model has no classes")
    usual_labels = "data" if protocol is not None and protocol.condition == "data" else "balanced"
    settings = Settings(
        images=images or (DEFAULT_IMAGES if protocol is None else protocol.images),
        sampler=chosen,
        steps=steps,
        guidance=guidance,
        labels=_condition(config, labels or usual_labels),
        extractor=extractor,
        protocol=None if protocol is None else protocol.name,
        deviations=(),
    )
    if protocol is None:
        return settings
    asked: dict[str, Any] = {**vars(protocol), "labels": protocol.condition}
    names = ("images", "sampler", "steps", "guidance", "labels", "extractor")
    deviations = [
        f"{name} {getattr(settings, name)} ({asked[name]})" for name in names if getattr(settings, name) != asked[name]
    ]
    return Settings(**{**vars(settings), "deviations": tuple(deviations)})


def prompt_deviations(settings: Settings, prompts: Path | None) -> list[str]:
    """How the captions differ from the protocol's, which are those of the validation images."""
    if settings.protocol is None or settings.labels != "text" or prompts is not None:
        return []
    return ["captions of the training images (validation images)"]


def check_settings(config: RunConfig, settings: Settings) -> None:
    """Raise where the run cannot be drawn from like that, before anything is computed.

    Raises:
        UserError: guidance without a null condition, or a sampler that does not suit the schedule.
    """
    of = "" if settings.protocol is None else f" (protocol {settings.protocol})"
    if settings.guidance != 1 and config.diffusion.label_dropout == 0:
        raise invalid(
            "--guidance",
            settings.guidance,
            "1, since the run had no label dropout and so knows no null condition",
            f"Set --guidance 1{of}.",
        )
    if settings.sampler == "euler-maruyama" and config.diffusion.schedule != "vpsde":
        raise invalid(
            "--sampler",
            settings.sampler,
            f"ddim or dpm-solver++ with the run's schedule {config.diffusion.schedule!r}",
            f"Euler-Maruyama solves the differential equation of the schedule vpsde; set --sampler dpm-solver++{of}.",
        )


def _condition(config: RunConfig, labels: str) -> str:
    """What a result says of the conditions: ``text`` and ``none`` where there are no labels to choose."""
    if config.model.clip_dim > 0:
        return "text"
    return labels if config.num_labels else "none"


def _usual_extractor(config: RunConfig) -> str:
    return "digits" if config.data.name == "digits" else "inception"
