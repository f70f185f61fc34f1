"""The command ``aot``: reading compiled code, judging it, showing it. tests/kernels/test_aot.py compiles."""

import json

import pytest

from benchmarks import aot, gpu_code, report
from benchmarks.__main__ import main
from benchmarks.aot_cases import Needs
from benchmarks.aot_units import faults, sources_of
from benchmarks.environment import ROOT, source_hash
from benchmarks.gpu_code import TARGETS
from benchmarks.screen import Screen

PTX = """
.maxntid 256
@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
ld.global.b32 { %r1 }, [ %rd1 + 0 ];
cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
cp.async.ca.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x4, %r6;
@%p2 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd3, {%r2, %r3}], [%r4];
cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd4, {%r2, %r3}], [%r1];
st.global.v4.b32 [ %rd5 + 0 ], { %r1, %r2, %r3, %r4 };
st.global.b16 [ %rd5 + 0 ], { %rs1 };
ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, %p1, 1, 1, 0, 1;
"""

AMDGCN = """
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\tbuffer_load_dword v1, v2, s[0:3], 0 offen
\tbuffer_store_dwordx2 v[0:1], v2, s[0:3], 0 offen
\tv_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
  - .agpr_count:     0
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 2
    .vgpr_count:     124
    .vgpr_spill_count: 3
"""


def test_instructions_are_counted_in_ptx():
    assert gpu_code.count_instructions("cuda", PTX) == {
        "matrix_instructions": {"wgmma": 1},
        "wide_loads": 3,
        "loads": 6,
        "wide_stores": 2,
        "stores": 3,
    }


def test_amd_assembly_is_read():
    assert gpu_code.parse_amdgcn(AMDGCN) == {
        "registers": 124,
        "stack_bytes": 12,
        "spill_stores": 3,
        "spill_loads": 0,
        "scalar_spills": 2,
        "matrix_instructions": {"mfma": 1},
        "wide_loads": 1,
        "loads": 2,
        "wide_stores": 0,
        "stores": 1,
    }


def test_resource_usage_is_read():
    usage = " Function f:\n  REG:48 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:608 TEXTURE:0"
    assert gpu_code.parse_usage(usage) == {"registers": 48, "stack_bytes": 12}
    with pytest.raises(RuntimeError, match="no resource usage"):
        gpu_code.parse_usage("")


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "columns", "blocks"),
    [
        ("sm_90", 126, 96 * 1024, 8, 0, 2),  # shared memory and registers
        ("sm_90", 174, 176 * 1024, 8, 0, 1),
        ("sm_90", 40, 0, 4, 0, 12),  # registers: 65536 / (40 · 128)
        ("sm_90", 32, 0, 4, 0, 16),  # threads
        ("sm_90", 16, 0, 1, 0, 32),  # blocks
        ("sm_80", 128, 164 * 1024, 8, 0, 0),  # more shared memory than there is
        ("sm_100", 64, 64 * 1024, 4, 256, 2),  # tensor memory
        ("gfx942", 124, 16 * 1024, 4, 0, 4),  # 4 waves a SIMD
        ("gfx942", 520, 0, 4, 0, 0),
    ],
)
def test_blocks_of_a_multiprocessor(target, registers, shared, warps, columns, blocks):
    assert gpu_code.blocks_per_multiprocessor(TARGETS[target], registers, shared, warps, columns) == blocks


GOOD = {
    "registers": 126,
    "stack_bytes": 0,
    "spill_stores": 0,
    "spill_loads": 0,
    "shared_bytes": 98304,
    "ctas_per_sm": 2,
    "matrix_instructions": {"wgmma": 4},
    "wide_loads": 24,
    "loads": 42,
    "wide_stores": 8,
    "stores": 8,
    "factors": {"tile_loads": 1.0, "tile_stores": None, "vector_loads": 64.0, "vector_stores": 2.0, "ahead": 2.0},
}


