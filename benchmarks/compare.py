"""``python -m benchmarks compare``: the working tree against an earlier commit, visits of both in turn."""

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.command import add_device, check_names, device_of
from benchmarks.compare_child import Child, ChildError, commit_of, extract, git
from benchmarks.op_cases import cases as op_cases
from benchmarks.screen import Screen
from benchmarks.timing import rotate, summarize
from scalelong_fast.errors import check_range, unknown_name
from scalelong_fast.training.checkpoint import write_json

KINDS = {
    "step": "forward, backward and AdamW of a U-ViT and a UNet",
    "forward": "the networks alone, as samplers call them",
    "ops": "every op, forward and backward",
}
FASTER, SLOWER, SAME, UNKNOWN, BROKEN = "faster", "slower", "no difference", "no comparison", "fails"
#: Fewer ratios have no spread to speak of.
MIN_ROUNDS = 5
#: Seconds that a visit lasts at least, but for the calls that are longer.
VISIT_SECONDS = 0.05
#: Relative difference of the two sides' values above which it is said.
VALUE_TOLERANCE = 2e-2

#: Presets, what a CPU changes in them, and the shape of the images on a GPU and on a CPU.
_MODELS = {
    "uvit_s2": ({"embed_dim": 128, "depth": 4, "num_heads": 4}, (128, 3, 32, 32), (8, 3, 32, 32)),
    "unet_cifar10": ({"model_channels": 32, "num_res_blocks": 1}, (64, 3, 32, 32), (4, 3, 32, 32)),
}
_SCALINGS = ("none", "ls")


def all_cases(device: torch.device) -> dict[str, dict[str, Any]]:
    """What is timed, by name: requests for :class:`~benchmarks.compare_worker.Worker`, of the public interface only."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("step", "forward"):
        for preset, (reduced, on_gpu, on_cpu) in _MODELS.items():
            for scaling in _SCALINGS:
                gpu = device.type == "cuda"
                options = {"scaling": scaling, **({} if gpu else reduced)}
                case = {"kind": kind, "preset": preset, "options": options, "shape": on_gpu if gpu else on_cpu}
                found[f"{kind} {preset}{'' if gpu else ', reduced'}, {scaling}"] = case
    for case in op_cases(device):
        if case.stream is None and not case.raw:
            options = {"channels_last": case.layout == "pixels", "pooled": case.pooled}
            options = {key: value for key, value in options.items() if value}
            request = {"kind": "op", "op": case.op, "shape": case.shape, "dtype": case.dtype_name, "options": options}
            found[f"ops {case}"] = request
    return found


def verdict(ratios: Sequence[float], tolerance: float) -> str:
    """Whether the ratios, new time over old, lie on one side of 1 by more than their spread and the tolerance.

    Args:
        ratios: of the rounds.
        tolerance: a relative difference that nobody minds.
    """
    spread = summarize(ratios)
    if spread.p20 > 1 + tolerance:
        return SLOWER
    return FASTER if spread.p80 < 1 - tolerance else SAME


def compare_case(
    name: str, case: Mapping[str, Any], base: Child, head: Child, *, rounds: int, tolerance: float
) -> dict[str, Any]:
    """Time one case on both sides, visits in turn.

    Returns:
        JSON-ready: ``case``, ``verdict``, ``note``; and, where both sides have it, ``ratio``, the median of the
        rounds' new time over old, its ``ratio_p20`` and ``ratio_p80``, ``base_us`` and ``head_us``.
    """
    sides = {"base": base, "head": head}
    built = {side: child.ask("build", name=name, case=dict(case)) for side, child in sides.items()}
    record: dict[str, Any] = {"case": name, "verdict": None, "note": None}
    if any("error" in answer for answer in built.values()):
        for child in sides.values():
            child.ask("drop", name=name)
        broken = "error" in built["head"] and "error" not in built["base"]
        note = built["head"].get("error") or built["base"]["error"]
        return {**record, "verdict": BROKEN if broken else UNKNOWN, "note": note}
    slowest = max(answer["seconds"] for answer in built.values())
    steps = max(1, math.ceil(VISIT_SECONDS / max(slowest, 1e-6)))
    times = rotate(
        {
            side: lambda child=child: child.ask("visit", name=name, steps=steps)["seconds"]
            for side, child in sides.items()
        },
        rounds=rounds,
    )
    for child in sides.values():
        child.ask("drop", name=name)
    ratios = [new / old for new, old in zip(times["head"], times["base"], strict=True)]
    spread = summarize(ratios)
    values = [answer["value"] for answer in built.values()]
    if not math.isclose(*values, rel_tol=VALUE_TOLERANCE):
        record["note"] = f"computes {values[1]:.6g}, the base {values[0]:.6g}"
    return {
        **record,
        "verdict": verdict(ratios, tolerance),
        "ratio": round(spread.median, 4),
        "ratio_p20": round(spread.p20, 4),
        "ratio_p80": round(spread.p80, 4),
        **{f"{side}_us": round(summarize(times[side]).median * 1e6, 2) for side in sides},
    }


def table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the comparison."""
    rows = []
    for record in records:
        figures = ["–"] * 4
        if "ratio" in record:
            spread = f"{record['ratio_p20']:.3f} – {record['ratio_p80']:.3f}"
            figures = [f"{record['base_us']:.4g}", f"{record['head_us']:.4g}", f"{record['ratio']:.3f}", spread]
        rows.append([record["case"], record["verdict"], *figures, record["note"] or ""])
    return ["case", "verdict", "base µs", "now µs", "now / base", "p20 – p80", "note"], rows


