"""The cases of ``python -m benchmarks ops`` under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

Compare two checkouts with ``--benchmark-save=before`` in one and ``--benchmark-compare`` in the other. A GPU is waited
for in every call, so that small ops show their launches too; the command has the finer clock.
"""

import pytest
import torch

from benchmarks.floors import DIRECTIONS, total_bytes, total_flop
from benchmarks.op_cases import cases
from benchmarks.op_timing import argument_sets, kept_graphs, make_calls
from benchmarks.op_variants import no_interpreter, variants
from benchmarks.timing import synchronize
from scalelong_fast.ops import list_plans

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases(DEVICE)


def _parameters():
    for case in CASES:
        for variant in ("eager", "compile", "dispatch", *(plan for plan in list_plans(case.op) if plan != "eager")):
            for direction in DIRECTIONS:
                yield pytest.param(
                    case, variant, direction, id=f"{case}-{variant}-{direction}".replace(" × ", "x").replace(" ", "_")
                )


@pytest.fixture(scope="module")
def prepared():
    """Variants and arguments of the case that was asked for last; those of all would not fit."""
    last = {}

    def prepare(case):
        if case not in last:
            last.clear()
            torch.compiler.reset()
            examples = argument_sets(case, DEVICE)
            last[case] = {v.name: v for v in variants(case, DEVICE, examples[0])}, examples
        return last[case]

    with no_interpreter(), kept_graphs():
        yield prepare


@pytest.mark.parametrize(("case", "name", "direction"), _parameters())
def test_op(benchmark, prepared, case, name, direction):
    found, examples = prepared(case)
    variant = found[name]
    if variant.obstacle is not None:
        pytest.skip(variant.obstacle)
    benchmark.group = f"{case} {direction}"
    benchmark.name = name
    benchmark.extra_info.update(plan=variant.plan, bytes=total_bytes(case, direction), flop=total_flop(case, direction))
    with variant.forced():
        calls = make_calls(case, variant, examples, direction)
        turn = iter(range(1 << 62))

        def call():
            result = calls[next(turn) % len(calls)]()
            synchronize(DEVICE)
            return result

        for _ in range(2):
            call()
        benchmark.pedantic(call, rounds=15, iterations=1, warmup_rounds=2)
