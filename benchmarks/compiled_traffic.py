"""Bytes that compiled code loads and stores, held against those that its source asks for: no GPU is needed.

Every access of PTX and AMD assembly stands under the line and column that it comes from, and every ``tl.load`` and
``tl.store`` in Triton's IR (TTIR) names its own. What the code moves for a place, over the size of the tensor that the
source moves there, is the factor of that place: 1 where the compiler moves each element once, more where several
threads hold the same element or where an access is made again. Loops are those that LLVM writes beside its labels, so
that both are bytes of one trip. Masks and predicates are ignored: the factors are upper limits.
"""

import collections
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.gpu_code import Target

#: Factors above 1 of whole tiles, by kernel and target, with the reason why nothing is moved twice for all that.
EXPLAINED = {
    ("se_weight_grad_kernel", "gfx942"): (
        4,
        "each of four warps holds the 16 columns of a weight gradient, and a predicate lets one of them store",
    ),
}


@dataclass(frozen=True)
class Access:
    """A load or store of the source, or an instruction of the code.

    Attributes:
        kind: ``loads`` or ``stores``; of the source also ``atomics``, whose places are known and nothing else.
        place: ``file:line:column``, and those of the calls that it was inlined through, innermost first.
        size: bytes that the threads of a program move together when they come by once; 0 for a TMA instruction, which
            moves the tile that its source names.
        loops: the loops around it from the outermost: in the source their trips, where those are constant, else
            ``None``; in the code their labels.
        tile: of the source: more than one dimension, and an element for every thread.
    """

    kind: str
    place: str
    size: int
    loops: tuple[Any, ...]
    tile: bool = False


_ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.M)
_POSITION = re.compile(r'"([^"]+)":(\d+):(\d+)')
_ASKED = re.compile(r"\btt\.(?:descriptor_)?(load|store|atomic)(?:_rmw|_cas)?\b(.*?)(?: loc\((.*)\))?$")
_TENSOR = re.compile(r"tensor<((?:\d+x)*)(?:!tt\.ptr<)?[a-z]+(\d+)|!tt\.ptr<()[a-z]+(\d+)")
_CONSTANT = re.compile(r"(%[\w#]+) = arith\.constant (-?\d+) : (?:i32|i64|index)")
_FOR = re.compile(r"\bscf\.for %\S+ = (%\S+) to (%\S+) step (%\S+)")