def main(
    args: Sequence[str],
    *,
    root: Path = environment.ROOT,
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Run the command; returns 1 where something is slower or fails. The keywords are for tests."""
    options = _parser().parse_args(args)
    check_range("--rounds", options.rounds, low=MIN_ROUNDS, integer=True)
    check_range("--tolerance", options.tolerance, low=0.0)
    check_names("--only", options.only, KINDS)
    device = device_of(options)
    commit = commit_of(root, "BASE", options.base)
    now = "the working tree"
    chosen = all_cases(device) if chosen is None else chosen
    wanted = {
        name: case
        for name, case in chosen.items()
        if name.split()[0] in (options.only or KINDS) and (options.match or "") in name
    }
    if not wanted:
        raise unknown_name("--match", options.match, chosen)
    screen = Screen(width=None if sys.stdout.isatty() else 160)
    screen.print(f"{now} of {git(root, 'rev-parse', '--short', 'HEAD').strip()} against {commit[:12]}, on {device}")
    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scalelong-compare-")))
        tree = extract(root, commit, folder / "base" / "tree")
        base = stack.enter_context(Child("the base", tree, str(device), folder / "base" / "worker"))
        head = stack.enter_context(Child(now, root, str(device), folder / "head" / "worker"))
        try:
            for child, path in ((base, tree), (head, root)):
                answer = child.ask("hello", root=str(path))
                if "error" in answer:
                    raise ChildError(f"{child.side} cannot be imported: {answer['error']}")
            with screen.progress("compare", len(wanted)) as advance:
                for name, case in wanted.items():
                    records.append(
                        compare_case(name, case, base, head, rounds=options.rounds, tolerance=options.tolerance)
                    )
                    advance()
        except ChildError as error:
            screen.print(f"benchmarks: error: {error}", style="red")
            if not records:
                return 1
            records.append({"case": name, "verdict": BROKEN, "note": str(error)})
    screen.table(f"now / base, {options.rounds} rounds in turn; above 1: slower", *table(records), text_columns=2)
    if options.out is not None:
        where = {"environment": environment.describe(device), "base": commit}
        settings = {"rounds": options.rounds, "tolerance": options.tolerance}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, {**where, "settings": settings, "records": records})
        screen.print(f"Written to {options.out}.")
    worse = [record["case"] for record in records if record["verdict"] in (SLOWER, BROKEN)]
    if worse:
        bad = sorted((r for r in records if r["case"] in worse), key=lambda r: -r.get("ratio", math.inf))
        screen.table(f"{len(worse)} of {len(records)} slower or failing, the worst first", *table(bad), text_columns=2)
    else:
        screen.print("Nothing is slower.")
    return int(bool(worse))


def _parser() -> argparse.ArgumentParser:
    kinds = "; ".join(f"{name}: {text}" for name, text in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description="Time the working tree against an earlier commit: two processes, one for each, whose visits "
        "alternate. Slower and faster mean that the middle of the rounds' ratios lies on one side of 1 by more than "
        "the tolerance. Exit code 1: something is slower, or fails that did not.",
    )
    parser.add_argument("base", metavar="BASE", help="commit, branch or tag to compare with")
    parser.add_argument("--only", action="append", metavar="KIND", help=f"may be repeated (default: all); {kinds}")
    parser.add_argument("--match", metavar="TEXT", help="only cases whose name has this in it")
    parser.add_argument("--rounds", type=int, default=12, help="visits of each side (default: 12)")
    parser.add_argument("--tolerance", type=float, default=0.02, help="difference that is none (default: 0.02)")
    add_device(parser)
    parser.add_argument("--out", type=Path, help="write the figures as JSON, too")
    return parser
