#!/usr/bin/env bash
# What only a CUDA machine can tell, for one that is there for minutes.
#   tests/gpu.sh [--dry] [--limit NAME=SECONDS]... [GROUP or STAGE ...]
# Stages run in the order below, the most telling first. Each ends at a limit of its own and stops no other.
# The groups first and second are planned for five minutes each, long takes its time. Without names all three run.
# `build speedup-tests speedups`, after first: each speed-up of mopro_fast/models/speedups.py in a step; five minutes, too.
# OUT/GROUP.log has what its stages print, as it comes. The exit status is 1 if a stage failed or was stopped.
# PyTorch, Triton and NumPy are enough to begin: a stage that lacks more is skipped and says so. Wheels in .whl are there for
# this run.
#   --dry    on a CPU: the same stages with small shapes and few tests, no build and no compute-sanitizer
#   --limit  another limit for a stage; all=SECONDS: for every stage
#   PYTHON   the python to use (default python3)
#   OUT      where logs and JSON results go (default bench/results)
#   MOPRO_FAST_COMMIT  what results name where there is no git (default: git's answer)
#   LOADER   the loader's sets, "NAME=LIST=PX ..." (see bench/loader.py)
#   OFFICIAL a clone of salesforce/MoPro, timed beside ours in throughput
#   NUMERICS what bench/numerics.py takes, "TRAIN-LIST TEST-LIST ..."
#   CIFAR10N an unpacked CIFAR-10N folder (see bench/cifar10n.py)
set -uo pipefail
cd "$(dirname "$0")/.." || exit
began=${EPOCHREALTIME/[.,]/}

# STAGE:LIMIT in seconds; behind it the seconds expected of an H100 (not measured).
first=(
  build:120         # 40
  smoke:90          # 40
  step-256:120      # 55
  step-32:60        # 20
  official:100      # 40
  op-tests:110      # 60
  cuda-tests:90     # 40
)
second=(
  build:120         # 40; 5 where it has been built
  nccl:90           # 35
  resume:120        # 40
  ops-timed:130     # 105
  beyond-32-bits:60 # 15
  memcheck:150      # 45
  racecheck:80      # 20
)
long=(build:120 speedup-tests:150 speedups:240 dali-tests:300 text-tests:120 memcheck-tests:400 ops:600 loader:900 throughput:900)
long+=(numerics:14400 accuracy:86400 tables:60)
stages=" ${first[*]%:*} ${second[*]%:*} ${long[*]%:*} "

usage() {
  echo "tests/gpu.sh: $1" >&2
  echo "usage: tests/gpu.sh [--dry] [--limit NAME=SECONDS]... [NAME ...], with names of first (${first[*]%:*})," \
    "second (${second[*]%:*}), long (${long[*]%:*})" >&2
  exit 2
}

dry="" chosen=" "
declare -A limits=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry) dry=1 ;;
    --limit)
      [[ ${2:-} =~ ^([a-z0-9-]+)=([0-9]+(\.[0-9]+)?)$ ]] || usage "--limit takes NAME=SECONDS"
      [[ " all$stages" == *" ${BASH_REMATCH[1]} "* ]] || usage "no stage ${BASH_REMATCH[1]}"
      limits[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
      shift
      ;;
    *)
      [[ " first second long$stages" == *" $1 "* ]] || usage "no group or stage $1"
      chosen+="$1 "
      ;;
  esac
  shift
done
[ "$chosen" != " " ] || chosen=" first second long "

tmp=$(mktemp -d) || exit
export PYTHON=${PYTHON:-python3} OUT=${OUT:-bench/results} PYTHONUNBUFFERED=1 MOPRO_FAST_REQUIRE_CUDA=1
export PATH=$PATH:/usr/local/cuda/bin MOPRO_FAST_CUDA_ARCHS=${MOPRO_FAST_CUDA_ARCHS:-90}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/mopro_fast_triton_$UID} # kept for the next call
commit=${MOPRO_FAST_COMMIT:-$(git describe --always --dirty --exclude '*' 2>/dev/null)}
[ -z "$commit" ] || export MOPRO_FAST_COMMIT=$commit
export tmp dry device=cuda
small=() steps=() throughput=() timed=() some_ops=() cuda_only=(-n 12 -m gpu)
plain_norms=("ours, BatchNorm in plain PyTorch") fast="official, autocast + channels-last"
if [ -n "$dry" ]; then
  unset TRITON_INTERPRET # the tests set it themselves
  export CUDA_VISIBLE_DEVICES="" device=cpu
  export OMP_NUM_THREADS=1 # where others use the cores, threads wait for each other
  small=(--small) steps=(--small --classes 10 --seconds 0.1) timed=(--seconds 1 --compile-seconds 0)
  throughput=(--batch-sizes 8 --classes 10 --arch resnet18 --image-size 32 --seconds 0.1)
  some_ops=(--only normalize) cuda_only=()
  plain_norms=() fast="official, channels-last"
