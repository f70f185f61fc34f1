"""What compiled GPU code says about itself: registers, spills, shared memory, matrix and 16-byte instructions."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: as in kernels/tables.
        backend, arch, warp_size: what Triton's GPUTarget takes.
        processors: multiprocessors of the largest GPU of the kind.
        threads: resident threads of a multiprocessor.
        blocks: resident blocks of a multiprocessor.
        shared: bytes of shared memory of a multiprocessor.
        block_shared: bytes of it that one block may have.
        reserved: bytes of it that the system takes from every block.
        matrix: the kind of matrix instructions that makes full use of it.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    processors: int
    threads: int
    blocks: int
    shared: int
    block_shared: int
    reserved: int
    matrix: str


#: What is compiled for, by name.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 108, 2048, 32, 164 * KIB, 163 * KIB, KIB, "mma"),
        Target("sm_90", "cuda", 90, 32, 132, 2048, 32, 228 * KIB, 227 * KIB, KIB, "wgmma"),
        Target("sm_100", "cuda", 100, 32, 148, 2048, 32, 228 * KIB, 227 * KIB, KIB, "tcgen05"),
        Target("gfx942", "hip", "gfx942", 64, 304, 2048, 32, 64 * KIB, 64 * KIB, 0, "mfma"),
    )
}

#: Instructions by backend, as they stand in PTX and in AMD assembly. A TMA instruction moves a tile.
_MATRIX = {
    "cuda": {"wgmma": r"\bwgmma\.mma_async\b", "tcgen05": r"\btcgen05\.mma\b", "mma": r"\bmma\.sync\b"},
    "hip": {"mfma": r"\bv_mfma_\w+"},
}
_TMA_LOAD = r"\bcp\.async\.bulk\.tensor\.\dd\.shared"
_TMA_STORE = r"\bcp\.async\.bulk\.tensor\.\dd\.global"
_WIDE = r"[\w.:]*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64|b128)\b"
_ACCESSES = {
    "cuda": {
        "wide_loads": rf"\bld\.global{_WIDE}|\bcp\.async\.cg\.[^;]*?\], (?:0x10|16)\b|{_TMA_LOAD}",
        "loads": rf"\bld\.global\b|\bcp\.async\.c[ag]\b|{_TMA_LOAD}",
        "wide_stores": rf"\bst\.global{_WIDE}|{_TMA_STORE}",
        "stores": rf"\bst\.global\b|{_TMA_STORE}",
    },
    "hip": {
        "wide_loads": r"\b(?:global|buffer|flat)_load_dwordx4\b",
        "loads": r"\b(?:global|buffer|flat)_load_\w+",
        "wide_stores": r"\b(?:global|buffer|flat)_store_dwordx4\b",
        "stores": r"\b(?:global|buffer|flat)_store_\w+",
    },
}


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def count_instructions(backend: str, text: str) -> dict[str, Any]:
    """Matrix instructions by kind, and global loads and stores, all and those of 16 bytes or more."""
    kinds = {kind: _count(pattern, text) for kind, pattern in _MATRIX[backend].items()}
    accesses = {name: _count(pattern, text) for name, pattern in _ACCESSES[backend].items()}
    return {"matrix_instructions": {kind: count for kind, count in kinds.items() if count}, **accesses}


def _run(tool: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


def parse_usage(usage: str) -> dict[str, int]:
    """Registers and stack from the output of ``cuobjdump --dump-resource-usage``."""
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    return {"registers": int(match[1]), "stack_bytes": int(match[2]) + int(match[4])}


def read_cubin(path: Path) -> dict[str, int]:
    """Registers, stack and spills of a kernel. Without a stack there is nowhere to spill to: nothing to look for."""
    facts = parse_usage(_run("cuobjdump", "--dump-resource-usage", str(path)))
    sass = _run("nvdisasm", "-c", "-ndf", str(path)) if facts["stack_bytes"] else ""
    return {**facts, "spill_stores": _count(r"\bSTL\b", sass), "spill_loads": _count(r"\bLDL\b", sass)}


def parse_amdgcn(text: str) -> dict[str, Any]:
    """Facts from AMD assembly and the metadata at its end.

    ``registers`` are those of vectors and accumulators together, which share one file on CDNA 3. Scalar registers that
    spill go to lanes of vector registers, so that they do not touch memory; they are counted apart.
    """

    def field(name: str) -> int:
        match = re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.M)
        if match is None:
            raise RuntimeError(f"the assembly has no .{name}")
        return int(match[1])

    spilled = field("vgpr_spill_count")
    return {
        # .vgpr_count is the sum of both kinds where the file is shared.
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "spill_stores": max(spilled, _count(r"\bscratch_store_\w+", text)),
        "spill_loads": _count(r"\bscratch_load_\w+", text),
        "scalar_spills": field("sgpr_spill_count"),
        **count_instructions("hip", text),
    }


#: Columns of a multiprocessor's tensor memory, where tcgen05 accumulates.
TENSOR_COLUMNS = 512


def blocks_per_multiprocessor(target: Target, registers: int, shared: int, warps: int, columns: int = 0) -> int:
    """Blocks that fit into a multiprocessor at once, 0 where one alone does not fit.

    Args:
        target: the GPU.
        registers: of a thread.
        shared: bytes of shared memory of a block.
        warps: of a block.
        columns: of tensor memory that a block takes.
    """
    if shared > target.block_shared:
        return 0
    threads = warps * target.warp_size
    limits = [target.blocks, target.threads // threads]
    if shared or target.reserved:
        limits.append(target.shared // (shared + target.reserved))
    if columns:
        limits.append(TENSOR_COLUMNS // columns)
    if target.backend == "cuda":
        # 64 K registers, given to warps in portions of 256.
        per_warp = max(1, -(-registers * 32 // 256)) * 256
        limits.append(65536 // (per_warp * warps))
    else:
        # Four SIMDs, each with 512 registers a lane, given in portions of 8, and at most 8 waves.
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))
        limits.append(4 * waves // warps)
    return min(limits)


def describe(target: Target, asm: dict[str, Any], shared: int, warps: int, columns: int = 0) -> dict[str, Any]:
    """Facts about one compiled kernel.

    Args:
        target: what it was compiled for.
        asm: Triton's ``kernel.asm``.
        shared: bytes of shared memory.
        warps: warps of a block, those included that a warp-specialised kernel adds.
        columns: of tensor memory.

    Returns:
        ``registers``, ``stack_bytes``, ``spill_stores``, ``spill_loads``, ``shared_bytes``, ``ctas_per_sm``,
        ``matrix_instructions`` (kind to count), ``wide_loads`` and ``wide_stores`` (16 bytes or more at a time) and
        ``loads`` and ``stores`` (all), counted as they stand in the code: for NVIDIA in PTX, since disassembling takes
        as long as compiling, and the assembler neither splits nor joins these.
    """
    if target.backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(asm["cubin"])
            facts = {**read_cubin(path), **count_instructions("cuda", asm["ptx"])}
    else:
        facts = parse_amdgcn(asm["amdgcn"])
    facts["shared_bytes"] = shared
    facts["ctas_per_sm"] = blocks_per_multiprocessor(target, facts["registers"], shared, warps, columns)
    return facts
