"""What a patch does to a network, site by site."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.adapters import ExampleInputs
from scalelong_fast.integrations.patching.check import check_module
from scalelong_fast.integrations.patching.dry_run import dry_run
from scalelong_fast.integrations.patching.state import ScaleLongState, patched_parts, state_of, unwrapped
from scalelong_fast.scaling.constant import ConstantScaling
from scalelong_fast.scaling.free import FreeScaling


@dataclass(frozen=True)
class SiteReport:
    """One long skip of a patched network.

    Attributes:
        i: index, 1 (outermost) … N (innermost).
        module: qualified name of the module whose input is scaled.
        kind: what the module receives.
        width: channels or tokens of a gate here; None where it is unknown, since no gate needs it.
        shape: of the skip in the last forward that was not compiled; None before there was one.
        layout: ``contiguous``, ``channels_last`` or ``strided``, likewise.
        kappa: κ_i: the constant, the parameter, or a gate's mean over the last forward that was not compiled; None
            before there was one.
        plan: how the skip is scaled.
    """

    i: int
    module: str
    kind: str
    width: int | None
    shape: tuple[int, ...] | None
    layout: str | None
    kappa: float | None
    plan: str


def scalelong_report(
    model: nn.Module, example_inputs: ExampleInputs | None = None, show: bool = True
) -> list[SiteReport]:
    """Print where ``model`` is patched and how, and return it.

    Args:
        model: a patched network; inside a wrapper (DDP, PEFT, an average) it is found.
        example_inputs: forward arguments; where given, the network is run once on them (in eval mode, without a trace
            left), so that shapes and the gates' κ's are theirs.
        show: print the table.

    Returns:
        One entry per long skip, outermost first.

    Raises:
        UserError: the network is not patched, or fails on the inputs.
    """
    check_module(model)
    parts = patched_parts(model)
    if len(parts) == 1:
        model = model.get_submodule(parts[0])
    state = state_of(model)
    if state is None:
        raise UserError(f"model: {type(model).__name__} is not patched. Call apply_scalelong(model) first.")
    if example_inputs is not None:
        dry_run(unwrapped(model), example_inputs)
    sites = [
        SiteReport(
            site.i,
            site.module,
            site.kind,
            site.width,
            site.shapes,
            site.layout,
            last_kappa(state, site.i),
            site.taken or site.plan,
        )
        for site in state.sites
    ]
    if show:
        print_table(model, state, sites)
    return sites


def last_kappa(state: ScaleLongState, i: int) -> float | None:
    """κ_i as a number, see :class:`SiteReport`."""
    if isinstance(state.scaling, ConstantScaling):
        return state.scaling.kappas[i - 1]
    if isinstance(state.scaling, FreeScaling):
        return float(state.scaling.kappas[i - 1].detach())
    kappa: Any = state.last_kappas.get(i)
    return float(kappa.float().mean()) if isinstance(kappa, Tensor) else kappa


def print_table(model: nn.Module, state: ScaleLongState, sites: list[SiteReport]) -> None:
    """The report as a table on the terminal."""
    from scalelong_fast.data.optional import import_optional

    table = import_optional("rich.table").Table(title=f"{type(unwrapped(model)).__name__}: {summary(state)}")
    for column in ("i", "module", "receives", "skip", "layout", "κ", "plan"):
        table.add_column(column, justify="right" if column in ("i", "κ") else "left", overflow="fold")
    for site in sites:
        shape = "–" if site.shape is None else "×".join(map(str, site.shape))
        kappa = "gate" if site.kappa is None else f"{site.kappa:.4g}"
        module = site.module or "(the network)"
        table.add_row(str(site.i), module, site.kind, shape, site.layout or "–", kappa, site.plan)
    import_optional("rich.console").Console(width=100).print(table)


def summary(state: ScaleLongState) -> str:
    """The settings in one line."""
    settings = state.settings
    parts = [f"scaling {settings['scaling']}"]
    parts += [f"{key} {settings[key]}" for key in ("kappa", "init") if settings[key] is not None]
    gates = sum(parameter.numel() for parameter in state.parameters())
    parts += [f"{len(state.sites)} long skips", f"adapter {settings['adapter']}", f"{gates:,} parameters"]
    return ", ".join(parts)
