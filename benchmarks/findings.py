"""Findings of ``scalelong-fast analyze`` that are kept in docs/findings, without their raw records."""

import dataclasses
import importlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, source_hash
from scalelong_fast.analysis.finding import json_ready
from scalelong_fast.errors import UserError
from scalelong_fast.training.files import write_atomically, write_json
from scalelong_fast.version import __version__

FINDINGS = ROOT / "docs" / "findings"
PICTURES = ROOT / "docs" / "images" / "analysis"

#: Entries of a finding's data that are raw records, which neither tables nor verdicts need: they are left out.
RAW = ("by_time", "curves", "measurements", "records", "results")
#: The scale whose findings are kept, and from whose numbers something can be concluded.
SCALE = "digits"
#: Bytes of a picture; a larger one gets a palette.
LARGEST_PICTURE = 100 * 1024

_ANALYSIS = "scalelong_fast/analysis"
_SCALING = tuple(f"scalelong_fast/scaling/{name}.py" for name in ("constant", "gates", "learnable"))
#: What decides what a trained network gives, whatever is looked at.
_TRAINING = (
    f"{_ANALYSIS}/training.py",
    f"{_ANALYSIS}/statistics.py",
    "scalelong_fast/data/digits.py",
    "scalelong_fast/diffusion/schedule.py",
    *(f"scalelong_fast/models/{name}.py" for name in ("attention", "layers", "uvit")),
    *_SCALING,
    "scalelong_fast/scaling/block_output.py",
    *(f"scalelong_fast/training/{name}.py" for name in ("batches", "objective", "optim", "step", "presets/digits")),
)
#: What decides a loss on a large probe, and a Fréchet distance of samples.
_SAMPLED = (
    f"{_ANALYSIS}/learning_curve.py",
    f"{_ANALYSIS}/sample_distance.py",
    "scalelong_fast/diffusion/solvers.py",
    *(f"scalelong_fast/evaluation/{name}.py" for name in ("digits_classifier", "drawing", "frechet", "moments")),
    "scalelong_fast/training/ema.py",
    *_TRAINING,
)
_DRAWN = (f"{_ANALYSIS}/samples.py", "scalelong_fast/data/digits.py", "scalelong_fast/diffusion/schedule.py")
_PAIRED, _RECORDS = f"{_ANALYSIS}/paired.py", f"{_ANALYSIS}/oscillation_records.py"
_MATRICES = (f"{_ANALYSIS}/matrix_unet.py", f"{_ANALYSIS}/schedules.py")


@dataclass(frozen=True)
class Study:
    """A finding that the page shows.

    Attributes:
        command: what writes it, at the scale ``digits``.
        module: of ``scalelong_fast.analysis``, with its ``SCALES``.
        others: further files whose code decides its numbers.
        added: settings of the command's defaults that ``SCALES`` does not have.
    """

    command: str
    module: str
    others: tuple[str, ...]
    added: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        return [f"{_ANALYSIS}/{self.module}.py", *self.others]


#: By name, in the order of the page.
STUDIES = {
    "oscillation": Study("scalelong-fast analyze oscillation", "oscillation", (_PAIRED, _RECORDS, *_TRAINING)),
    "oscillation-matrix": Study(
        "scalelong-fast analyze oscillation --preset matrix",
        "oscillation_matrix",
        (
            *(f"{_ANALYSIS}/{name}.py" for name in ("oscillation", "matrix_training", "statistics")),
            _PAIRED,
            _RECORDS,
            *_MATRICES,
            *_SCALING,
            *_DRAWN,
        ),
    ),
    "noise": Study("scalelong-fast analyze noise digits", "noise", _DRAWN),
    "suggest-kappa": Study(
        "scalelong-fast analyze suggest-kappa digits",
        "noise",
        (f"{_ANALYSIS}/kappa_range.py", *_DRAWN),
        {"skips": 6},
    ),
    "robustness": Study(
        "scalelong-fast analyze robustness", "robustness", (_PAIRED, f"{_ANALYSIS}/composition.py", *_TRAINING)
    ),
    "kappa": Study("scalelong-fast analyze kappa", "learnt_kappa", _TRAINING),
    "convergence": Study(
        "scalelong-fast analyze convergence",
        "convergence",
        (f"{_ANALYSIS}/convergence_levels.py", f"{_ANALYSIS}/step_time.py", *_SAMPLED),
    ),
    **{
        f"ablation-{what}-{number}": Study(
            f"scalelong-fast analyze ablation --{what}s {number}",
            "ablation",
            (*(f"{_ANALYSIS}/{name}.py" for name in ("ablation_report", "ablation_tables")), *_SAMPLED),
        )
        for what, number in (("table", 2), ("table", 3), ("table", 4), ("figure", 6), ("figure", 13))
    },
    "bounds": Study("scalelong-fast analyze bounds", "bounds", (f"{_ANALYSIS}/statistics.py", *_MATRICES)),
    "lipschitz": Study(
        "scalelong-fast analyze bounds",
        "lipschitz",
        (f"{_ANALYSIS}/robust_bound.py", f"{_ANALYSIS}/matrix_unet.py", *_DRAWN),
    ),
}


