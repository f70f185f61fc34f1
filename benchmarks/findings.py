"""Findings of ``scalelong-fast analyze`` that are kept in docs/findings, without their raw records."""

import dataclasses
import importlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, source_hash
from scalelong_fast.analysis.finding import json_ready
from scalelong_fast.errors import UserError
from scalelong_fast.training.files import write_atomically, write_json
from scalelong_fast.version import __version__

FINDINGS = ROOT / "docs" / "findings"
PICTURES = ROOT / "docs" / "images" / "analysis"

#: An entry of a finding's data that is longer than this as JSON is a raw record, and is left out.
LONGEST_ENTRY = 32 * 1024
#: Bytes of a picture; a larger one gets a palette.
LARGEST_PICTURE = 100 * 1024

_ANALYSIS = "scalelong_fast/analysis"
#: What decides what a trained network gives, whatever is looked at.
_TRAINING = (
    f"{_ANALYSIS}/training.py",
    f"{_ANALYSIS}/statistics.py",
    "scalelong_fast/diffusion/schedule.py",
    "scalelong_fast/models/uvit.py",
    "scalelong_fast/scaling/constant.py",
    "scalelong_fast/scaling/learnable.py",
    "scalelong_fast/training/batches.py",
    "scalelong_fast/training/objective.py",
    "scalelong_fast/training/step.py",
    "scalelong_fast/training/presets/digits.py",
)
#: What decides a loss on a large probe, and a Fréchet distance of samples.
_SAMPLED = (f"{_ANALYSIS}/learning_curve.py", f"{_ANALYSIS}/sample_distance.py", *_TRAINING)
_DRAWN = (f"{_ANALYSIS}/samples.py", "scalelong_fast/data/digits.py", "scalelong_fast/diffusion/schedule.py")
_RECORDS = f"{_ANALYSIS}/oscillation_records.py"
_MATRICES = (f"{_ANALYSIS}/matrix_unet.py", f"{_ANALYSIS}/schedules.py")


@dataclass(frozen=True)
class Study:
    """A finding that the page shows.

    Attributes:
        command: what writes it, at the scale ``digits``.
        module: of ``scalelong_fast.analysis``, with its ``SCALES``.
        others: further files whose code decides its numbers.
    """

    command: str
    module: str
    others: tuple[str, ...]

    @property
    def sources(self) -> list[str]:
        return [f"{_ANALYSIS}/{self.module}.py", *self.others]


#: By name, in the order of the page.
STUDIES = {
    "oscillation": Study("scalelong-fast analyze oscillation", "oscillation", (_RECORDS, *_TRAINING)),
    "oscillation-matrix": Study(
        "scalelong-fast analyze oscillation --preset matrix",
        "oscillation_matrix",
        (f"{_ANALYSIS}/oscillation.py", _RECORDS, f"{_ANALYSIS}/matrix_training.py", *_MATRICES, *_DRAWN),
    ),
    "noise": Study("scalelong-fast analyze noise digits", "noise", _DRAWN),
    "suggest-kappa": Study(
        "scalelong-fast analyze suggest-kappa digits", "noise", (f"{_ANALYSIS}/kappa_range.py", *_DRAWN)
    ),
    "robustness": Study("scalelong-fast analyze robustness", "robustness", (f"{_ANALYSIS}/composition.py", *_TRAINING)),
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
        left_out: names of the data's entries that were too long.
        stale: whether the package's version or the code of a source has changed since it was taken.
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
        module = importlib.import_module(f"scalelong_fast.analysis.{STUDIES[self.name].module}")
        for scale, settings in module.SCALES.items():
            own = json_ready(dataclasses.asdict(settings))
            if all(self.settings.get(key) == value for key, value in own.items()):
                return scale
        return "own settings"


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
        stale = found["version"] != __version__ or source_hash(found["sources"], root) != found["source_sha256"]
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
        A line for each file that is worth one.

    Raises:
        UserError: the folder holds no finding, or a broken one, or one without its picture.
    """
    said = []
    for path in sorted(folder.glob("*.json")):
        if path.stem not in STUDIES:
            said.append(f"{path.name}: the page shows no such finding; left where it is.")
            continue
        sources = STUDIES[path.stem].sources
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            long = [key for key, value in found["data"].items() if len(json.dumps(value)) > LONGEST_ENTRY]
            found["data"] = {key: value for key, value in found["data"].items() if key not in long}
            picture = _small(path.with_suffix(".png").read_bytes())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}: not a finding with its picture ({type(error).__name__}: {error}). Run "
                f"{STUDIES[path.stem].command} --out {folder} again."
            ) from error
        found |= {"left_out": long, "sources": sources, "source_sha256": source_hash(sources, root)}
        for target in (findings, pictures):
            target.mkdir(parents=True, exist_ok=True)
        write_json(findings / path.name, found)
        write_atomically(pictures / f"{path.stem}.png", lambda file, picture=picture: file.write(picture))
        late = [name for name in sources if (root / name).stat().st_mtime > path.stat().st_mtime]
        scale = read_kept(path.stem, findings, root).scale
        note = f" Written before the last change of {', '.join(late)}." if late else ""
        said.append(f"{path.name}: taken, {scale}.{note}")
    if not any(line.startswith(f"{name}.json: taken") for line in said for name in STUDIES):
        raise UserError(f"--take: {folder} holds no finding of scalelong-fast analyze. Run the analyses into it.")
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
