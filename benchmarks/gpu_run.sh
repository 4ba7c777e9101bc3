#!/usr/bin/env bash
# On a machine with a GPU: all that only a GPU can show, in one command of less than nine minutes.
#
#     benchmarks/gpu_run.sh [build] [test] [sanitize] [train] [bench]        without names: all five
#
# Nothing is installed: PYTHON (python3) is an interpreter that has PyTorch. Log, rows and summary go into OUT
# (benchmarks/results). A step that fails or exceeds its time does not stop the later ones: the exit status tells.
# benchmarks/README.md says more.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

read -ra python <<< "${PYTHON:-python3}"
out=${OUT:-benchmarks/results}
limit=${GPU_RUN_SECONDS:-520}
chosen=("${@:-all}")
for name in "${chosen[@]}"; do
  if [[ ! $name =~ ^(all|build|test|sanitize|train|bench)$ ]]; then
    echo "gpu_run: expected build, test, sanitize, train or bench, got '$name'" >&2
    exit 2
  fi
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"
export LENET_FAST_CUDA="${LENET_FAST_CUDA:-1}"

facts=$("${python[@]}" benchmarks/gpu_report.py before) || exit 2
read -r gpu capability <<< "$facts"
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}" # what other GPUs need takes time
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu_run.log
steps=$(mktemp)
trap 'rm -f "$steps"' EXIT
: > "$log"

# step GROUP NAME SECONDS COMMAND...: run the command if its group was chosen, for so long at most
step() {
  local group=$1 name=$2 seconds=$3 left=$((limit - SECONDS)) start=$SECONDS
  shift 3
  [[ " ${chosen[*]} " == *" all "* || " ${chosen[*]} " == *" $group "* ]] || return 0
  echo "$name ..." >&2
  if ((left < 1)); then
    printf '%s\tno time left\t0\t\n' "$name" >> "$steps"
    return 0
  fi
  printf '\n=== %s: %s\n' "$name" "$*" >> "$log"
  timeout --signal=INT --kill-after=10 $((seconds < left ? seconds : left)) "$@" >> "$log" 2>&1
  printf '%s\t%s\t%s\t%s\n' "$name" $? $((SECONDS - start)) "$(tail -n 1 "$log" | tr -d '\t')" >> "$steps"
}

pytest=("${python[@]}" -m pytest -p no:cacheprovider)
parallel=()
if "${pytest[@]}" -p xdist.plugin --markers > /dev/null 2>&1; then parallel=(-p xdist.plugin -n "$(nproc)"); fi
mapfile -t operators < <(grep -l "implementations()" tests/test_*.py) # no others: only importing them takes its time
training=tests/test_cuda_training.py
check=(--error-exitcode 1 "${pytest[@]}" tests/test_cuda.py "$training" -k test_small)

step build build 150 "${python[@]}" setup.py --quiet build_ext --inplace
step build env 20 "${python[@]}" -m lenet_fast env
step test training 60 "${pytest[@]}" "${parallel[@]}" "$training" -m "not alone"
step test operators 110 "${pytest[@]}" "${parallel[@]}" "${operators[@]}" \
  -m "not alone" -k "cuda-native or cuda-triton or test_cuda.py"
step test alone 40 "${pytest[@]}" "${operators[@]}" "$training" -m alone
# Uncached, every tensor is an allocation of its own: reading past its end is an error.
step sanitize memcheck 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck "${check[@]}"
step sanitize racecheck 45 compute-sanitizer --tool racecheck "${check[@]}"
step sanitize initcheck 25 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool initcheck "${check[@]}"
read -ra options <<< "${GPU_RUN_TRAIN:-}" # more of them, for bench_train.py
step train train 150 "${python[@]}" benchmarks/bench_train.py --device cuda --csv "$out/train_$gpu.csv" \
  --networks lenet5-d2l,lenet5,lenet5-sparse,lenet5-1998,lenet1,lenet5-wide --batch 128,4096,512,32 --rounds 5 --sample-ms 1 \
  --rivals fused-step,fused-phases,eager,compile,compile-graph,jax-scan --keep-going --seconds 110 "${options[@]}"
if [[ -n ${LENET_FAST_DATA:-} ]]; then # the 60,000 digits are there
  step train accuracy 45 "${python[@]}" benchmarks/time_to_accuracy.py --device cuda --seeds 20 \
    --csv "$out/time_to_accuracy_$gpu.csv"
fi
read -ra options <<< "${GPU_RUN_BENCH:-}" # more of them, for bench_ops.py
left=$((limit - SECONDS - 20))
step bench bench "$limit" "${python[@]}" benchmarks/bench_ops.py --device cuda --csv "$out/gpu_$gpu.csv" \
  --batch 128,8192 --passes forward+backward,forward --rounds 15 --sample-ms 5 \
  --rivals fused-triton,eager,eager-channels-last,compile,compile-channels-last \
  --keep-going --seconds $((left > 0 ? left : 0)) "${options[@]}"

"${python[@]}" benchmarks/gpu_report.py after "$steps" "$out/gpu_$gpu"
