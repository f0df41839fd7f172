#!/usr/bin/env bash
# Everything that needs a GPU, in one go: correctness, compute-sanitizer, then timings. `make test-gpu` calls it.
#   PYTHON   the python to use (default python3)
#   OUT      where JSON results go (default bench/results)
#   CIFAR10N an unpacked CIFAR-10N folder (see bench/cifar10n.py); without it, or without DALI, that part is skipped
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA GPU that torch can use"'
"$python" -c 'import mopro_fast._C' 2>/dev/null || "$python" -m pip install --no-build-isolation --no-deps .
"$python" -m mopro_fast env
"$python" -m pytest -q tests/test_ops.py tests/test_ema_update_cuda.py
"$python" -m pytest -q -m gpu tests --ignore tests/test_ema_update_cuda.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q tests/test_ops.py -k "cuda_ema or ema_update"
  done
else
  echo "compute-sanitizer is not on the PATH: not run"
fi
"$python" bench/ema.py --results "$out"
if [ -z "${CIFAR10N:-}" ]; then
  echo "CIFAR10N is not set: the accuracy run on CIFAR-10N is skipped"
elif ! "$python" -c 'import nvidia.dali' 2>/dev/null; then
  echo "DALI is not installed: the accuracy run on CIFAR-10N is skipped"
else
  "$python" bench/cifar10n.py "$CIFAR10N" --results "$out"
fi
