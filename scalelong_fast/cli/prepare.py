"""``scalelong-fast prepare NAME OUT``."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from scalelong_fast.cli.parse import parse
from scalelong_fast.data.packed import Manifest, verify
from scalelong_fast.data.packed.format import MANIFEST, read_manifest
from scalelong_fast.data.prepare import RECIPES, PrepareOptions, Request, prepare
from scalelong_fast.errors import UserError, invalid, unknown_name
from scalelong_fast.training.hardware import resolve_device

USAGE = """usage: scalelong-fast prepare NAME OUT [--source SOURCE] [options]

Pack a data set into memory-mapped shards, to train on with --data.name packed --data.path OUT. The same command run
again goes on where it was interrupted.

data sets:
{recipes}

SOURCE is a folder of images (subfolders are classes), a .zip or .tar archive, a folder written by
datasets.Dataset.save_to_disk or of parquet files, or OWNER/NAME on the Hugging Face hub.

examples:
  scalelong-fast prepare cifar10 data/cifar10
  scalelong-fast prepare imagenet64 data/imagenet64 --source ILSVRC2012_img_train.tar
  scalelong-fast prepare coco256 data/coco256 --source train2014.zip --captions captions_train2014.json
  scalelong-fast prepare folder data/cats --source ~/cats --size 64 --limit 100
  scalelong-fast prepare imagenet64 data/imagenet64 --verify       reads a finished set back, byte by byte

All options: scalelong-fast prepare NAME OUT --help
"""


def usage() -> str:
    """The help of the command without a data set."""
    width = max(map(len, RECIPES))
    return USAGE.format(recipes="\n".join(f"  {r.name:<{width}}  {r.description}" for r in RECIPES.values()))


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    name, *rest = args
    if name.startswith("-"):
        raise UserError(f"NAME: got {name!r}, expected the data set's name first. Known: {', '.join(RECIPES)}.")
    if name not in RECIPES:
        raise unknown_name("NAME", name, RECIPES)
    asks_help = bool(rest) and rest[0] in ("-h", "--help")
    if not asks_help and (not rest or rest[0].startswith("-")):
        raise UserError(f"OUT: got {rest[0] if rest else None!r}, expected a folder, e.g. data/{name}, after the name.")
    out = Path(name if asks_help else rest[0]).expanduser()
    options = rest if asks_help else rest[1:]
    description = RECIPES[name].description
    arguments = parse(PrepareOptions, options, f"scalelong-fast prepare {name} OUT", description=description)
    console = Console(width=120)
    if arguments.verify and arguments.source is None and (out / MANIFEST).is_file():
        check(out, name)
        console.print(f"{out}: every file is as it was written.", highlight=False, soft_wrap=True)
        return 0
    device = resolve_device(arguments.device, "--device")
    manifest = prepare(Request(RECIPES[name], out, device, arguments), progress=True)
    if manifest.skipped:
        console.print(left_out(manifest.skipped), style="yellow", highlight=False, soft_wrap=True, markup=False)
    console.print(summary(out, manifest), highlight=False, soft_wrap=True, markup=False)
    return 0


def check(out: Path, name: str) -> None:
    """Read a finished set back.

    Raises:
        UserError: it is another data set, or files are damaged; they are named.
    """
    found = read_manifest(out, "OUT").plan.name
    if found != name:
        raise invalid("NAME", name, f"{found}, which {out} holds", "Nothing was read.")
    faults = verify(out, progress=True)
    if faults:
        listed = "; ".join(f"{out / name} {fault}" for name, fault in list(faults.items())[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(
            f"OUT: {listed}{more}. Run the command that prepared the set again, with its --source and --verify: it "
            "makes the damaged shards again and leaves the others as they are."
        )


def left_out(names: Sequence[str]) -> str:
    """One line on the images that are not in a set."""
    listed = ", ".join([*names[:10], *["…"] * (len(names) > 10)])
    return f"Left out, since they cannot be read: {len(names)} images ({listed}). The manifest names them all."


def summary(out: Path, manifest: Manifest) -> str:
    """One line on a finished set."""
    plan = manifest.plan
    size = sum(record.bytes for record in manifest.files) / 2**30
    kind = "latents" if "moments" in plan.fields else "images"
    shape = "×".join(map(str, plan.fields["moments" if "moments" in plan.fields else "images"].shape))
    classes = f", {len(plan.class_names)} classes" if plan.class_names else ""
    return (
        f"{out}: {manifest.count} {kind} of {shape}{classes}, {size:.2f} GiB in {len(manifest.shards)} shards. Train "
        f"on it with --data.name packed --data.path {out}"
    )
