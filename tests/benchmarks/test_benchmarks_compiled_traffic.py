"""Bytes that compiled code moves over those that its source asks for, from hand-written code and the result files."""

import json

import pytest

from benchmarks import environment
from benchmarks.compiled_traffic import EXPLAINED, code_accesses, excess, factors, source_accesses, worst_factors
from benchmarks.gpu_code import TARGETS
from benchmarks.report import render
from benchmarks.report_aot import factors_table, read_targets

TTIR = """
#loc = loc("/somewhere/rows.py":5:0)
#loc1 = loc("/somewhere/rows.py":9:4)
#loc8 = loc("kappa"(#loc2))
#loc9 = loc(callsite(#loc3 at #loc4))
module {
  tt.func public @rows_kernel(%x: !tt.ptr<bf16> loc("x"(#loc)), %N: i32 loc("N"(#loc))) attributes {noinline = false} {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c2_i32 = arith.constant 2 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %kappa = tt.load %0 : tensor<128x!tt.ptr<f32>> loc(#loc8)
    %acc = scf.for %half = %c0_i32 to %c2_i32 step %c1_i32 iter_args(%a = %cst) -> (tensor<16x64xf32>)  : i32 {
      %b = scf.for %start = %c0_i32 to %N step %c1_i32 iter_args(%c = %a) -> (tensor<16x64xf32>)  : i32 {
        %tile = tt.load %3, %4, %5 : tensor<16x64x!tt.ptr<bf16>> loc(#loc9)
        %d = "tt.reduce"(%tile) <{axis = 1 : i32}> ({
        ^bb0(%e: f32 loc(callsite(#loc1 at #loc8)), %f: f32 loc(callsite(#loc1 at #loc8))):
          tt.reduce.return %g : f32 loc(#loc1)
        }) : (tensor<16x64xf32>) -> tensor<16xf32> loc(#loc1)
        scf.yield %d : tensor<16x64xf32> loc(#loc1)
      } loc(#loc1)
      scf.yield %b : tensor<16x64xf32> loc(#loc1)
    } loc(#loc1)
    scf.if %6 {
      scf.while : () -> () {
        %7 = tt.atomic_rmw add, acquire, gpu, %8, %c0_i32, %true : (!tt.ptr<i32>, i32, i1) -> i32 loc(#loc5)
        scf.condition(%9) loc(#loc1)
      } do {
        scf.yield loc(#loc1)
      } loc(#loc1)
    } else {
      tt.store %10, %11 : !tt.ptr<f32> loc(#loc6)
    } loc(#loc1)
    tt.descriptor_store %out[%12, %13], %14 : !tt.tensordesc<tensor<16x64xbf16>>, tensor<16x64xbf16> loc(#loc7)
    tt.return loc(#loc1)
  } loc(#loc)
} loc(#loc)
#loc2 = loc("/somewhere/rows.py":10:8)
#loc3 = loc("/elsewhere/common.py":30:12)
#loc4 = loc("/somewhere/rows.py":12:16)
#loc5 = loc("/somewhere/rows.py":14:20)
#loc6 = loc("/somewhere/rows.py":15:24)
#loc7 = loc("/somewhere/rows.py":16:28)
"""

PTX = """
// %bb.0:
	.loc	1 10 8                          // rows.py:10:8
	ld.global.b32 { %r1 }, [ %rd1 + 0 ];
	.loc	2 30 12                         // common.py:30:12 @[ rows.py:12:16 ]
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
	bra.uni 	$L__BB0_2;
$L__BB0_1:                              //   in Loop: Header=BB0_2 Depth=1
$L__tmp1:
	@%p1 bra 	$L__BB0_4;
$L__BB0_2:                              // =>This Loop Header: Depth=1
                                        //     Child Loop BB0_3 Depth 2
$L__BB0_3:                              //   Parent Loop BB0_2 Depth=1
                                        // =>  This Inner Loop Header: Depth=2
	.loc	2 30 12                         // common.py:30:12 @[ rows.py:12:16 ]
$L__tmp2:
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
	ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
	@%p2 bra 	$L__BB0_3;
	bra.uni 	$L__BB0_1;
$L__BB0_4:
	.loc	1 14 20                         // rows.py:14:20
	@%p4 ld.global.gpu.acquire.b32 %r171, [ %rd97 + 0 ];
	.loc	1 15 24                         // rows.py:15:24
	@%p3 st.global.L1::evict_last.b32 [ %rd5 + 0 ], { %r1 };
	.loc	1 16 28                         // rows.py:16:28
	@%p66 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd48, {%r177, %r122}], [%r178];
"""

AMDGCN = """
.LBB0_0:
	.loc	1 10 8 is_stmt 1                ; rows.py:10:8
	global_load_dword v1, v2, s[0:1]
	s_load_dwordx4 s[4:7], s[0:1], 0x10
	.loc	2 30 12 is_stmt 0               ; common.py:30:12 @[ rows.py:12:16 ]
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	buffer_load_dwordx4 v[4:7], v4, s[0:3], 0 offen offset:16
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	.loc	1 15 24                         ; rows.py:15:24
	buffer_store_short v0, v4, s[0:3], 0 offen
	.loc	1 0 0                           ; :0:0
	buffer_load_ubyte v0, v4, s[0:3], 0 offen
"""
TILE = "common.py:30:12 @ rows.py:12:16"