fi
trainer=(tyro docstring_parser typeguard pyarrow tqdm PIL simplejpeg)
op_tests=(tests/test_ops.py tests/test_two_views.py tests/test_two_views_arithmetic.py tests/test_normalize.py)
op_tests+=(tests/test_batch_norm_act.py tests/test_conv1x1_stats.py tests/test_collective_targets.py)
speedup_tests=(tests/test_batch_norm_act.py tests/test_speedups.py tests/test_key_stream.py tests/test_batch_norm_variants.py)
speedup_tests+=(tests/test_batch_norm_relu_pool.py tests/test_train_step.py)
cuda_tests=(tests/test_*_cuda.py tests/test_optim.py tests/test_train_step.py tests/test_augment.py tests/test_cache.py)

# define STAGE: sets command; needs, modules beyond PyTorch and Triton; lacks, why it cannot run; show, lines at its end.
define() {
  command=() needs=() lacks="" show=3
  case $1 in
    build) command=(bash -c build) show=23 ;;
    smoke) command=(bash -c smoke) show=1 ;;
    step-256) step step_256 --variants ours "${plain_norms[@]}" "the two encoders alone" --batch-sizes $((dry ? 8 : 256)) ;;
    speedup-tests)
      tests "signs_are and reference" -n $((dry ? 2 : 12)) --maxfail=30 \
        -k "not beyond_32_bits and (one-launch or not test_batch_norm_act)" "${speedup_tests[@]}"
      ;;
    speedups)
      step step_speedups --speedups --batch-sizes $((dry ? 8 : 256)) $((dry ? 4 : 32))
      [ -n "$dry" ] || command+=(--seconds 0.5)
      ;;
    step-32) step step_32 --variants ours --batch-sizes $((dry ? 4 : 32)) ;;
    official)
      step step_official --variants "official, float32 NCHW" "$fast" "supervised, plain PyTorch"
      command+=(--batch-sizes $((dry ? 8 : 256)) $((dry ? 4 : 32)))
      ;;
    op-tests)
      tests "test_normalize and reference" -n $((dry ? 2 : 12)) --maxfail=30 \
        -k "not beyond_32_bits and not one-launch" "${op_tests[@]}"
      ;;
    cuda-tests) tests single_operations --maxfail=30 "${cuda_only[@]}" "${cuda_tests[@]}" ;;
    nccl | resume)
      command=("$PYTHON" tests/gpu_trainer.py "$1" --device "$device" "${small[@]}" "$tmp/$1")
      needs=("${trainer[@]}")
      ;;
    ops-timed)
      command=("$PYTHON" bench/ops.py --device "$device" --results "$OUT" --seconds 95 --compile-seconds 0 "${timed[@]}")
      command+=(--only sgd_ema_update_ ema_update_ batch_norm_act batch_norm_relu_pool conv1x1_stats_ normalize two_views head) show=30
      ;;
    beyond-32-bits) tests beyond_32_bits -k beyond_32_bits tests/test_ops.py tests/test_batch_norm_{act,relu_pool}.py ;;
    # Every kernel at two small odd shapes in each type.
    memcheck | racecheck) sanitized "$1" "$PYTHON" bench/ops.py --check --quick --device "$device" "${some_ops[@]}" ;;
    # With traps, and with labels and cursors from nowhere.
    memcheck-tests)
      tests "traps and reference" \
        tests/test_ops.py tests/test_{ema_update,sgd_ema_update,queue_enqueue,prototype_update}_cuda.py -k \
        "not graph and not opcheck and ((test_ops and (triton or cuda) and (traps or many_splits)) or ([cuda or -cuda))"
      sanitized memcheck "${command[@]}"
      ;;
    dali-tests)
      tests gpu -m gpu tests/test_pipeline.py
      needs+=(nvidia.dali)
      ;;
    text-tests)
      tests "the published code" -m gpu tests/test_rerank.py tests/test_minilm.py
      needs+=("${trainer[@]}" scipy)
      ;;
    ops) command=("$PYTHON" bench/ops.py --device "$device" --results "$OUT" "${timed[@]}") ;;
    loader) measured LOADER bench/loader.py ;;
    throughput)
      command=("$PYTHON" bench/throughput.py --device "$device" --results "$OUT" "${throughput[@]}")
      command+=(${OFFICIAL:+--official "$OFFICIAL"})
      needs=("${trainer[@]}")
      ;;
    numerics) measured NUMERICS bench/numerics.py ;;
    accuracy) measured CIFAR10N bench/cifar10n.py ;;
    tables)
      command=("$PYTHON" bench/tables.py --results "$OUT" --print ops ops_requirements loader throughput_gpu)
      command+=(throughput_requirements numerics cifar10n) show=200
      ;;
  esac
}

