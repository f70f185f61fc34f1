"""Figures in the prose of a page: numbers with units that no table was generated for, and where each comes from."""

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import ROOT

_GENERATED = re.compile(r"<!-- benchmark:([\w-]+) -->.*?<!-- /benchmark:\1 -->", re.S)
#: What holds no claim: blocks of code, code in a line, and the targets of links.
_CODE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)\s]*\)|https?://\S+", re.S)
_NUMBER = r"(?<![\w.,])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
_UNITS = (
    "%|[µmn]?s|seconds?|minutes?|hours?|steps/s|images?/s|samples?/s|tokens?/s|[KMGT]i?B(?:/s)?|[MGTP]FLOP(?:s|/s)?"
    "|percent|times|-?fold|faster|slower"
)
_WORDS = (
    r"\b(?:twice|(?:half|quarter|third|two|three|four|five|six|seven|eight|nine|ten)(?: of)?(?: an?| the)? "
    r"(?:seconds?|minutes?|hours?|times?))\b"
)
#: 64×64 and 1×1 are sizes; 2.3× and 2.3 × the time are factors, and so is × 2.3.
_FACTOR = rf"{_NUMBER} ?×(?! ?(?:[\d(]|[A-Z]\b))|(?<![\dA-Z)])(?<![\dA-Z)] )× ?\d(?:[\d.,]*\d)?"
_FIGURE = re.compile(rf"{_NUMBER}[ \u00a0\u202f-]?(?:{_UNITS})(?![\w/])|{_FACTOR}|(?i:{_WORDS})")
#: Of these what a page of docs/ needs a source for: rates, factors and short times. Its percentages, sizes, multiples
#: and waits are limits, defaults and definitions far more often than measurements.
_SPEED = re.compile(
    rf"{_NUMBER}[ \u00a0\u202f-]?(?:[µmn]s|(?:steps|images?|samples?|tokens?|[KMGT]i?B|[MGTP]FLOP)/s|[MGTP]FLOPs"
    rf"|times (?:as|faster|slower)|-?fold|faster|slower)(?![\w/])|{_FACTOR}"
)
#: Sources that are no file: what is aimed at, what the paper says, what a page supposes and says so, what somebody once
#: timed and no file holds.
KINDS = ("goal", "paper", "assumption", "by hand")


@dataclass(frozen=True)
class Claim:
    """A figure that people wrote, and what it rests on.

    Attributes:
        text: the words of the page around the figure, as they are there, figure included; breaks of lines are spaces.
        source: a file of the repository, or one of :data:`KINDS`; after a colon, what of it.
    """

    text: str
    source: str


#: What may stand in the prose of a page, by its name. A measured figure belongs into a generated table instead.
CLAIMS = {
    "README.md": (
        Claim("The goal for this step is 2.3 times the authors' recipe in fp32", "goal: the step against the recipe"),
        Claim("most of what a CPU can on one page, in ten minutes", "benchmarks/cpu.py: --minutes"),
    ),
    "results.md": (),
    "reproduction.md": (
        Claim("The abstract has about 1.5× training acceleration", "paper: abstract"),
        Claim("bounds as stated, and 95 % bands over seeds", "scalelong_fast/analysis/statistics.py: CONFIDENCE"),
        Claim("the 95 % band of the differences seed by seed", "scalelong_fast/analysis/statistics.py: CONFIDENCE"),
    ),
}


#: The same for the speeds on other pages, those of docs/.
SPEED_CLAIMS = {
    "analysis.md": (
        Claim(
            "those of LS oscillate 0.6 times as much in absolute terms as those of none",
            "docs/findings/oscillation.json: bands, absolute features and absolute batch features",
        ),
    ),
    "data.md": (
        Claim("decoding and cropping an ImageNet JPEG takes 5 to 10 ms of a core", "assumption: the page says so"),
        Claim("at 100 images/s on a GPU", "assumption: the page says so"),
        Claim("the share of a step of 5,000 images/s", "benchmarks/loader.py: --rate"),
    ),
}


def prose(text: str) -> str:
    """A page without its generated tables and its code, white space as single spaces."""
    return " ".join(_CODE.sub(" ", _GENERATED.sub(" ", text)).split())


def figures(text: str, speeds: bool = False) -> list[tuple[int, int]]:
    """Where in the :func:`prose` of a page the figures are: numbers with a unit, factors and percentages.

    ``speeds``: rates, factors and times of less than a second alone.
    """
    return [match.span() for match in (_SPEED if speeds else _FIGURE).finditer(text)]


def unsourced(page: str, text: str, claims: tuple[Claim, ...] | None = None, root: Path = ROOT) -> list[str]:
    """What is wrong with the figures of a page.

    Args:
        page: name of the page, a key of :data:`CLAIMS`; of other pages the speeds alone are looked at.
        text: its Markdown.
        claims: what it may say, instead of :data:`CLAIMS`.
        root: the repository.

    Returns:
        A line for each figure outside the generated tables that no claim covers, each claim that the page does not
        make, and each claim whose source is none.
    """
    speeds = claims is None and page not in CLAIMS
    if claims is None:
        claims = CLAIMS.get(page, SPEED_CLAIMS.get(page, ()))
    words = prose(text)
    covered, faults = [], []
    for claim in claims:
        starts = [match.start() for match in re.finditer(re.escape(claim.text), words)]
        covered += [(start, start + len(claim.text)) for start in starts]
        if not starts:
            faults.append(f"{page} no longer says {claim.text!r}: take its claim out of benchmarks/prose.py.")
        kind = claim.source.partition(":")[0]
        if kind not in KINDS and not (root / kind).is_file():
            faults.append(
                f"The claim {claim.text!r} rests on {kind!r}, which is no file here and none of {', '.join(KINDS)}."
            )
    for start, end in figures(words, speeds):
        if not any(first <= start and end <= last for first, last in covered):
            around = words[max(0, start - 40) : end + 40]
            faults.append(
                f"{page}: '{words[start:end]}' in '… {around} …' has no source. Show it in a generated table, or name "
                f"its source in {'SPEED_CLAIMS' if speeds else 'CLAIMS'} of benchmarks/prose.py."
            )
    return faults
