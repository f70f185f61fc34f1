"""The run folder: what lies where, and how to get the trained model back out of it."""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.models import MODELS, UNet, UViT
from scalelong_fast.training.checkpoint import write_json
from scalelong_fast.training.config import RunConfig, from_dict, to_dict

SECTIONS = ("model", "data", "diffusion", "train", "sample")


class RunFolder:
    """Paths of a run.

    ``config.json`` the config used · ``metrics.jsonl`` one object per logged step · ``loss.png`` · ``samples.png`` ·
    ``checkpoints/`` · ``ema/`` the averaged model, for ``from_pretrained`` · ``tensorboard/``
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.loss_curve = self.path / "loss.png"
        self.sample_grid = self.path / "samples.png"
        self.checkpoints = self.path / "checkpoints"
        self.ema = self.path / "ema"
        self.tensorboard = self.path / "tensorboard"
        self._lock: Any = None
        self._created = False

    def open_for_writing(self) -> None:
        """Create the folder, see that it can be written, and claim it for this process.

        Raises:
            UserError: not writable, or another process trains in it.
        """
        try:
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise UserError(
                f"out: cannot write to {self.path} ({error.strerror}). Make it writable or choose another --out."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise UserError(
                f"out: another process is training in {self.path}. Wait for it, or choose another --out."
            ) from error
        except OSError:
            pass  # a file system without locks (some network ones): train without the claim

    def remove_if_untouched(self) -> None:
        """Take the folder away again if there is nothing in it but the claim (the run was refused)."""
        if self._lock is None or any(entry.name != ".lock" for entry in self.path.iterdir()):
            return
        (self.path / ".lock").unlink()
        if self._created:
            self.path.rmdir()

    def close(self) -> None:
        """Give the folder free."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, config: RunConfig, **facts: Any) -> None:
        """Store the config, and facts such as the data's fingerprint beside it."""
        write_json(self.config_file, {**to_dict(config), **facts})

    def read_config(self) -> tuple[RunConfig, dict[str, Any]]:
        """The stored config and the facts beside it.

        Raises:
            UserError: no run there, or a config that cannot be read.
        """
        if not self.config_file.is_file():
            raise invalid(
                "RUN",
                str(self.path),
                "the folder of a training run",
                f"There is no {self.config_file}; train one first.",
            )
        try:
            values = json.loads(self.config_file.read_text())
            if not isinstance(values, dict) or not all(isinstance(values.get(key), dict) for key in SECTIONS):
                raise TypeError("a section is missing")
            sections = {key: values.pop(key) for key in SECTIONS}
            return from_dict(RunConfig, sections), values
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:  # JSON and Unicode errors are ValueErrors
            raise UserError(f"RUN: {self.config_file} cannot be read ({type(error).__name__}: {error}).") from error

    def save_ema(self, model: UViT | UNet) -> None:
        """Write the averaged model; each file is replaced atomically."""
        staging = self.path / ".ema.tmp"
        try:
            model.save_pretrained(staging)
        except OSError:
            raise
        except Exception as error:  # safetensors has an error type of its own for a full disk
            raise OSError(f"could not write {staging}: {error}") from error
        self.ema.mkdir(exist_ok=True)
        for file in staging.iterdir():
            os.replace(file, self.ema / file.name)
        staging.rmdir()

    def load_ema(self, device: torch.device | str = "cpu") -> UViT | UNet:
        """The averaged model, in eval mode.

        Raises:
            UserError: the run has not saved one yet, or it is damaged.
        """
        if not (self.ema / "model.safetensors").is_file():
            raise UserError(f"RUN: {self.path} has no trained model yet (no {self.ema}). Let it reach a checkpoint.")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints where it loads from
                model = self._ema_class().from_pretrained(str(self.ema), strict=True)
            return model.to(device).eval()
        except UserError:
            raise
        except Exception as error:  # safetensors, JSON and shape errors have no common type
            reason = " ".join(str(error).split())
            raise UserError(
                f"RUN: the model in {self.ema} cannot be read ({type(error).__name__}: {reason}). Run the training "
                "command again: it writes the folder anew from the last checkpoint."
            ) from error

    def _ema_class(self) -> type[UViT] | type[UNet]:
        """The class of the averaged model: the one whose config has all the fields that are stored beside it."""
        stored = set(json.loads((self.ema / "config.json").read_text()))
        for config, model in MODELS.items():
            if stored <= {field.name for field in dataclasses.fields(config)}:
                return model
        return UViT  # whose from_pretrained then says what is wrong
