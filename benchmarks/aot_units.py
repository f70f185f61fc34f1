"""What ``python -m benchmarks aot`` compiles, compiling it, and judging the code."""

import fnmatch
import multiprocessing
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import aot_launches, environment
from benchmarks.aot_cases import CASES, Case, Needs, covered
from benchmarks.compiled_traffic import excess, factors
from benchmarks.gpu_code import TARGETS, Target, describe
from scalelong_fast.errors import UserError
from scalelong_fast.kernels.configs import table, table_names

KERNELS = environment.ROOT / "kernels"

#: Features of these dtypes are multiplied by matrix instructions; fp32 is multiplied in full precision.
_HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Call:
    """A case's call for one target, by numbers: case, shape and dtype. Unlike the case it can be sent to a process."""

    target: str
    case_index: int
    shape_index: int
    dtype_index: int

    @property
    def case(self) -> Case:
        return CASES[self.case_index]

    @property
    def shape(self) -> str:
        return self.case.shapes[self.shape_index].name

    @property
    def dtype(self) -> str:
        return str(self.case.dtypes[self.dtype_index]).removeprefix("torch.")

    def __call__(self) -> None:
        self.case.call(self.case.shapes[self.shape_index], self.case.dtypes[self.dtype_index])

    def record(self) -> aot_launches.Recording:
        """The launches it makes.

        Raises:
            UserError: the host function fails, or launches a kernel that no case is there for.
        """
        try:
            recording = aot_launches.record(TARGETS[self.target], self)
        except Exception as error:
            raise UserError(
                f"benchmarks/aot_cases.py, case {self.case.name!r}, {self.target}, {self.shape}, {self.dtype}: "
                f"the call fails before anything is compiled. {type(error).__name__}: {error}"
            ) from error
        for launch in recording.launches:
            if launch.kernel not in covered():
                raise UserError(
                    f"benchmarks/aot_cases.py: case {self.case.name!r} launches {launch.kernel}, which no case is "
                    "there for. Add it to the `kernels` of one."
                )
        return recording


@dataclass(frozen=True)
class Unit:
    """One kernel to compile.

    Attributes:
        call: what launches it.
        index: which of the call's launches it is.
        launch: the launch.
        shapes: names of all shapes that lead to the same code.
    """

    call: Call
    index: int
    launch: aot_launches.Launch
    shapes: tuple[str, ...]

    @property
    def needs(self) -> Needs:
        return self.call.case.kernels[self.launch.kernel]


def _calls(targets: Sequence[str]) -> Iterator[Call]:
    for target in targets:
        for c, case in enumerate(CASES):
            if target in case.targets:
                for d in range(len(case.dtypes)):
                    for s in range(len(case.shapes)):
                        yield Call(target, c, s, d)


def plan(targets: Sequence[str], patterns: Sequence[str] = ()) -> tuple[list[Unit], set[tuple[str, str, int]]]:
    """What is to be compiled, equal code once, and the lines of the tables that lead to it.

    Args:
        targets: of :data:`~benchmarks.gpu_code.TARGETS`.
        patterns: parts of the names of the wanted cases or kernels, ``*`` and ``?`` are wild; none: all.

    Returns:
        The units and the lines as (architecture, kernel's name in the table, index).

    Raises:
        UserError: a case that does not work.
    """

    def wanted(call: Call, kernel: str) -> bool:
        names = (call.case.name, kernel)
        return not patterns or any(fnmatch.fnmatch(name, f"*{part}*") for name in names for part in patterns)

    units: dict[tuple[str, str], Unit] = {}
    lines: set[tuple[str, str, int]] = set()
    for call in _calls(targets):
        if not any(wanted(call, kernel) for kernel in call.case.kernels):
            continue
        recording = call.record()
        lines |= recording.lines
        for index, launch in enumerate(recording.launches):
            if launch.kernel not in call.case.kernels or not wanted(call, launch.kernel):
                continue
            unit = units.get((call.target, launch.key), Unit(call, index, launch, ()))
            if call.shape not in unit.shapes:
                unit = replace(unit, shapes=(*unit.shapes, call.shape))
            units[call.target, launch.key] = unit
    return list(units.values()), lines


