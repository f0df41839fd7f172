#!/usr/bin/env bash
# Everything that needs a GPU. `make test-gpu` runs all of it; naming parts runs those, in the order given.
#   tests/gpu.sh [build] [test] [sanitize] [bench] [loader] [throughput] [numerics] [accuracy]
# A part that fails does not stop the next; the exit status is 1 if any failed. Each part but the last two is meant to end
# within ten minutes; build must have run once before the others.
# Build leaves dependencies alone: pytest, tyro, pyarrow, tqdm, Pillow and safetensors must be there, DALI where it says so.
#   PYTHON   the python to use (default python3)
#   OUT      where JSON results go (default bench/results)
#   LOADER   the loader's sets, "NAME=LIST=PX ..." (see bench/loader.py); without it, or without DALI, loader is skipped
#   OFFICIAL a clone of salesforce/MoPro, timed beside ours in throughput
#   NUMERICS what bench/numerics.py takes, "TRAIN-LIST TEST-LIST ..."; without it, or without DALI, numerics is skipped
#   CIFAR10N an unpacked CIFAR-10N folder (see bench/cifar10n.py); without it, or without DALI, accuracy is skipped
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
results=()

# run NAME COMMAND...: note whether it passed.
run() {
  local name=$1 began=$SECONDS verdict=passed
  shift
  "$@" || verdict="FAILED (status $?)"
  results+=("$name: $verdict, $((SECONDS - began)) s")
}

build() {
  # Editable: tests run from this folder, whose mopro_fast must have the extension and the kernels.
  run build "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .
  run env "$python" -m mopro_fast env
}

test_() {
  # -W default: warnings are errors elsewhere, but no GPU has said its own yet; here they are printed.
  run "op tests" "$python" -m pytest -q -W default tests/test_ops.py tests/test_{two_views,normalize,batch_norm_act,conv1x1_stats}.py \
    tests/test_*_cuda.py
  local others=(tests/test_optim.py tests/test_augment.py tests/test_cache.py tests/test_train_step.py)
  if "$python" -c 'import nvidia.dali' 2>/dev/null; then others+=(tests/test_pipeline.py); fi
  run "other GPU tests" "$python" -m pytest -q -W default -m gpu "${others[@]}"
}

# Every kernel at two small odd shapes in both types (bench/ops.py --check), then the tests with traps and with labels
# and cursors from nowhere. A cached allocation hides what is written past its end, so memcheck gets one cudaMalloc for
# each tensor, under which nothing can be captured in a graph.
sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    results+=("sanitize: FAILED (compute-sanitizer is not on the PATH)")
    return
  fi
  local check=("$python" bench/ops.py --check --quick --device cuda)
  local memcheck=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 200 compute-sanitizer --tool memcheck --error-exitcode 1)
  run "memcheck, all ops" "${memcheck[@]}" "${check[@]}"
  run "racecheck, all ops" timeout 150 compute-sanitizer --tool racecheck --error-exitcode 1 "${check[@]}"
  run "memcheck, kernel tests" "${memcheck[@]}" "$python" -m pytest -q -W default \
    tests/test_ops.py tests/test_{ema_update,sgd_ema_update,queue_enqueue,prototype_update}_cuda.py \
    -k "not graph and not opcheck and ((test_ops and (triton or cuda) and (traps or many_splits)) or ([cuda or -cuda))"
}

bench() {
  run "bench/ops.py" "$python" bench/ops.py --results "$out"
}

loader() {
  if [ -z "${LOADER:-}" ]; then
    results+=("loader: skipped (LOADER is not set)")
  elif ! "$python" -c 'import nvidia.dali' 2>/dev/null; then
    results+=("loader: skipped (DALI is not installed)")
  else
    read -ra sets <<<"$LOADER"
    run loader "$python" bench/loader.py "${sets[@]}" --results "$out"
  fi
}

throughput() {
  run "bench/throughput.py" "$python" bench/throughput.py --results "$out" ${OFFICIAL:+--official "$OFFICIAL"}
}

numerics() {
  if [ -z "${NUMERICS:-}" ]; then
    results+=("numerics: skipped (NUMERICS is not set)")
  elif ! "$python" -c 'import nvidia.dali' 2>/dev/null; then
    results+=("numerics: skipped (DALI is not installed)")
  else
    read -ra arguments <<<"$NUMERICS"
    run numerics "$python" bench/numerics.py "${arguments[@]}" --results "$out"
  fi
}

accuracy() {
  if [ -z "${CIFAR10N:-}" ]; then
    results+=("accuracy: skipped (CIFAR10N is not set)")
  elif ! "$python" -c 'import nvidia.dali' 2>/dev/null; then
    results+=("accuracy: skipped (DALI is not installed)")
  else
    run accuracy "$python" bench/cifar10n.py "$CIFAR10N" --results "$out"
  fi
}

parts=("$@")
[ $# -gt 0 ] || parts=(build test sanitize bench loader throughput numerics accuracy)
for part in "${parts[@]}"; do
  case $part in
    build | test | sanitize | bench | loader | throughput | numerics | accuracy) ;;
    *) echo "tests/gpu.sh: no part $part: choose build, test, sanitize, bench, loader, throughput, numerics or accuracy" >&2 && exit 2 ;;
  esac
done
if ! "$python" -c 'import torch; assert torch.cuda.is_available()'; then
  echo "tests/gpu.sh: no CUDA GPU that PyTorch can use" >&2
  exit 1
fi
for part in "${parts[@]}"; do
  [ "$part" = test ] && part=test_
  "$part"
done
"$python" bench/tables.py --print ops ops_requirements loader throughput_gpu throughput_requirements numerics cifar10n --results "$out"
printf '%s\n' "${results[@]}"
! printf '%s\n' "${results[@]}" | grep -q FAILED
