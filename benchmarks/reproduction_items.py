"""What of the paper the findings speak about, and whether they agree with it: read from the numbers, never typed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scalelong_fast.analysis.ablation_report import VERDICTS
from scalelong_fast.analysis.kappa_range import PAPER_RANGE
from scalelong_fast.analysis.learnt_kappa import FAR, Movement
from scalelong_fast.analysis.paired import sign
from scalelong_fast.analysis.statistics import Band

AGREES, PARTLY, DISAGREES = "agrees", "in part", "does not agree"
NOT_SHOWN = "not shown"
NOTHING_TO_COMPARE = "no number of the paper's is known to us"

#: Least R² with which a sum is said to explain a norm.
EXPLAINS = 0.95


@dataclass(frozen=True)
class Verdict:
    """A word on whether we agree with the paper, and the numbers it rests on."""

    word: str
    why: str

    def __str__(self) -> str:
        return f"**{self.word}**: {self.why}"


@dataclass(frozen=True)
class Item:
    """A figure, table or theorem of the paper.

    Attributes:
        label: the paper's name of it.
        subject: what it is about.
        finding: the study that measures it; None: there is none.
        judge: the verdict on the study's data.
        otherwise: what to say where no study measures it.
    """

    label: str
    subject: str
    finding: str | None = None
    judge: Callable[[dict[str, Any]], Verdict] | None = None
    otherwise: str = ""


def against_none(
    series: Mapping[str, Mapping[str, Mapping[str, float]]],
    differences: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> Verdict:
    """Whether CS and LS have less than ``none`` of everything there is.

    Args:
        series: by what it is, 95 % bands over seeds by scaling.
        differences: the same of the differences to ``none`` at equal seeds, which then decide: by bands that leave out
            0. Without them bands of ``series`` decide that do not overlap.
    """
    found, told = [], []
    for what, bands in series.items():
        none, parts = Band(**bands["none"]), []
        for scaling in ("cs", "ls"):
            own = Band(**bands[scaling])
            if differences is not None:
                found.append(sign(Band(**differences[what][scaling])))
            else:
                found.append("bands overlap" if own.overlaps(none) else "less" if own.mean < none.mean else "more")
            parts.append(f"{scaling} {own.mean:.3g} ({found[-1]})")
        told.append(f"{what}: none {none.mean:.3g}, {', '.join(parts)}")
    why = f"{'; '.join(told)}; {none.count} seeds"
    if set(found) == {"less"}:
        return Verdict(AGREES, why)
    if not {"less", "more"} & set(found):
        held = "" if differences is None else ", 95 % bands of the differences at equal seeds hold 0"
        return Verdict(NOT_SHOWN, f"{why}{held}")
    return Verdict(PARTLY if "less" in found else DISAGREES, why)


def _oscillation(data: dict[str, Any], ending: str) -> Verdict:
    return against_none({what: bands for what, bands in data["bands"].items() if what.endswith(ending)})


def judge_features(data: dict[str, Any]) -> Verdict:
    return _oscillation(data, "features")


def judge_gradients(data: dict[str, Any]) -> Verdict:
    return _oscillation(data, "gradients")


def judge_noise(data: dict[str, Any]) -> Verdict:
    norm, ratio = data["input"], data["ratio"]
    return Verdict(
        NOTHING_TO_COMPARE,
        f"‖x_t‖² is {norm['mean']:.2f} m on average, ‖ε_t‖²/‖x_t‖² {ratio['mean']:.2f} ({ratio['high']:.2f} at the "
        "upper bound)",
    )


def judge_range(data: dict[str, Any]) -> Verdict:
    low, high = data["low"], data["high"]
    why = f"κ from {low:.2f} to {high:.2f} against {PAPER_RANGE[0]} to {PAPER_RANGE[1]}"
    if data["overlap_with_paper"] is None:
        return Verdict(DISAGREES, why)
    shared = tuple(data["overlap_with_paper"])
    if shared == (low, high):
        return Verdict(AGREES, f"{why}: inside")
    return Verdict(PARTLY, f"{why}: {shared[0]:.2f} to {shared[1]:.2f} is shared")


def judge_robustness(data: dict[str, Any]) -> Verdict:
    labels = {
        "amplification": "‖UNet(x + δ) − UNet(x)‖/‖δ‖ at the largest δ, against none at equal seeds",
        "increase": "rise of the loss there",
    }
    last = {
        entry: {
            label: {scaling: bands[-1] for scaling, bands in data[entry][what].items()}
            for what, label in labels.items()
        }
        for entry in ("bands", "differences")
    }
    return against_none(last["bands"], last["differences"])


def judge_kappa(data: dict[str, Any]) -> Verdict:
    closest, means = data["closest_cs"], [band["mean"] for band in data["bands"]]
    word = f"{'near' if closest['distance'] <= FAR else 'not near'} a curve of CS"
    why = (
        f"κ_i of LS lie between {min(means):.2f} and {max(means):.2f}; the closest CS, κ = {closest['kappa']:.2f}, is "
        f"{closest['distance']:.2f} away (root mean square)"
    )
    if (kept := data.get("movement")) is None:  # of finished runs, of which the start is not known
        return Verdict(word, why)
    moved = Movement(kept["steps"], Band(**kept["start"]), [Band(**own) for own in kept["moved"]])
    return Verdict("hardly moved from the start" if moved.hardly else word, f"κ {moved.describe()}: {why}")


def judge_lemma(data: dict[str, Any]) -> Verdict:
    worst = max(row["relative_error"] for row in data["lemma_3_2"])
    dimensions = ", ".join(str(row["m"]) for row in data["lemma_3_2"])
    return Verdict(AGREES if worst <= 0.01 else DISAGREES, f"to {worst:.2%} over m = {dimensions}, by Monte Carlo")


def _explained(data: dict[str, Any], what: str) -> Verdict:
    least = {
        init: min(row[f"{what}_r2"] for row in data["explained"] if row["init"] == init)
        for init in ("norm-keeping", "paper")
    }
    held = [r2 >= EXPLAINS for r2 in least.values()]
    word = AGREES if all(held) else PARTLY if any(held) else DISAGREES
    kept, paper = least.values()
    return Verdict(word, f"Σκ_j² explains at least {kept:.0%} where blocks keep the norm, {paper:.0%} under N(0, 2/m)")


def judge_norms(data: dict[str, Any]) -> Verdict:
    return _explained(data, "norm")


def judge_gradient_norms(data: dict[str, Any]) -> Verdict:
    return _explained(data, "gradient")


def judge_convergence(data: dict[str, Any]) -> Verdict:
    """By the steps of ``none`` over a scaling's own, to the strictest level of each measure that all seeds reached.

    Where they missed a stricter one the paper is agreed with in part at best.
    """
    told, found, missed = [], [], False
    for measure in dict.fromkeys(entry["measure"] for entry in data["levels"]):
        levels = sorted((e for e in data["levels"] if e["measure"] == measure), key=lambda entry: entry["level"])
        reached = [e for e in levels if all(e["steps_over_own"][scaling] is not None for scaling in ("cs", "ls"))]
        if not reached:
            told.append(f"{measure}: no level was reached with every seed")
            found.append("not reached")
            continue
        stricter = levels[: levels.index(reached[0])]
        missed = missed or bool(stricter)
        parts = []
        for scaling in ("cs", "ls"):
            factor = Band(**reached[0]["steps_over_own"][scaling])
            shown = factor.count > 1 and not factor.low <= 1 <= factor.high
            found.append(("faster" if factor.low > 1 else "slower") if shown else "no difference")
            parts.append(f"{scaling} {factor.mean:.2f} ({factor.low:.2f} to {factor.high:.2f})")
        lacking = f" ({', '.join(map(_level, stricter))}: not with every seed)" if stricter else ""
        told.append(f"to a {measure} of {_level(reached[0])}{lacking}: {', '.join(parts)}")
    why = f"none's steps over its own: {'; '.join(told)}; the paper says about 1.5"
    if set(found) == {"faster"} and not missed:
        return Verdict(AGREES, why)
    if "faster" in found:
        return Verdict(PARTLY, why)
    return Verdict(DISAGREES if "slower" in found else NOT_SHOWN, why)


def _level(entry: dict[str, Any]) -> str:
    return f"{entry['level']:g}{' times what none has at the end' if entry['relative_to_none'] else ''}"


def judge_ablation(data: dict[str, Any]) -> Verdict:
    """What the Fréchet distance of samples shows, row against row; the paper's numbers stand in the table."""
    found: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for row in data["rows"]:
        if "distance" in row["differences"]:
            verdict = row["differences"]["distance"]["verdict"]
            found[verdict].append(f"{row['label']} (against {row['against']})")
    parts = [f"{word} with {', '.join(rows)}" for word, rows in found.items() if rows and word != NOT_SHOWN]
    parts.append(f"no difference shown in {len(found[NOT_SHOWN])} of {sum(map(len, found.values()))} comparisons")
    if diverged := [row["label"] for row in data["rows"] if any("diverged" in outcome for outcome in row["outcomes"])]:
        parts.append(f"diverged: {', '.join(diverged)}")
    known = any(row["paper"] for row in data["rows"])
    return Verdict("see the table" if known else NOTHING_TO_COMPARE, f"Fréchet distance: {'; '.join(parts)}")


