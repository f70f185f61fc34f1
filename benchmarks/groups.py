"""``python -m benchmarks groups``: the tables and the picture of docs/groupnorm-and-kappa.md.

The page is about a fact of UNets: a GroupNorm group made of skip channels alone does not see a constant κ.
"""

import argparse
import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.environment import ROOT
from benchmarks.report import markdown
from benchmarks.unet_skips import DecoderSkip, decoder_skips, group_split, unet_config
from scalelong_fast.errors import UserError

PAGE = ROOT / "docs" / "groupnorm-and-kappa.md"
PICTURE = ROOT / "docs" / "images" / "groupnorm-and-kappa.png"

PRESETS = ("unet_cifar10", "unet_imagenet64")
#: Bases of CS, κ_i = κ^(i−1), among the paper's good values.
BASES = (0.5, 0.7, 0.9)
EPS = 1e-5
#: Long skips of either preset.
SKIPS = 12


def amplitude(kappa: float, sigma: float = 1.0, eps: float = EPS) -> float:
    """Standard deviation of a normalised group that is κ ⊙ skip alone: 1 but for ``eps``.

    Args:
        kappa: the constant κ > 0.
        sigma: standard deviation of the skip in the group.
        eps: of the norm.
    """
    return kappa * sigma / math.sqrt((kappa * sigma) ** 2 + eps)


def straddling_amplitude(kappa: float, share: float, eps: float = EPS) -> float:
    """The same of the skip's channels in a group that they share with x; both of variance 1 and mean 0.

    Args:
        kappa: the constant κ > 0.
        share: of the group's channels that are the skip's, in (0, 1].
        eps: of the norm.
    """
    return kappa / math.sqrt(1 - share + share * kappa**2 + eps)


def _ranges(skips: Sequence[DecoderSkip]) -> str:
    first, last = skips[0].i, skips[-1].i
    return str(first) if first == last else f"{first} – {last}"


def groups_table() -> list[str]:
    """Markdown: how the groups of the decoders' first norms lie, skips that are alike in one row."""
    rows = []
    for preset in PRESETS:
        config = unet_config(preset)
        for (channels_x, channels_skip), alike in itertools.groupby(
            decoder_skips(config), lambda skip: (skip.channels_x, skip.channels_skip)
        ):
            split = group_split(config.num_groups, channels_x, channels_skip)
            size = (channels_x + channels_skip) // config.num_groups
            seeing = channels_skip - split.of_skip * size
            rows.append(
                [
                    f"`{preset}`",
                    _ranges(list(alike)),
                    f"{channels_x} + {channels_skip}",
                    str(size),
                    f"{split.of_x} · {split.straddling} · {split.of_skip}",
                    f"{seeing} of {channels_skip}",
                ]
            )
    headings = ["model", "long skips i", "channels x + skip", "channels of a group"]
    return markdown([*headings, "groups: x · both · skip", "skip channels whose norm sees κ"], rows)


def eps_table() -> list[str]:
    """Markdown: when eps ends the invariance, for CS."""
    rows = []
    for base in BASES:
        innermost = base ** (SKIPS - 1)
        # κ^(i−1) σ < √eps, for σ = 1.
        first = math.floor(math.log(math.sqrt(EPS)) / math.log(base)) + 2
        rows.append(
            [
                f"{base:g}",
                f"{innermost:.2g}",
                *(f"{amplitude(innermost, sigma):.3f}" for sigma in (1.0, 0.1)),
                str(first) if first <= SKIPS else f"{first} (none has so many skips)",
            ]
        )
    headings = ["κ of CS", f"κ_{SKIPS} = κ^{SKIPS - 1}", "what is left at σ = 1", "at σ = 0.1"]
    return markdown([*headings, "κ_i < √eps from i ="], rows)


#: Tables by the name of their marker.
TABLES: dict[str, Callable[[], list[str]]] = {"groups": groups_table, "eps": eps_table}


def updated(text: str) -> str:
    """``text`` with what stands between each pair of markers replaced.

    Raises:
        UserError: a marker is missing.
    """
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise UserError(f"{PAGE.name}: the markers <!-- {name} --> and <!-- /{name} --> are missing. Put them in.")
        lines = "\n".join(table())
        text = pattern.sub(lambda match, lines=lines: f"{match[1]}{lines}\n{match[2]}", text)
    return text


def measured_amplitude(kappa: float, channels_x: int, channels_skip: int) -> float:
    """Standard deviation of the skip's channels after PyTorch's GroupNorm of one group, random features."""
    generator = torch.Generator().manual_seed(0)
    x, skip = (torch.randn(4, count, 32, 32, generator=generator) for count in (channels_x, channels_skip))
    out = F.group_norm(torch.cat([x, kappa * skip], dim=1), 1, eps=EPS)
    return out[:, channels_x:].flatten(1).std(dim=1).mean().item()


def draw(path: Path) -> None:
    """Draw what is left of a skip behind the norm: as a function of κ, and for the κ_i of CS.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("matplotlib is not installed, and draws the picture. pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    kappas = [10 ** (-k / 20) for k in range(81)]
    straddling = next(
        (skip.channels_x % size, size)
        for skip in decoder_skips(unet_config("unet_cifar10"))
        if skip.channels_x % (size := (skip.channels_x + skip.channels_skip) // 32)
    )
    of_x, size = straddling
    points = kappas[::8]
    curves = (
        ("group of the skip alone", "#2a6fbb", amplitude, (0, size)),
        (
            f"group of {of_x} channels of x, {size - of_x} of the skip",
            "#c8a24a",
            lambda kappa: straddling_amplitude(kappa, 1 - of_x / size),
            (of_x, size - of_x),
        ),
    )
    for label, colour, curve, channels in curves:
        left.plot(kappas, [curve(kappa) for kappa in kappas], color=colour, label=label)
        left.plot(points, [measured_amplitude(kappa, *channels) for kappa in points], "o", color=colour, markersize=4)
    left.plot(kappas, kappas, color="#9e9e9e", label="1×1 shortcut")
    left.axvline(math.sqrt(EPS), color="black", linewidth=0.6, linestyle=":")
    left.text(math.sqrt(EPS), 0.88, " κσ = √eps", fontsize=8)
    left.set_xscale("log")
    left.invert_xaxis()
    left.set_xlabel("constant κ, skip of variance 1")
    left.set_ylabel("standard deviation of the skip's channels")
    left.legend(fontsize=8, loc="upper center")
    for base, marker in zip(BASES, "osd", strict=True):
        values = [measured_amplitude(base ** (i - 1), 0, size) for i in range(1, SKIPS + 1)]
        right.plot(range(1, SKIPS + 1), values, marker=marker, markersize=4, label=f"CS, κ = {base:g}")
    right.set_xlabel("long skip i, group of the skip alone")
    right.legend(fontsize=8, loc="lower left")
    right.set_ylim(0, 1.45)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(args: Sequence[str], *, page: Path = PAGE, picture: Path = PICTURE) -> int:
    """Run the command; returns the exit code. The keywords point it at other files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks groups",
        description="Rewrite the tables of docs/groupnorm-and-kappa.md from the models' presets, and draw its picture.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the tables would change")
    options = parser.parse_args(args)
    old = page.read_text(encoding="utf-8")
    new = updated(old)
    if options.check:
        print(f"{page.name} is in sync." if new == old else f"{page.name} is out of date: python -m benchmarks groups")
        return int(new != old)
    if new != old:
        page.write_text(new, encoding="utf-8")
    draw(picture)
    print(f"{page.name} and {picture.name} written.")
    return 0