def test_the_source_is_read():
    found = [(a.kind, a.place, a.size, a.loops, a.tile) for a in source_accesses(TTIR, threads=128)]
    assert found == [
        ("loads", "rows.py:10:8", 512, (), False),
        ("loads", TILE, 2048, (2, None), True),
        ("atomics", "rows.py:14:20", 4, (None,), False),
        ("stores", "rows.py:15:24", 4, (), False),
        ("stores", "rows.py:16:28", 2048, (), True),
    ]
    assert not any(a.tile for a in source_accesses(TTIR, threads=2048))  # threads without an element


def test_ptx_is_read():
    found = [(a.kind, a.place, a.size, a.loops) for a in code_accesses("cuda", PTX, threads=128)]
    assert found == [
        ("loads", "rows.py:10:8", 512, ()),
        ("loads", TILE, 2048, ()),
        ("loads", TILE, 2048, ("BB0_2", "BB0_3")),
        ("loads", "rows.py:14:20", 512, ()),
        ("stores", "rows.py:15:24", 512, ()),
        ("stores", "rows.py:16:28", 0, ()),  # TMA
    ]


def test_the_block_before_its_loops_header_is_in_the_loop():
    code = PTX.replace("$L__tmp1:", "\tst.global.v4.b32 [ %rd5 + 0 ], { %r1 };")
    assert code_accesses("cuda", code, threads=1)[2].loops == ("BB0_2",)


def test_amd_assembly_is_read():
    found = [(a.kind, a.place, a.size, a.loops) for a in code_accesses("hip", AMDGCN, threads=64)]
    assert found == [
        ("loads", "rows.py:10:8", 256, ()),
        ("loads", TILE, 1024, ()),
        ("loads", TILE, 1024, ()),
        ("loads", TILE, 1024, ("BB0_1",)),
        ("stores", "rows.py:15:24", 128, ("BB0_1",)),
        ("loads", "", 64, ("BB0_1",)),
    ]


def of(ptx):
    return factors(TARGETS["sm_90"], {"ttir": TTIR, "ptx": ptx}, warps=4)


AS_ASKED = {
    "tile_loads": 1.0,
    "tile_stores": 1.0,
    "vector_loads": 1.0,
    "vector_stores": 128.0,  # one number, stored by the 128 threads, of which a predicate leaves one
    "ahead": 1.0,
    "unplaced": 0.0,
}
IN_LOOP = "\tcp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;\n\tld.shared"


def test_code_that_moves_each_element_once():
    assert of(PTX) == AS_ASKED
    assert excess("rows_kernel", "sm_90", AS_ASKED) == []


def test_a_tile_that_is_loaded_twice_in_a_trip_is_found():
    found = of(PTX.replace(IN_LOOP, IN_LOOP.removesuffix("\tld.shared") + IN_LOOP))
    assert found == {**AS_ASKED, "tile_loads": 2.0}
    assert excess("rows_kernel", "sm_90", found) == ["loads every element of a tile 2 times, its source once"]


def test_a_tile_that_is_stored_again_is_found():
    store = "\t@%p66 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd48, {%r177, %r122}], [%r178];\n"
    assert of(PTX + store) == {**AS_ASKED, "tile_stores": 2.0}


def test_the_trips_of_an_unrolled_loop_are_no_copies():
    inner = PTX.replace("//   Parent Loop BB0_2 Depth=1\n", "// =>This Inner Loop Header: Depth=1\n")
    # The loop over two halves is gone, and the other one is there twice.
    code = inner.replace("// =>This Loop Header: Depth=1", "")
    start, end = code.index("$L__BB0_3:"), code.index("$L__BB0_4:")
    twice = code[:end] + code[start:end].replace("BB0_3", "BB0_5") + code[end:]
    assert of(twice)["tile_loads"] == 1.0
    thrice = twice[:end] + code[start:end].replace("BB0_3", "BB0_6") + twice[end:]
    assert of(thrice)["tile_loads"] == 1.5


def test_what_the_source_repeats_itself_is_no_copy():
    def repeated(text, part, times=2):
        return "\n".join(line for row in text.splitlines() for line in [row] * (times if part in row else 1))

    asm = {"ttir": repeated(TTIR, "tt.descriptor_store"), "ptx": repeated(PTX, "cp.async.bulk.tensor")}
    assert factors(TARGETS["sm_90"], asm, warps=4) == AS_ASKED
    asm["ptx"] = repeated(PTX, "cp.async.bulk.tensor", 4)
    assert factors(TARGETS["sm_90"], asm, warps=4) == {**AS_ASKED, "tile_stores": 2.0}