def source_accesses(ttir: str, threads: int) -> list[Access]:
    """Loads, stores and atomics of a kernel's Triton IR (``kernel.asm["ttir"]``), in order.

    Args:
        ttir: the text.
        threads: of a program.
    """
    aliases = dict(_ALIAS.findall(ttir))
    constants = {name: int(value) for name, value in _CONSTANT.findall(ttir)}

    def place(location: str) -> str:
        while alias := re.search(r"#loc\d*", location):
            location = location.replace(alias[0], aliases.get(alias[0], ""), 1)
        return " @ ".join(f"{Path(path).name}:{line}:{column}" for path, line, column in _POSITION.findall(location))

    def trips(line: str) -> tuple[int | None, ...]:
        if "scf.while" in line or line.lstrip().startswith("} do"):
            return (None,)
        if not (loop := _FOR.search(line)):
            return ()
        low, high, step = (constants.get(name) for name in loop.groups())
        return (None if None in (low, high, step) else max(0, -(-(high - low) // step)),)

    found: list[Access] = []
    regions: list[tuple[int | None, ...]] = []
    for line in ttir.splitlines():
        if line.lstrip().startswith("}") and regions:
            regions.pop()
        if line.rstrip().endswith("{"):
            regions.append(trips(line))
        elif asked := _ASKED.search(line):
            shape, bits = [group for group in _TENSOR.search(asked[2]).groups() if group is not None]
            sizes = [int(size) for size in shape.split("x") if size]
            count = math.prod(sizes)
            loops = tuple(trip for region in regions for trip in region)
            tile = len(sizes) > 1 and count >= threads
            kind = f"{asked[1]}s"
            found.append(Access(kind, place(asked[3] or ""), count * max(1, int(bits) // 8), loops, tile))
    return found


_COMMENT = {"cuda": "//", "hip": ";"}
_BLOCK = re.compile(r"^(?:\$L__|// %|\.L|; %)(BB\d+_\d+|bb\.\d+):")
_LINE = re.compile(r"^\s*\.loc\b.*?(?://|;) (.*)$")
_PTX = re.compile(
    r"\b(?P<direct>ld|st)\.global[\w.:]*?(?:\.v(?P<count>\d))?\.[bfus](?P<bits>\d+)\b"
    r"|\bcp\.async\.c[ag]\.[^;]*?\], (?P<copied>0x[0-9a-f]+|\d+)\b"
    r"|\bcp\.async\.bulk\.tensor\.\dd\.(?P<tma>shared|global)\b"
)
_AMD = re.compile(r"\b(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword)(?:x(\d))?")
_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4}


def _moved(line: str) -> list[tuple[str, int]]:
    """Kind and bytes a thread of the accesses in a line of code."""
    found = []
    for match in _PTX.finditer(line):
        if match["direct"]:
            size = int(match["count"] or 1) * int(match["bits"]) // 8
            found.append(("loads" if match["direct"] == "ld" else "stores", size))
        elif match["copied"]:
            found.append(("loads", int(match["copied"], 0)))
        else:
            found.append(("loads" if match["tma"] == "shared" else "stores", 0))
    for kind, word, count in _AMD.findall(line):
        found.append((f"{kind}s", _AMD_BYTES[word] * int(count or 1)))
    return found


def _loops(lines: Sequence[str], mark: str) -> dict[int, tuple[str, ...]]:
    """For every line that opens a block, by number, the loops around the block."""
    blocks: dict[int, tuple[str, str]] = {}
    for number, line in enumerate(lines):
        if label := _BLOCK.match(line):
            end = number + 1
            while end < len(lines) and lines[end].lstrip().startswith(mark) and not _BLOCK.match(lines[end]):
                end += 1
            blocks[number] = label[1], "\n".join(lines[number:end])
    around = {
        name: (*re.findall(r"Parent Loop (BB\w+)", text), name)
        for name, text in blocks.values()
        if re.search(r"=>\s*This .*Loop Header", text)
    }

    def of(name: str, text: str) -> tuple[str, ...]:
        inside = re.search(r"in Loop: Header=(BB\w+)", text)
        return around.get(inside[1] if inside else name, ())

    return {number: of(*block) for number, block in blocks.items()}


def code_accesses(backend: str, code: str, threads: int) -> list[Access]:
    """Global loads and stores of PTX (``cuda``) or AMD assembly (``hip``), in order; those are no atomics."""
    lines = code.splitlines()
    blocks = _loops(lines, _COMMENT[backend])
    found: list[Access] = []
    place, loops = "", ()
    for number, line in enumerate(lines):
        loops = blocks.get(number, loops)
        if location := _LINE.match(line):
            place = " @ ".join(re.findall(r"[^\s\[]+:\d+:\d+", location[1]))
        else:
            found += [Access(kind, place, size * threads, loops) for kind, size in _moved(line)]
    return found


def _per_trip(asked: Access, code: Sequence[Access]) -> tuple[float, float]:
    """How often the code moves the tensor of a source access in a trip, and how often before its innermost loop."""
    depth = max((len(access.loops) for access in code), default=0)
    # A loop that the code lacks was unrolled: its trips stand one after another.
    unrolled = sorted(trips for trips in asked.loops if trips is not None)[: max(0, len(asked.loops) - depth)]
    sizes = [(len(access.loops), access.size or asked.size) for access in code]
    steady = sum(size for loops, size in sizes if loops == depth)
    ahead = sum(size for loops, size in sizes if loops < depth)
    return steady / asked.size / max(1, math.prod(unrolled)), ahead / asked.size


def factors(target: Target, asm: Mapping[str, Any], warps: int) -> dict[str, Any]:
    """How much more compiled code moves than its source asks for.

    Args:
        target: what it was compiled for.
        asm: Triton's ``kernel.asm``.
        warps: that the kernel was launched with.

    Returns:
        ``tile_loads``, ``tile_stores``, ``vector_loads`` and ``vector_stores``: the largest factor of any place in a
        trip of its innermost loop, ``None`` where there is no such access. Where no tile has a place in AMD's code, its
        accesses without one are shared out among what lacks them. ``ahead``: tiles that are loaded before
        their loop begins, as software pipelines do; the loop then leaves out as many. ``unplaced``: bytes of accesses
        that name no place of the source, beyond what its places lack, in units of the smallest tile.
    """
    threads = warps * target.warp_size
    source = source_accesses(asm["ttir"], threads)
    code = code_accesses(target.backend, asm["ptx" if target.backend == "cuda" else "amdgcn"], threads)
    by_place: dict[tuple[str, str], list[Access]] = {}
    for access in code:
        by_place.setdefault((access.kind, access.place), []).append(access)
    # Loops that the source unrolls itself ask more than once from one place.
    places = collections.Counter((asked.kind, asked.place) for asked in source)
    # Spinning on an atomic that adds 0 compiles to a load.
    used = {*places, *((kind, place) for what, place in places if what == "atomics" for kind in ("loads", "stores"))}
    found: dict[str, Any] = {f"{what}_{kind}": None for what in ("tile", "vector") for kind in ("loads", "stores")}
    found["ahead"] = 0.0
    lacking = {"loads": 0.0, "stores": 0.0}
    for asked in source:
        if asked.kind == "atomics":
            continue
        own = by_place.get((asked.kind, asked.place), [])
        # Branches that LLVM has joined keep the line of their accesses and lose the calls around it.
        joined = (asked.kind, asked.place.partition(" @ ")[0])
        if not own and joined not in places:
            own = by_place.get(joined, [])
            used.add(joined)
        factor, ahead = (times / places[asked.kind, asked.place] for times in _per_trip(asked, own))
        lacking[asked.kind] += max(0.0, 1 - factor) * asked.size
        name = f"{'tile' if asked.tile else 'vector'}_{asked.kind}"
        found[name] = max(found[name] or 0.0, round(factor, 3))
        if asked.tile:
            found["ahead"] = max(found["ahead"], round(ahead, 3))
    # What LLVM lifts out of branches names no place, and the places that it comes from lack it.
    lost = [access for key, own in by_place.items() if key not in used for access in own]
    sizes = {kind: sum(access.size for access in lost if access.kind == kind) for kind in lacking}
    unit = min((asked.size for asked in source if asked.tile), default=threads)
    found["unplaced"] = round(sum(max(0.0, sizes[kind] - short) for kind, short in lacking.items()) / unit, 3)
    for kind, short in lacking.items():
        # LLVM joins the branches of all stores of a kernel for AMD; less than a tile means that the code was not read.
        if target.backend == "hip" and found[f"tile_{kind}"] == 0 and sizes[kind] >= unit:
            found[f"tile_{kind}"] = round(min(1.0, sizes[kind] / short), 3)
    return found


def excess(kernel: str, target: str, found: Mapping[str, Any]) -> list[str]:
    """What of the :func:`factors` of a kernel must not be; empty where all is as the source says."""
    allowed, _ = EXPLAINED.get((kernel, target), (1, ""))
    faults = [
        f"{kind} every element of a tile {found[f'tile_{kind}']:g} times, its source once"
        for kind in ("loads", "stores")
        if (found[f"tile_{kind}"] or 0) > allowed
    ]
    # Else text that another compiler writes in another way would pass for code that moves nothing.
    faults += [
        f"{kind} no tile, and its source does: the code was not understood"
        for kind in ("loads", "stores")
        if found[f"tile_{kind}"] == 0
    ]
    if found["unplaced"] >= 1:
        faults.append(f"moves {found['unplaced']:g} tiles that no line of its source asks for")
    return faults


def worst_factors(folder: Path = environment.RESULTS / "aot") -> dict[str, dict[str, float]]:
    """For every kernel the largest factors of its tiles on any target, at least 1, as ``loads`` and ``stores``.

    Those of :data:`EXPLAINED` count as 1. A kernel is left out that has a record of other code than the present one in
    the ``folder`` of result files.
    """
    found: dict[str, dict[str, float]] = {}
    old = set()
    present = functools.cache(lambda *sources: environment.source_hash(sources))
    for path in sorted(folder.glob("*.json")):
        for record in json.loads(path.read_text(encoding="utf-8"))["records"]:
            if "factors" not in record or present(*record["sources"]) != record["source_sha256"]:
                old.add(record["kernel"])
                continue
            worst = found.setdefault(record["kernel"], {"loads": 1.0, "stores": 1.0})
            for kind in () if (record["kernel"], record["target"]) in EXPLAINED else worst:
                factor = record["factors"][f"tile_{kind}"]
                worst[kind] = worst[kind] if factor is None else max(worst[kind], factor)
    return {kernel: worst for kernel, worst in found.items() if kernel not in old}
