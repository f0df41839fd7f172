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
from cases import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = {"": cases.PAPER, "model": cases.MODELS[0], "side": cases.STAGES[0], "K": cases.CONVOLUTIONS[0]}
CPU = {"": cases.QUICK[0], "model": cases.Shape(model="few"), "side": cases.QUICK_MAPS[0], "K": cases.QUICK_MAPS[2]}
SHAPES = GPU if DEVICE == "cuda" else CPU
CASES = [Case(op, SHAPES[cases.kind_of(fields)]) for op, fields in cases.FIELDS.items()]


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