def test_an_access_of_no_line_of_the_source_is_found():
    found = of(PTX + "\t.loc\t1 0 0                          // rows.py:0:0\n\tld.global.v4.b32 {%r1}, [%rd1];\n")
    assert found == {**AS_ASKED, "unplaced": 1.0}
    assert excess("rows_kernel", "sm_90", found) == ["moves 1 tiles that no line of its source asks for"]


def test_code_of_joined_branches_belongs_to_what_lacks_it():
    lost = PTX.replace("// rows.py:16:28", "// rows.py:0:0").replace(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd48, {%r177, %r122}], [%r178]",
        "st.global.v4.b32 [ %rd5 + 0 ], { %r1 }",
    )
    assert of(lost) == {**AS_ASKED, "tile_stores": 0.0}
    assert excess("rows_kernel", "sm_90", of(lost)) == [
        "stores no tile, and its source does: the code was not understood"
    ]
    without_calls = PTX.replace(" @[ rows.py:12:16 ]", "")
    assert of(without_calls) == AS_ASKED


@pytest.mark.parametrize("load", ["ld.global", "cp.async.c"])
def test_code_that_is_not_understood_does_not_pass(load):
    found = of(PTX.replace(load, "ldx.global"))
    unread = ["loads no tile, and its source does: the code was not understood"] if load == "cp.async.c" else []
    assert excess("rows_kernel", "sm_90", found) == unread
    nothing = of("")
    assert (nothing["tile_loads"], nothing["tile_stores"], nothing["unplaced"]) == (0, 0, 0)
    assert len(excess("rows_kernel", "sm_90", nothing)) == 2


def test_stores_without_a_place_are_shared_out_in_code_for_amd():
    def stored(times):
        line = "\tbuffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen\n"  # 64 lanes, 1024 bytes of the 2048 of a tile
        asm = {"ttir": TTIR, "amdgcn": AMDGCN.replace("buffer_store_short", "no_store") + times * line}
        return factors(TARGETS["gfx942"], asm, warps=1)["tile_stores"]

    assert [stored(times) for times in (0, 1)] == [0, 0], "less than a tile"
    assert stored(2) == pytest.approx(2048 / 2052, abs=1e-3)
    assert stored(3) == 1


def test_factors_of_a_kernel_are_the_largest_of_all_present_records(tmp_path):
    sources = ["kernels/se.py"]
    record = {"kernel": "a", "target": "sm_90", "sources": sources, "source_sha256": environment.source_hash(sources)}
    explained, target = next(iter(EXPLAINED))
    records = [
        {**record, "factors": {**AS_ASKED, "tile_stores": 4.0}},
        {**record, "factors": {**AS_ASKED, "tile_stores": 0.5, "tile_loads": None}},
        {**record, "kernel": "stale", "factors": AS_ASKED},
        {**record, "kernel": "stale", "factors": AS_ASKED, "source_sha256": "0"},
        {**record, "kernel": "unknown"},
        {**record, "kernel": explained, "target": target, "factors": {**AS_ASKED, "tile_stores": 4.0}},
    ]
    (tmp_path / "sm_90.json").write_text(json.dumps({"records": records}))
    once = {"loads": 1.0, "stores": 1.0}
    assert worst_factors(tmp_path) == {"a": {"loads": 1.0, "stores": 4.0}, explained: once}
    assert worst_factors(tmp_path / "nowhere") == {}


def test_no_kernel_moves_a_tile_more_often_than_its_source_says():
    results = read_targets(environment.RESULTS / "aot")
    assert set(results) == set(TARGETS)
    above = set()
    for target, result in results.items():
        for record in result["records"]:
            assert excess(record["kernel"], target, record["factors"]) == [], record["kernel"]
            if max(record["factors"][f"tile_{kind}"] or 0 for kind in ("loads", "stores")) > 1:
                above.add((record["kernel"], target))
            if TARGETS[target].backend == "cuda":
                assert record["factors"]["unplaced"] == 0, record["kernel"]
                # A pipeline fills its stages before the loop begins, and no more.
                assert record["factors"]["ahead"] <= record["num_stages"], record["kernel"]
    assert above == set(EXPLAINED)


def test_the_table_has_a_row_for_each_kernel():
    results = read_targets(environment.RESULTS / "aot")
    kernels = {record["kernel"] for result in results.values() for record in result["records"]}
    lines = factors_table(results, environment.ROOT)
    assert {line.split()[1] for line in lines[2:-2]} == kernels
    assert "se_weight_grad_kernel on gfx942" in lines[-1]
    assert "| wgrad_kernel | 1 | 1 |" in "\n".join(lines)
    assert render("aot_factors").splitlines()[: len(lines)] == lines


def test_results_without_factors_have_no_table():
    assert factors_table({"sm_90": {"records": [{"kernel": "a"}]}}, environment.ROOT) == []


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_what_is_explained_is_so_on_its_target_alone(target):
    found = {**AS_ASKED, "tile_stores": 4.0}
    assert bool(excess("se_weight_grad_kernel", target, found)) == (target != "gfx942")
    assert excess("se_weight_grad_kernel", target, {**found, "tile_stores": 5.0})