def unused_lines(targets: Sequence[str], lines: set[tuple[str, str, int]]) -> list[str]:
    """Launch configurations in the targets' tables that no case leads to."""
    return [
        f"kernels/tables/{arch}.json: configs[{kernel!r}][{index}]"
        for arch in table_names()
        if arch in targets
        for kernel, entries in table(arch)["configs"].items()
        for index in range(len(entries))
        if (arch, kernel, index) not in lines
    ]


def sources_of(module: str, folder: Path = KERNELS) -> list[str]:
    """Files that the code of a module of kernels/ comes from: itself and what it imports, where those have kernels."""
    found: dict[str, bool] = {}

    def visit(name: str) -> None:
        if name in found:
            return
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        found[name] = "@triton.jit" in text
        for imported in re.findall(r"^\s*from scalelong_fast\.kernels\.(\w+) import", text, re.M):
            visit(imported)

    visit(module)
    return sorted(f"kernels/{name}.py" for name, has_kernels in found.items() if has_kernels)


def compile_unit(unit: Unit) -> dict[str, Any]:
    """Compile one unit.

    Returns:
        Facts of :func:`~benchmarks.gpu_code.describe` and ``factors`` of
        :func:`~benchmarks.compiled_traffic.factors`, or ``error`` where Triton does not compile it.
    """
    target = TARGETS[unit.call.target]
    try:
        kernel = aot_launches.compile_launch(target, unit.call, unit.index)
        # A warp-specialised kernel has more warps than it was launched with; its PTX says so.
        threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", kernel.asm.get("ptx", ""))
        warps = int(threads[1]) // target.warp_size if threads else kernel.metadata.num_warps
        columns = getattr(kernel.metadata, "tmem_size", None) or 0
        facts = describe(target, kernel.asm, kernel.metadata.shared, warps, columns)
        return {**facts, "factors": factors(target, kernel.asm, kernel.metadata.num_warps)}
    except Exception as error:  # whatever the compiler raises belongs into the report
        return {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:600]}


def compile_units(units: Sequence[Unit], jobs: int) -> Iterator[dict[str, Any]]:
    """Facts about the units, in their order, ``jobs`` at a time."""
    if jobs == 1 or len(units) < 2:
        yield from map(compile_unit, units)
        return
    # Spawned: the compiler's and torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_unit, units)


def faults(facts: dict[str, Any], needs: Needs, target: Target, dtype: str) -> list[str]:
    """What is wrong with compiled code; empty where nothing is."""
    if "error" in facts:
        return [facts["error"]]
    found = []
    spills = facts["spill_stores"] + facts["spill_loads"]
    if spills or facts["stack_bytes"]:
        found.append(f"spills: {spills} instructions, {facts['stack_bytes']} bytes of stack")
    if facts["ctas_per_sm"] < 1:
        found.append(f"does not fit: {facts['registers']} registers, {facts['shared_bytes']} bytes of shared memory")
    on_matrix = needs.matrix and dtype in _HALVES
    if on_matrix and target.matrix not in facts["matrix_instructions"]:
        found.append(f"no {target.matrix}, but {', '.join(facts['matrix_instructions']) or 'no matrix instructions'}")
    # MFMA leaves four neighbours of a row in a lane, 8 bytes of 16-bit features, and Triton stores them from there.
    stores = 0 if on_matrix and target.backend == "hip" else needs.stores
    for what, needed in (("loads", needs.loads), ("stores", stores)):
        if facts[f"wide_{what}"] < needed:
            found.append(f"{facts[f'wide_{what}']} of {facts[what]} {what} have 16 bytes, expected at least {needed}")
    return found


def record_of(unit: Unit, facts: dict[str, Any]) -> dict[str, Any]:
    """The unit and its facts, JSON-ready."""
    launch, call = unit.launch, unit.call
    sources = sources_of(launch.module)
    found = faults(facts, unit.needs, TARGETS[call.target], call.dtype)
    if "error" not in facts:
        found += excess(launch.kernel, call.target, facts["factors"])
    return {
        "kernel": launch.kernel,
        "case": call.case.name,
        "target": call.target,
        "dtype": call.dtype,
        "shapes": list(unit.shapes),
        "constexprs": launch.constexprs,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "launch": launch.key,
        **facts,
        "faults": found,
        "sources": sources,
        "source_sha256": environment.source_hash(sources),
    }
