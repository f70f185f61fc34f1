"""Publish the model of a run on the Hugging Face Hub."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalelong_fast.data.optional import import_optional
from scalelong_fast.errors import UserError, invalid
from scalelong_fast.evaluation.extractors import weights_fingerprint
from scalelong_fast.evaluation.results import read_results
from scalelong_fast.integrations.model_card import model_card
from scalelong_fast.models import UNet, UViT
from scalelong_fast.training.checkpoint import CheckpointFolder
from scalelong_fast.training.config import RunConfig, to_dict
from scalelong_fast.training.files import write_atomically, write_json
from scalelong_fast.training.metrics import read_metrics
from scalelong_fast.training.run import RunFolder

#: All that a published folder holds.
FILES = ("README.md", "config.json", "model.safetensors", "run.json", "metrics.jsonl", "samples.png", "loss.png")


@dataclass(frozen=True)
class Release:
    """What is published of a run.

    Attributes:
        folder: the run's.
        model: its average, in eval mode on the CPU.
        config, facts: as ``config.json`` has them.
        step: at which the average was taken; None where another one is published, whose step nobody stored.
        results: its evaluations of exactly these weights.
    """

    folder: RunFolder
    model: UViT | UNet
    config: RunConfig
    facts: dict[str, Any]
    step: int | None
    results: list[dict[str, Any]]

    @classmethod
    def of_run(cls, run: str | Path, model: Path | None = None) -> "Release":
        """Read a run.

        Args:
            run: its folder.
            model: folder of another average of it, as ``scalelong-fast ema`` writes it.

        Raises:
            UserError: no run there, or no readable model in it.
        """
        folder = RunFolder(run)
        config, facts = folder.read_config()
        average = folder.load_ema("cpu", model)
        steps = CheckpointFolder(folder.checkpoints).steps() if folder.checkpoints.is_dir() else []
        own = weights_fingerprint(average)
        results = [
            result
            for result in read_results(folder.path / "evaluation.json")
            if (result.get("sampling") or {}).get("weights") == own
        ]
        return cls(folder, average, config, facts, steps[-1] if steps and model is None else None, results)

    def write(self, out: Path, repo_id: str, license: str = "apache-2.0") -> None:
        """Write the folder that is published: weights, configs, metrics, pictures, model card.

        Paths of this machine are left out. Files of the same names are replaced, each atomically.

        Raises:
            UserError: the folder holds other things, or cannot be written.
        """
        others = sorted({entry.name for entry in out.iterdir()} - set(FILES)) if out.is_dir() else []
        if others:
            raise invalid("--out", str(out), "a new folder, or one of an earlier push", f"It also holds {others[0]}.")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.save_model(self.model, out.resolve())
            run = to_dict(self.config)
            run["data"]["path"] = None  # somebody's own folder
            write_json(out / "run.json", {**run, **self.facts})
            rows = read_metrics(self.folder.metrics_file)
            _write(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
            for source in (self.folder.sample_grid, self.folder.loss_curve):
                if source.is_file():
                    _write(out / source.name, source.read_bytes())
            grid = self.folder.sample_grid
            card = model_card(
                self.model,
                self.config,
                repo_id,
                facts=self.facts,
                step=self.step,
                loss=rows[-1]["loss"] if rows else None,
                results=self.results,
                picture=grid.name if grid.is_file() else None,
                license=license,
            )
            _write(out / "README.md", str(card).encode())
        except OSError as error:
            raise UserError(f"--out: cannot write {out} ({error}). Free some space or choose another place.") from error


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def check_repo_id(repo_id: str) -> None:
    """Raise unless the Hub would take this name.

    Raises:
        UserError: it would not.
    """
    hub = import_optional("huggingface_hub")
    try:
        hub.utils.validate_repo_id(repo_id)
    except hub.errors.HFValidationError as error:
        raise invalid("REPO_ID", repo_id, "USER/NAME or NAME", " ".join(str(error).split())) from error


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    model: Path | None = None,
    license: str = "apache-2.0",
    token: str | None = None,
) -> str:
    """Upload a run's model with its card, in one commit; the repository is created where it does not exist.

    Args:
        run: folder of the run.
        repo_id: ``USER/NAME``, or ``NAME`` among one's own.
        private: nobody else may see the repository.
        model: folder of another average of the run, as ``scalelong-fast ema`` writes it; default: ``RUN/ema``.
        license: identifier of the weights' licence.
        token: of the Hub; default: ``HF_TOKEN``, or that of ``hf auth login``.

    Returns:
        Address of the repository.

    Raises:
        UserError: no such run or model, a bad name, no token, no network, or what the Hub refused.
    """
    hub = import_optional("huggingface_hub")
    check_repo_id(repo_id)
    release = Release.of_run(run, model)
    token = token or hub.get_token()
    if token is None:
        raise UserError("token: there is none for the Hugging Face Hub. Log in with hf auth login, or set HF_TOKEN.")
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        release.write(folder, repo_id, license)  # what cannot be written is found before anything is created
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(url.repo_id).private:
                raise invalid(
                    "--private", url.repo_id, "a new or a private repository", "This one exists and is public."
                )
            if url.repo_id != repo_id:
                release.write(folder, url.repo_id, license)
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Add model and card")
        except UserError:
            raise
        except Exception as error:  # of the Hub, or of requests or httpx, which have no type in common
            reason = " ".join(str(error).split())
            raise UserError(
                f"REPO_ID: {repo_id} could not be pushed ({type(error).__name__}: {reason[:300]}). See to the network "
                "and the token's rights and push again; what was there before is unchanged."
            ) from error
    return str(url)