@pytest.mark.parametrize(
    ("changes", "dtype", "expected"),
    [
        ({}, "bfloat16", []),
        ({"spill_stores": 2, "stack_bytes": 8}, "bfloat16", ["spills: 2 instructions, 8 bytes of stack"]),
        ({"stack_bytes": 8}, "bfloat16", ["spills: 0 instructions, 8 bytes of stack"]),
        ({"matrix_instructions": {"mma": 4}}, "float16", ["no wgmma, but mma"]),
        ({"matrix_instructions": {}}, "float16", ["no wgmma, but no matrix instructions"]),
        ({"matrix_instructions": {}}, "float32", []),
        ({"wide_loads": 1}, "float32", ["1 of 42 loads have 16 bytes, expected at least 2"]),
        ({"wide_stores": 0}, "float32", ["0 of 8 stores have 16 bytes, expected at least 1"]),
        ({"ctas_per_sm": 0}, "float32", ["does not fit: 126 registers, 98304 bytes of shared memory"]),
        ({"error": "CompilationError: no"}, "float32", ["CompilationError: no"]),
    ],
)
def test_faults_are_found(changes, dtype, expected):
    assert faults({**GOOD, **changes}, Needs(True, loads=2, stores=1), TARGETS["sm_90"], dtype) == expected


def test_mfma_stores_8_bytes():
    facts = {**GOOD, "matrix_instructions": {"mfma": 4}, "wide_stores": 0}
    needs = Needs(True, loads=2, stores=1)
    assert faults(facts, needs, TARGETS["gfx942"], "bfloat16") == []
    assert faults(facts, needs, TARGETS["gfx942"], "float32") != []


def test_sources_are_followed():
    assert sources_of("se") == ["kernels/common.py", "kernels/se.py"]
    assert {"kernels/common.py", "kernels/concat.py", "kernels/ls_concat.py", "kernels/se.py"} <= set(
        sources_of("ls_concat")
    )


def record(kernel="a_kernel", target="sm_90", dtype="bfloat16", **changes):
    sources = ["model.py"]
    return {
        "kernel": kernel,
        "target": target,
        "dtype": dtype,
        "constexprs": {"BLOCK_M": 128},
        "num_warps": 8,
        "num_stages": 3,
        **GOOD,
        "faults": [],
        "sources": sources,
        **changes,
    }


@pytest.fixture
def rendered(tmp_path):
    """The README's table, from records."""
    (tmp_path / "model.py").write_text("x = 1\n")

    def render(*records):
        digest = source_hash(["model.py"], tmp_path)
        for target in {r["target"] for r in records}:
            own = [{"source_sha256": digest, **r} for r in records if r["target"] == target]
            path = tmp_path / "results" / "aot" / f"{target}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"environment": {"triton": "3.7.1", "date": "2026-01-02"}, "records": own}))
        return report.render("aot", tmp_path / "results", tmp_path)

    return render


def test_the_table_has_a_row_for_each_kernel_and_a_column_for_each_target(rendered):
    text = rendered(
        record(registers=100),
        record(registers=126),
        record(dtype="float32", registers=255),
        record(target="sm_80", matrix_instructions={"mma": 8}, shared_bytes=512),
        record("b_kernel", dtype="float32", matrix_instructions={}),
    )
    assert text.splitlines()[:4] == [
        "| kernel | sm_80 | sm_90 |",
        "| --- | ---: | ---: |",
        "| a_kernel | 126 · 0.5 · 2 · mma | 126 · 96 · 2 · wgmma |",
        "| b_kernel | – | 126 · 96 · 2 |",
    ]
    assert "5 combinations" in text
    assert "none spills" in text
    assert "Triton 3.7.1; 2026-01-02." in text


def test_the_table_shows_what_is_wrong(rendered):
    text = rendered(
        record(spill_stores=2, spill_loads=3, faults=["spills"]),
        record("b_kernel", error="CompilationError", faults=["CompilationError"]),
        record("c_kernel", source_sha256="0"),
    )
    assert "**5 spills**" in text
    assert "| b_kernel | does not compile |" in text
    assert "| c_kernel (stale) |" in text
    assert "**2 of them spill or lack" in text


def test_nothing_compiled_yet(tmp_path):
    assert report.render("aot", tmp_path, ROOT) == report.NOT_MEASURED


def test_the_screen_shows_the_worst(capsys):
    records = [record(), record(registers=200, wide_stores=4, ctas_per_sm=1), record(error="no", faults=["no"])]
    aot.show_summary(records, Screen(200))
    out = capsys.readouterr().out
    assert all(part in out for part in ("a_kernel", " 3 ", "200", "24/42", "4/8", "wgmma", "1/–"))
    aot.show(records, Screen(200))
    assert "BLOCK_M=128" in capsys.readouterr().out


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["aot"]) == 2
    assert "env -u TRITON_INTERPRET python -m benchmarks aot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--target", "sm_91"], "Did you mean 'sm_90'"), (["--jobs", "0"], "expected a whole number >= 1")],
)
def test_bad_values_are_refused(args, message, capsys):
    assert main(["aot", *args]) == 2
    assert message in capsys.readouterr().err
