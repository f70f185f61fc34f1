"""Snapshots of the averages of a run (post-hoc EMA) as files, and sums of them."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scalelong_fast.errors import UserError
from scalelong_fast.training.files import write_atomically
from scalelong_fast.training.posthoc_profiles import Profile
from scalelong_fast.version import __version__

_NAME = re.compile(r"^step_(\d{9})_sigma_([0-9][0-9.e-]*)\.safetensors$")

#: Key of what is told about a snapshot in its file: one alone, since safetensors has no order for several.
_FACTS = "scalelong_fast"


class Snapshots:
    """``step_<nine digits>_sigma_<σ_rel>.safetensors`` in one folder: full float32 averages by parameter name.

    Float32, since a reconstruction adds and subtracts snapshots and so magnifies what rounding took away.
    """

    def __init__(self, path: Path):
        self.path = path

    def profiles(self) -> list[Profile]:
        """What there is a file of, in order of (step, σ_rel)."""
        if not self.path.is_dir():
            return []
        matches = [match for entry in self.path.iterdir() if (match := _NAME.match(entry.name))]
        return sorted(Profile(int(match[1]), float(match[2])) for match in matches)

    def file(self, profile: Profile) -> Path:
        """Where the snapshot of ``profile`` lies."""
        return self.path / f"step_{profile.step:09d}_sigma_{profile.sigma}.safetensors"

    def save(self, profile: Profile, average: Mapping[str, Tensor]) -> None:
        """Write one snapshot; the file has its name only once it is complete and on disk.

        Args:
            average: full (not sharded) parameters on any device.

        Raises:
            OSError: full disk, or a folder that cannot be written.
        """
        from safetensors.torch import save

        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in average.items()}
        facts = {"step": profile.step, "sigma_rel": profile.sigma, "version": __version__, "sha256": _digest(tensors)}
        path, content = self.file(profile), save(tensors, metadata={_FACTS: json.dumps(facts)})
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Not by safetensors itself, which lets nobody but the owner read its files.
            write_atomically(path, lambda file: file.write(content))
        except OSError as error:
            raise OSError(f"could not write {path}: {error}") from error

    def load(self, profile: Profile) -> dict[str, Tensor]:
        """Read and verify one snapshot: float32 tensors on the CPU by parameter name.

        Raises:
            UserError: missing, torn or altered.
        """
        from safetensors import safe_open

        path = self.file(profile)
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            if facts.get("sha256") != _digest(tensors):
                raise ValueError("its content does not match its checksum")
        except Exception as error:  # safetensors has an error type of its own
            reason = " ".join(str(error).split())
            raise UserError(
                f"RUN: the snapshot {path} cannot be read ({type(error).__name__}: {reason}). Restore it from a "
                "backup, or move it away to do without it."
            ) from error
        return tensors

    def combine(
        self,
        profiles: Sequence[Profile],
        weights: np.ndarray,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Tensor]:
        """Σ weight · snapshot, added up in float64, one file at a time.

        Args:
            profiles: the snapshots.
            weights: one per profile; those below 1e-9 are left out, float32 would not show them.
            progress: called with (files done, files in all).

        Returns:
            float32 tensors on the CPU by parameter name.

        Raises:
            UserError: a snapshot that cannot be read, or of other parameters than the first.
        """
        used = [(p, float(w)) for p, w in zip(profiles, weights, strict=True) if abs(w) >= 1e-9]
        total: dict[str, Tensor] = {}
        for done, (profile, weight) in enumerate(used):
            tensors = self.load(profile)
            if not total:
                total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
            if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in total.items()}:
                raise UserError(
                    f"RUN: {self.file(profile)} holds other parameters than {self.file(used[0][0])}. Move the "
                    "snapshots of the other model away."
                )
            for name, tensor in tensors.items():
                total[name].add_(tensor.double(), alpha=weight)
            if progress is not None:
                progress(done + 1, len(used))
        return {name: tensor.float() for name, tensor in total.items()}

    def set_aside(self) -> Path | None:
        """Rename the folder, for a run that begins anew beside snapshots of an earlier one; they cannot be had again.

        Returns:
            Its new name; None if there are no snapshots.
        """
        if not self.profiles():
            return None
        numbers = itertools.count(1)
        aside = next(path for n in numbers if not (path := self.path.with_name(f"{self.path.name}-{n}")).exists())
        self.path.rename(aside)
        return aside

    def discard_after(self, step: int) -> None:
        """Remove snapshots of steps beyond ``step``, from which the run goes on: it writes them anew."""
        for profile in self.profiles():
            if profile.step > step:
                self.file(profile).unlink()
        if self.path.is_dir():
            for leftover in self.path.glob(".step_*.tmp"):
                leftover.unlink()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and contents."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name}{tuple(tensors[name].shape)};".encode())
        sha.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()