def judge_robust_bound(data: dict[str, Any]) -> Verdict:
    rigorous, paper, checks = len(data["violations"]["rigorous"]), len(data["violations"]["paper"]), len(data["rows"])
    why = f"violated in {paper} of {checks} checks of trained networks (the rigorous one in {rigorous})"
    if rigorous or paper:
        return Verdict(DISAGREES, why)
    nearest = min(row["paper"] / row["measured"] for row in data["rows"])
    # Not more than in part, however well it holds: tests/analysis/test_robust_bound.py has a network that violates it.
    return Verdict(PARTLY, f"{why} and at least {nearest:.0f} times too large; yet a network that violates it exists")


def judge_compositions(data: dict[str, Any]) -> Verdict:
    largest = [row["largest_composition"] for row in data["rows"]]
    return Verdict(NOTHING_TO_COMPARE, f"M_0 between {min(largest):.2f} and {max(largest):.2f} on matrix UNets")


_UNKNOWN = "not measured: what they show is not known to us"
_PRESETS = "not run; presets, see [below](#table-1-fid)"

#: In the order of the paper.
ITEMS = (
    Item("Fig. 1", "features oscillate during training, less with CS and LS", "oscillation", judge_features),
    Item("Fig. 1 on Eq. 3", "the same, on matrix UNets", "oscillation-matrix", judge_features),
    Item("Lemma 3.2", "E‖x_t‖²", "bounds", judge_lemma),
    Item("Theorem 3.1", "norms of features go with Σκ_j²", "bounds", judge_norms),
    Item("Theorem 3.3", "norms of gradients go with Σκ_j²", "bounds", judge_gradient_norms),
    Item("Theorem 3.4", "a bound on what a disturbed input does", "lipschitz", judge_robust_bound),
    Item("Fig. 3a, b", "distributions of ‖x_t‖² and ‖ε_t‖²/‖x_t‖²", "noise", judge_noise),
    Item("Fig. 3c", "CS and LS bear extra input noise better", "robustness", judge_robustness),
    Item("§4.1", "the range of κ of CS", "suggest-kappa", judge_range),
    Item("Fig. 4", "diagram of LS", otherwise="no experiment"),
    Item("Table 1", "FID on CIFAR-10, CelebA, ImageNet 64 and MS-COCO", otherwise=_PRESETS),
    Item("Fig. 5", "CS and LS reach a given quality in fewer steps", "convergence", judge_convergence),
    Item("Fig. 6", "batch size and depth", "ablation-figure-6", judge_ablation),
    Item("Fig. 7", "the κ_i that LS learns", "kappa", judge_kappa),
    Item("Table 2", "reduction, activation and module of LS", "ablation-table-2", judge_ablation),
    Item("Table 3", "scaled block outputs instead of long skips", "ablation-table-3", judge_ablation),
    Item("Table 4", "direction of the scaling", "ablation-table-4", judge_ablation),
    Item("Table 6", "training settings", otherwise="taken over: [presets](presets.md), differences marked"),
    Item("Fig. 11", "M_0 = max ‖b_i ∘ a_i‖ through training", "lipschitz", judge_compositions),
    Item("Fig. 12", "gradients oscillate during training, less with CS and LS", "oscillation", judge_gradients),
    Item("Fig. 12 on Eq. 3", "the same, on matrix UNets", "oscillation-matrix", judge_gradients),
    Item("Fig. 13", "κ > 1", "ablation-figure-13", judge_ablation),
    Item("Table 5, Fig. 2, 8, 9, 10", "not in the sources named above", otherwise=_UNKNOWN),
)