# step NAME ARGUMENT...
step() {
  command=("$PYTHON" bench/step.py --device "$device" --results "$OUT" --name "$1" "${steps[@]}" "${@:2}")
  show=45
}

# tests EXPRESSION ARGUMENT...: of those that the arguments choose, in a dry run those of the expression.
tests() {
  command=("$PYTHON" -m pytest -q -W default "${@:2}") # elsewhere warnings are errors, but no GPU has said its own yet
  [ -z "$dry" ] || command+=(-k "$1")
  needs=(pytest xdist)
}

# sanitized TOOL COMMAND...: one cudaMalloc for each tensor, for a cached allocation hides what is written past its end.
sanitized() {
  command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 1)
  if [ -n "$dry" ]; then
    command=(bash -c 'echo "without compute-sanitizer"; exec "$@"' _)
  elif ! type -P compute-sanitizer >/dev/null; then
    lacks="compute-sanitizer is not on the PATH"
  fi
  command+=("${@:2}")
}

# measured VARIABLE SCRIPT: the script with the words of the variable.
measured() {
  local words
  read -ra words <<<"${!1:-}"
  command=("$PYTHON" "$2" "${words[@]}" --results "$OUT")
  needs=("${trainer[@]}" nvidia.dali)
  [ ${#words[@]} -gt 0 ] || lacks="$1 is not set"
}

build() { # editable: tests run from this folder, whose mopro_fast must have the extension
  if [ -n "$dry" ]; then
    echo "a dry run builds nothing"
  elif ! "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .; then
    # Triton's kernels need no build: the stages of those still run.
    ln -s ../kernels mopro_fast/kernels && touch "$tmp/linked"
    return 1
  fi
  "$PYTHON" -m mopro_fast env
}

smoke() { # every op against float64, each in a process of its own, for compiling takes longest
  local ops
  mapfile -t ops < <(sed -n '/^FIELDS/,/^}/s/^    "\(\w*\)".*/\1/p' bench/cases.py | head -n $((dry ? 2 : 99)))
  mkdir "$tmp/smoke"
  printf '%s\n' "${ops[@]}" | xargs -P 8 -I{} bash -o pipefail -c "check {}" && echo "right: ${ops[*]}" && return
  cd "$tmp/smoke" && tail -n 3 -- * && grep WRONG -- *
  return 1
}

check() {
  "$PYTHON" bench/ops.py --check --quick --device "$device" --only "$1" 2>&1 | tee "$tmp/smoke/$1" | sed -u "s/^/$1: /" &&
    rm "$tmp/smoke/$1"
}
export -f build smoke check

mark=MOPRO_FAST_STAGE_OF_$$=1 # in the environment of whatever a stage starts
running="" verdicts=()

# run STAGE LIMIT LOG
run() {
  local name=$1 limit=$2 log=$3 from since status verdict shown=20
  define "$name"
  lacks=${lacks:-$("$PYTHON" -c "$first_missing" "${needs[@]}")}
  [ -z "$lacks" ] || { say "$name: skipped ($lacks)" && return; }
  echo "== $name: ${command[*]}" >>"$log"
  from=$(stat -c %s "$log") since=${EPOCHREALTIME/[.,]/} running=$name
  timeout -k 5 "$limit" env "$mark" "${command[@]}" >>"$log" 2>&1 &
  while kill -0 $! 2>/dev/null; do
    sleep 0.1
    bound "$log" "$from" 3
  done
  wait $!
  status=$?
  kill_left
  bound "$log" "$from" 2
  running=""
  since=$((${EPOCHREALTIME/[.,]/} - since))
  verdict="FAILED (status $status)"
  [ $status != 0 ] || verdict=passed shown=$show
  if [[ $status = 124 || ($status = 137 && $((since / 1000000)) -ge ${limit%.*}) ]]; then
    verdict="stopped at its limit of $limit s"
  fi
  say "$name: $verdict, $(seconds $since) s"
  tail -c "+$((from + 1))" "$log" | grep -a . | tail -n "$shown" | cut -c 1-300 | sed 's/^/    /'
}

say() {
  verdicts+=("$1, at $(seconds $((${EPOCHREALTIME/[.,]/} - began))) s")
  echo "${verdicts[-1]}"
}

seconds() { printf '%d.%d' $(($1 / 1000000)) $(($1 / 100000 % 10)); }

# bound LOG FROM MOST: if there are more megabytes than MOST from byte FROM on, the first and the last of them stay.
bound() {
  local mb=1000000
  (($(stat -c %s "$1") - $2 > $3 * mb)) || return
  tail -c $mb "$1" >"$tmp/end"
  truncate -s $(($2 + mb)) "$1"
  { printf '\n... cut ...\n' && cat "$tmp/end"; } >>"$1"
}

# Those of a stage's processes that its limit did not reach: torchrun's are in sessions of their own.
kill_left() {
  local pids
  for _ in {1..50}; do
    pids=$(grep -lszx "$mark" /proc/[0-9]*/environ | tr -cd '0-9\n')
    [ -n "$pids" ] || return
    xargs kill -9 <<<"$pids" 2>/dev/null
    sleep 0.05
  done
}

finish() {
  if [ -n "$running" ]; then
    kill $! # timeout
    kill_left
    say "$running: interrupted"
  fi
  printf '%s\n' "" "${verdicts[@]}"
  [ ! -e "$tmp/linked" ] || rm mopro_fast/kernels
  rm -rf "$tmp"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

first_missing='
import importlib.util, sys
for name in sys.argv[1:]:
    try:
        there = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        there = None
    if not there:
        print(name, "is missing: carry its wheel in .whl")
        break
'
about='
import os, platform, sys
from importlib.metadata import PackageNotFoundError, version
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
print("python", platform.python_version(), *(f"{name} {of(name)}" for name in ("torch", "triton", "numpy", "setuptools")))
if not os.environ["dry"]:
    import torch
    torch.cuda.is_available() or sys.exit("tests/gpu.sh: no CUDA GPU that PyTorch can use")
'
mkdir -p "$OUT" || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # if the build fails
if compgen -G '.whl/*.whl' >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$tmp/site" .whl/*.whl
  PYTHONPATH=$tmp/site:$PYTHONPATH
fi
for tool in nvidia-smi nvcc g++ compute-sanitizer ncu; do type -P $tool || echo "$tool is missing"; done
if type -P nvidia-smi >/dev/null; then
  nvidia-smi -L
  nvidia-smi --query-gpu=driver_version,memory.free,memory.total --format=csv
fi
timeout 120 "$PYTHON" -c "$about" || exit 1

for group in first second long; do
  declare -n entries=$group
  log=""
  for entry in "${entries[@]}"; do
    name=${entry%:*}
    [[ $chosen == *" $group "* || $chosen == *" $name "* ]] || continue
    [[ " ${verdicts[*]}" != *" $name: "* ]] || continue # build is in every group
    [ -n "$log" ] || : >"$OUT/$group.log"
    log=$OUT/$group.log
    run "$name" "${limits[$name]:-${limits[all]:-${entry#*:}}}" "$log"
  done
done
! printf '%s\n' "${verdicts[@]}" | grep -qE ": (FAILED|stopped)"
