"""The tables of docs/reproduction.md, one for each kind of finding."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.report import markdown


def _band(band: Mapping[str, float], form: str = ".3g") -> str:
    """Mean and half width of a 95 % confidence interval."""
    half = "" if band["count"] < 2 else f" ± {band['high'] - band['mean']:{form}}"
    return f"{band['mean']:{form}}{half}"


def oscillation_table(data: dict[str, Any]) -> list[str]:
    """Oscillation index by series and scaling, and the loss."""
    scalings = list(next(iter(data["bands"].values())))
    sizes = {f"size of {what}": found for what, found in data["size"].items()}
    series = {**data["bands"], **sizes, "loss at the end": data["loss"]}
    rows = [[what, *(_band(found[s]) for s in scalings)] for what, found in series.items()]
    return markdown(["oscillation index, mean ± 95 %", *scalings], rows)


def noise_table(data: dict[str, Any]) -> list[str]:
    """Distribution over all times."""
    places = ("mean", "low", "median", "high", "max")
    labels = {"input": "‖x_t‖² / m", "ratio": "‖ε_t‖² / ‖x_t‖²"}
    rows = [[label, *(f"{data[key][place]:.3f}" for place in places)] for key, label in labels.items()]
    return markdown(["over all times", "mean", "lower bound", "median", "upper bound", "largest"], rows)


def range_table(data: dict[str, Any]) -> list[str]:
    """Both ends of the range of κ."""
    rows = [
        ["mean", f"{data['low_sum']:.3f}", f"{data['low']:.3f}"],
        ["upper bound", f"{data['high_sum']:.3f}", f"{data['high']:.3f}"],
    ]
    return markdown(["‖ε_t‖² / ‖x_t‖²", "Σκ_i²", f"κ of CS, N = {data['num_skips']}"], rows)


def robustness_table(data: dict[str, Any]) -> list[str]:
    """What each level of extra noise does to each scaling's networks: a column a level, from the smallest."""
    labels = {
        "losses": "loss",
        "increase": "rise of the loss",
        "amplification": "‖UNet(x + δ) − UNet(x)‖ / ‖δ‖",
    }
    count = len(next(iter(data["bands"]["losses"].values())))
    rows = [
        [f"{labels[what]}, {scaling}", *(_band(band) for band in bands)]
        for what, by_scaling in data["bands"].items()
        for scaling, bands in by_scaling.items()
    ]
    return markdown(["mean ± 95 %", *(f"c {number} of {count}" for number in range(1, count + 1))], rows)


def kappa_table(data: dict[str, Any]) -> list[str]:
    """κ_i by i, beside the closest CS."""
    base = data["closest_cs"]["kappa"]
    rows = [[str(i), _band(band), f"{base ** (i - 1):.3f}"] for i, band in enumerate(data["bands"], start=1)]
    return markdown(["i (1: outermost)", "κ_i of LS, mean ± 95 %", f"CS, κ = {base:.2f}"], rows)


def bounds_table(data: dict[str, Any]) -> list[str]:
    """Lemma 3.2 by m, then the R² of Theorems 3.1 and 3.3 by N, the least over m."""
    lemma = [
        [str(row["m"])]
        + [f"{row[key]:.3f}" for key in ("expected", "measured")]
        + [f"{row[key]:.2%}" for key in ("relative_error", "standard_error")]
        for row in data["lemma_3_2"]
    ]
    rows = []
    for init in dict.fromkeys(row["init"] for row in data["explained"]):
        for count in dict.fromkeys(row["N"] for row in data["explained"]):
            group = [row for row in data["explained"] if (row["init"], row["N"]) == (init, count)]
            least = [min(row[f"{what}_r2"] for row in group) for what in ("norm", "gradient")]
            rows.append([f"{init}, N = {count}", *(f"{r2:.3f}" for r2 in least)])
    return [
        *markdown(["Lemma 3.2: m", "E‖x_t‖²", "measured", "error", "standard error"], lemma),
        "",
        *markdown(["R² of Σκ_j², all schedules", "Theorem 3.1 (norm)", "Theorem 3.3 (gradient)"], rows),
    ]


def lipschitz_table(data: dict[str, Any]) -> list[str]:
    """Start and end of the training by scaling: means over seeds."""
    columns = ("measured", "paper", "rigorous", "largest_composition")
    rows = []
    for scaling in dict.fromkeys(row["scaling"] for row in data["rows"]):
        own = [row for row in data["rows"] if row["scaling"] == scaling]
        for step in (min(row["step"] for row in own), max(row["step"] for row in own)):
            group = [row for row in own if row["step"] == step]
            means = [sum(row[column] for row in group) / len(group) for column in columns]
            rows.append([f"{scaling}, step {step}", *(f"{mean:.4g}" for mean in means)])
    return markdown(["mean over seeds", "amplification", "the paper's bound", "rigorous bound", "M_0"], rows)


def convergence_table(data: dict[str, Any]) -> list[str]:
    """Steps and seconds to each level."""
    rows = []
    for entry in data["levels"]:
        level = f"{entry['level']:g} × none's last" if entry["relative_to_none"] else f"{entry['level']:g}"
        for scaling, steps in entry["steps"].items():
            cells = []
            for unit in ("steps", "seconds"):
                reached = [value for value in entry[unit][scaling] if value is not None]
                mean = f"{sum(reached) / len(reached):.4g}" if reached else "–"
                cells.append(mean if len(reached) == len(steps) else f"{mean} ({len(reached)} of {len(steps)} seeds)")
            factors = [entry[f"{unit}_over_own"].get(scaling) for unit in ("steps", "seconds")]
            cells += ["–" if factor is None else _band(factor, ".2f") for factor in factors]
            rows.append([f"{entry['measure']}, {level}, {scaling}", *cells])
    headings = ("level, scaling", "steps", "seconds", "none's steps over own", "none's seconds over own")
    return markdown(headings, rows)


def ablation_table(data: dict[str, Any]) -> list[str]:
    """Loss and Fréchet distance of each variant, and in brackets of each seed: one unlike the others is seen."""
    rows = []
    for row in data["rows"]:
        cells = [row["paper"]["value"] if row["paper"] else "–"]
        for measure in ("loss", "distance"):
            each = ", ".join(f"{outcome[measure]:.3g}" for outcome in row["outcomes"] if measure in outcome)
            cells.append(f"{_band(row[measure], '.3g')} ({each})" if row[measure] else "–")
            cells.append(row["differences"].get(measure, {}).get("verdict", "–"))
        lost = sum("loss" not in outcome for outcome in row["outcomes"])
        rows.append([row["label"] + (f" ({lost} of {len(row['outcomes'])} seeds lost)" if lost else ""), *cells])
        rows[-1].append(row["against"] or "–")
    measured = ("loss, mean ± 95 % (seeds)", "difference", "Fréchet distance", "difference")
    headings = ("variant", "the paper", *measured, "against")
    return markdown(headings, rows)


#: By finding; another shows its sentence and picture alone.
TABLES: dict[str, Callable[[dict[str, Any]], Sequence[str]]] = {
    **{f"ablation-{what}": ablation_table for what in ("table-2", "table-3", "table-4", "figure-6", "figure-13")},
    "oscillation": oscillation_table,
    "oscillation-matrix": oscillation_table,
    "noise": noise_table,
    "suggest-kappa": range_table,
    "robustness": robustness_table,
    "kappa": kappa_table,
    "convergence": convergence_table,
    "bounds": bounds_table,
    "lipschitz": lipschitz_table,
}
