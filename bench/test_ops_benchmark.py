"""A few cases of bench/ops.py under pytest-benchmark: `pytest bench --benchmark-only`. Small shapes on a CPU.

Host time around the call, the device waited for, L2 as the last call left it: not comparable with bench/ops.py's times.
"""

import record  # noqa: F401, first: it sets what OpenMP reads when torch is imported

# isort: split
import cases
import ops
import pytest
import torch
import variants

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = cases.PAPER, cases.MODELS[0], cases.STAGES[0], cases.CONVOLUTIONS[0], cases.IMAGES[0]
SMALL = *cases.QUICK, cases.Shape(model="few"), *cases.QUICK_MAPS
ALL = [case for shape in (LARGE if DEVICE == "cuda" else SMALL) for case in cases.cases_of(shape)]
CASES = [next(case for case in ALL if case.op == op) for op in cases.FIELDS]


@pytest.mark.parametrize("variant", ["ours", "official"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_op(case, variant, benchmark):
    op = variants.OPS[case.op]
    oracle = ops.outputs(case, op.official(cases.float64(case.state(DEVICE)))())
    errors = ops.compare(ops.outputs(case, op.official(case.state(DEVICE))()), oracle)
    result = ops.check(case, op.ours, oracle, errors, DEVICE)
    assert result["passed"], result["message"]
    call = getattr(op, variant)(case.state(DEVICE))

    def finished():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark(finished)
