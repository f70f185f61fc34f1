"""The run folder: what lies where, and how to get the trained model back out of it."""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.models import MODELS, UNet, UViT
from scalelong_fast.training.config import RunConfig, from_dict, to_dict
from scalelong_fast.training.files import fsync_directory, fsync_file, write_json

SECTIONS = ("model", "data", "diffusion", "train", "sample")


class RunFolder:
    """Paths of a run.

    ``config.json`` the config used · ``metrics.jsonl`` one object per logged step · ``loss.png`` · ``samples.png`` ·
    ``checkpoints/`` · ``ema/`` the averaged model, for ``from_pretrained`` · ``posthoc/`` snapshots of
    averages, for ``scalelong-fast ema`` · ``tensorboard/``
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.loss_curve = self.path / "loss.png"
        self.sample_grid = self.path / "samples.png"
        self.checkpoints = self.path / "checkpoints"
        self.ema = self.path / "ema"
        self.posthoc = self.path / "posthoc"
        self.profile = self.path / "profile"
        self.requeue = self.path / "REQUEUE"
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
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"out: cannot write to {self.path}, since there is a file of that name or of one above it. Move it "
                "away or choose another --out."
            ) from error
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
        self.save_model(model, self.ema)

    @staticmethod
    def staging(folder: Path) -> Path:
        """Where the files of a model are written that then get their names in ``folder``."""
        return folder.with_name(f".{folder.name}.tmp")

    @staticmethod
    def save_model(model: UViT | UNet, folder: Path) -> None:
        """Write a model into ``folder`` for ``from_pretrained``; each file is replaced atomically."""
        staging = RunFolder.staging(folder)
        try:
            model.save_pretrained(staging)
        except OSError:
            raise
        except Exception as error:  # safetensors has an error type of its own for a full disk
            raise OSError(f"could not write {staging}: {error}") from error
        folder.mkdir(exist_ok=True)
        files = list(staging.iterdir())  # in any order, as the file system likes
        for file in files:
            shutil.copymode(staging / "config.json", file)  # safetensors lets nobody but the owner read
            fsync_file(file)
        for file in files:
            os.replace(file, folder / file.name)
        fsync_directory(folder)
        staging.rmdir()

    def load_ema(self, device: torch.device | str = "cpu", folder: Path | None = None) -> UViT | UNet:
        """The averaged model, in eval mode.

        Args:
            device: where to.
            folder: another average of the run, as ``scalelong-fast ema`` writes it; default: ``ema/``.

        Raises:
            UserError: there is none, it is damaged, or the folder's is not of the run's config.
        """
        if folder is not None:
            return self._load_other(folder, device)
        if not (self.ema / "model.safetensors").is_file():
            raise UserError(f"RUN: {self.path} has no trained model yet (no {self.ema}). Let it reach a checkpoint.")
        try:
            return self._load_model(self.ema, device)
        except UserError:
            raise
        except Exception as error:  # safetensors, JSON and shape errors have no common type
            reason = " ".join(str(error).split())
            raise UserError(
                f"RUN: the model in {self.ema} cannot be read ({type(error).__name__}: {reason}). Run the training "
                "command again: it writes the folder anew from the last checkpoint."
            ) from error

    def _load_other(self, folder: Path, device: torch.device | str) -> UViT | UNet:
        if not (folder / "model.safetensors").is_file():
            raise invalid(
                "--model",
                str(folder),
                "a folder with a model.safetensors in it",
                f"scalelong-fast ema {self.path} --sigma-rel 0.1 writes one, if the run followed --train.ema-profiles.",
            )
        try:
            model = self._load_model(folder, device)
        except UserError:
            raise
        except Exception as error:  # as in load_ema
            reason = " ".join(str(error).split())
            raise UserError(f"--model: {folder} cannot be read ({type(error).__name__}: {reason}).") from error
        config, _ = self.read_config()
        if model.config != config.model:
            raise UserError(f"--model: the model in {folder} is not of the architecture of the run in {self.path}.")
        return model

    def _load_model(self, folder: Path, device: torch.device | str) -> UViT | UNet:
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints where it loads from
            model = self._class_in(folder).from_pretrained(str(folder), strict=True)
        return model.to(device).eval()

    @staticmethod
    def _class_in(folder: Path) -> type[UViT] | type[UNet]:
        """The class of the model in ``folder``: the one whose config has all the fields that are stored beside it."""
        stored = set(json.loads((folder / "config.json").read_text()))
        for config, model in MODELS.items():
            if stored <= {field.name for field in dataclasses.fields(config)}:
                return model
        return UViT  # whose from_pretrained then says what is wrong