@dataclass(frozen=True)
class Kept:
    """A finding as docs/findings has it.

    Attributes:
        name: of the study.
        sentence, settings, data, version: of the finding.
        left_out: names of the data's entries that are raw records.
        stale: whether the package's version or a source has changed since its oldest number was measured.
    """

    name: str
    sentence: str
    settings: dict[str, Any]
    data: dict[str, Any]
    version: str
    left_out: list[str]
    stale: bool

    @property
    def scale(self) -> str:
        """The scale that has these settings, in words."""
        return scale_of(self.name, self.settings)


def scale_of(name: str, settings: Mapping[str, Any]) -> str:
    """The scale of a study that has exactly these settings, those of None left out; ``own settings``: none has."""
    study = STUDIES[name]
    module = importlib.import_module(f"scalelong_fast.analysis.{study.module}")
    for scale, own in module.SCALES.items():
        if _given(json_ready({**dataclasses.asdict(own), **study.added})) == _given(settings):
            return scale
    return "own settings"


def _given(settings: Any) -> Any:
    """Settings without those of None: an option that is added later, and not given, is no difference."""
    if not isinstance(settings, Mapping):
        return settings
    return {key: _given(value) for key, value in settings.items() if value is not None}


def read_kept(name: str, folder: Path = FINDINGS, root: Path = ROOT) -> Kept | None:
    """The kept finding of a study; None where there is none.

    Raises:
        UserError: the file is no finding.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        now = source_hash(found["sources"], root)
        stale = bool(found["late"]) or found["version"] != __version__ or now != found["source_sha256"]
        fields = ("sentence", "settings", "data", "version", "left_out")
        return Kept(name, **{field: found[field] for field in fields}, stale=stale)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path.parent.name}/{path.name}: not a finding that was taken ({type(error).__name__}: {error}). Take it "
            "again: python -m benchmarks reproduction --take DIR."
        ) from error


def take(folder: Path, findings: Path = FINDINGS, pictures: Path = PICTURES, root: Path = ROOT) -> list[str]:
    """Copy the findings and pictures that ``scalelong-fast analyze`` wrote, as small as the page needs them.

    Args:
        folder: the ``--out`` of the analyses.
        findings, pictures: where to.
        root: the repository, whose code the findings are taken to come from.

    Returns:
        A line for each file that is worth one. A finding of which a source was written after its oldest number was
        measured is marked as stale.

    Raises:
        UserError: the folder holds no finding of :data:`SCALE`, or a broken one, or one without its picture; nothing is
            taken then.
    """
    said, taken = [], []
    for path in sorted(folder.glob("*.json")):
        if path.stem not in STUDIES:
            said.append(f"{path.name}: the page shows no such finding; left where it is.")
            continue
        sources = STUDIES[path.stem].sources
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            scale, measured = scale_of(path.stem, found["settings"]), datetime.fromisoformat(found["measured"])
            left_out = [key for key in found["data"] if key in RAW]
            found["data"] = {key: value for key, value in found["data"].items() if key not in RAW}
            picture = _small(path.with_suffix(".png").read_bytes())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{path}: not a finding with its picture ({type(error).__name__}: {error}). Run "
                f"{STUDIES[path.stem].command} --out {folder} again."
            ) from error
        if scale != SCALE:
            said.append(f"{path.name}: {scale}, and the page shows --scale {SCALE} alone; left where it is.")
            continue
        late = [name for name in sources if (root / name).stat().st_mtime > measured.timestamp()]
        found |= {"left_out": left_out, "sources": sources, "source_sha256": source_hash(sources, root), "late": late}
        taken.append((path.stem, found, picture))
        note = f" Stale: measured before the last change of {', '.join(late)}." if late else ""
        said.append(f"{path.name}: taken.{note}")
    if not taken:
        raise UserError(
            f"--take: {folder} holds no finding of scalelong-fast analyze --scale {SCALE}. Run the analyses into it."
        )
    for target in (findings, pictures):
        target.mkdir(parents=True, exist_ok=True)
    for name, found, picture in taken:
        write_json(findings / f"{name}.json", found)
        write_atomically(pictures / f"{name}.png", lambda file, picture=picture: file.write(picture))
    return said


def _small(picture: bytes) -> bytes:
    """A PNG of at most :data:`LARGEST_PICTURE` bytes, by a palette where it needs one."""
    if len(picture) <= LARGEST_PICTURE:
        return picture
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(128).save(out, format="png", optimize=True)
    if len(out.getvalue()) > LARGEST_PICTURE:
        raise ValueError(f"a picture of {len(out.getvalue())} bytes")
    return out.getvalue()
