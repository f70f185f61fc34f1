"""``scalelong-fast push RUN REPO_ID``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from scalelong_fast.cli.parse import parse
from scalelong_fast.errors import UserError, invalid
from scalelong_fast.integrations.hub import Release, check_repo_id, push_to_hub


@dataclasses.dataclass(frozen=True)
class PushArguments:
    """Publish a run's averaged model on the Hugging Face Hub, with a model card made from config and metrics."""

    private: bool = False
    """Nobody else may see the repository."""
    dry_run: bool = False
    """Write the folder here and upload nothing."""
    out: Path | None = None
    """Folder of --dry-run; default: RUN/hub."""
    model: Path | None = None
    """Folder of another average of the run, as scalelong-fast ema writes it; default: RUN/ema."""
    license: str = "apache-2.0"
    """Licence of the weights, as the Hub calls it."""

    def __post_init__(self) -> None:
        if self.out is not None and not self.dry_run:
            raise invalid("--out", str(self.out), "no --out without --dry-run")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise invalid("--out", str(self.out), "a folder", "There is a file of that name.")


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    prog = "scalelong-fast push RUN REPO_ID"
    if not args or args[0] in ("-h", "--help"):
        try:
            parse(PushArguments, ["--help"], prog)
        except SystemExit:
            return 0 if args else 2
    if len(args) < 2 or args[0].startswith("-") or args[1].startswith("-"):
        raise UserError(
            f"RUN REPO_ID: got {' '.join(args)!r}, expected the run folder and the repository first, e.g. "
            "scalelong-fast push runs/digits-uvit USER/digits-uvit."
        )
    run, repo_id, *rest = args
    arguments = parse(PushArguments, rest, prog)
    check_repo_id(repo_id)
    console = Console()
    if arguments.dry_run:
        release = Release.of_run(run, arguments.model)
        out = arguments.out or release.folder.path / "hub"
        release.write(out, repo_id, arguments.license)
        console.print(f"{repo_id} as it would be pushed is in {out}", highlight=False, soft_wrap=True)
        return 0
    url = push_to_hub(run, repo_id, private=arguments.private, model=arguments.model, license=arguments.license)
    console.print(f"Pushed to {url}", highlight=False, soft_wrap=True)
    return 0
