#!/usr/bin/env bash
# On a machine with a GPU: all that only a GPU can show, in two stages of minutes, the figures first.
#
#     benchmarks/gpu_run.sh first      at most 270 s: smoke test, our trainer alone, its phases, the headline race
#     benchmarks/gpu_run.sh second     at most 450 s: tests, the other races, time to accuracy, sanitizers, operators
#
# Names of steps behind the stage choose some of them: benchmarks/gpu_run.sh second races operators
#
# Nothing is installed: PYTHON (python3) is an interpreter that has PyTorch. Compiled libraries come from the folder
# .gpu (make gpu-bundle) if it was made of these sources and loads here; otherwise _C_cuda is built. All results go into
# OUT (benchmarks/results), at most eight files, each replaced as a whole after every step or race. A step that fails or
# exceeds its time does not stop the later ones: the exit status tells. benchmarks/README.md says more.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

read -ra python <<< "${PYTHON:-python3}"
stage=${1:-}
chosen=("${@:2}")            # steps; none: all
slower=${GPU_RUN_SLOWER:-1}  # every limit is so many times as long: for a pretended GPU
case $stage in
  first) limit=$((slower * ${GPU_RUN_SECONDS:-270})) ;;
  second) limit=$((slower * ${GPU_RUN_SECONDS:-450})) ;;
  *)
    echo "gpu_run: expected first or second, got '$stage'" >&2
    exit 2
    ;;
esac
reserve=15 # seconds of the limit for a step that has to be killed, and for the summary
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"

facts=$(timeout $((60 * slower)) "${python[@]}" benchmarks/gpu_report.py before) || exit 2
read -r gpu capability <<< "$facts"
out=${OUT:-benchmarks/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu_run_$stage.log
summary=$out/${stage}_${gpu}.md
work=$(mktemp -d)
child=
trap 'rm -rf "$work"' EXIT
trap '[[ -n $child ]] && kill "$child"; exit 130' INT TERM
steps=$work/steps
touch "$work/begin" # results that are older are of another run
printf '| step | | from | to | last words |\n| --- | --- | --- | --- | --- |\n' > "$steps"
: > "$log"
failed=0

# step NAME SECONDS COMMAND...: run the command, for so long at most and not beyond the stage's limit
step() {
  local name=$1 seconds=$((slower * $2)) left=$((limit - reserve - SECONDS)) start=$SECONDS status=0 outcome
  shift 2
  ((${#chosen[@]} == 0)) || [[ " build ${chosen[*]} " == *" $name "* ]] || return 0
  echo "$name ..." >&2
  printf '\n=== %s: %s\n' "$name" "$*" >> "$log"
  if ((left < 1)); then
    outcome="no time left"
    status=124
  else
    ((seconds < left)) || seconds=$left
    timeout --signal=INT --kill-after=5 "$seconds" "$@" >> "$log" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    child=
    case $status in
      0) outcome=ok ;;
      124) outcome="OUT OF TIME" ;;
      137) ((SECONDS - start >= seconds)) && outcome="OUT OF TIME" || outcome=KILLED ;;
      *) outcome="FAILED ($status)" ;;
    esac
  fi
  ((status == 0)) || failed=1
  printf '| %s | %s | %s | %s | %s |\n' "$name" "$outcome" "$start" "$SECONDS" \
    "$(tail -n 1 "$log" | tr -d '\t' | tr '|' ' ' | cut -c 1-90 | iconv -c -f utf-8 -t utf-8)" >> "$steps"
  write_summary "$(cat "$steps")"
  return "$status"
}

# In the place of the old one at once: a kill meanwhile leaves the old one.
write_summary() {
  printf '%s\n' "$1" > "$summary.unfinished"
  mv "$summary.unfinished" "$summary"
}

# The libraries of the bundle, if it was made of these sources and they load here.
bundle=${GPU_BUNDLE:-.gpu}
unpack() {
  [[ -d $bundle/lib ]] || return 1
  if ! "${python[@]}" scripts/gpu_bundle.py check "$bundle" >> "$log" 2>&1; then
    echo "gpu_run: the bundle was made of other sources" | tee -a "$log" >&2
    return 1
  fi
  rm -f lenet_fast/*.so
  cp "$bundle"/lib/*.so lenet_fast/
  local program="from lenet_fast import backends; raise SystemExit(backends.why_unavailable('native', 'cuda'))"
  timeout 60 "${python[@]}" -c "$program" >> "$log" 2>&1
}

unpacked=0
if [[ $gpu != pretended_gpu ]]; then # there the CPU's kernels stand in for those of the GPU
  if unpack; then
    unpacked=1
  else
    export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}" # other GPUs' code would take minutes to compile
    step build 150 env LENET_FAST_CUDA=only "${python[@]}" setup.py --quiet build_ext --inplace
  fi
fi
[[ -z ${LENET_FAST_DATA:-} && -d $bundle/mnist ]] && export LENET_FAST_DATA=$PWD/$bundle

benchmark=("${python[@]}" benchmarks/bench_train.py --device cuda --keep-going --sample-ms 1)
read -ra train_options <<< "${GPU_RUN_TRAIN:-}" # more of them, for bench_train.py
read -ra bench_options <<< "${GPU_RUN_BENCH:-}" # more of them, for bench_ops.py
training=tests/test_cuda_training.py

# sanitize NAME SECONDS TOOL COMMAND...: uncached, every tensor is an allocation of its own, and reading past it an error
sanitize() {
  local name=$1 seconds=$2 tool=$3
  shift 3
  step "$name" "$seconds" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "$@"
}

if [[ $stage == first ]]; then
  step facts 15 bash -c 'nvidia-smi; "$@"' facts "${python[@]}" -m lenet_fast env
  step smoke 40 "${python[@]}" benchmarks/gpu_smoke.py
  smoke=$?
  races=
  for batch in 128 4096 512 32; do
    for network in lenet5-d2l lenet5 lenet5-sparse lenet5-1998 lenet1 lenet5-wide; do
      races+=,$network:$batch
    done
  done
  step alone 40 "${benchmark[@]}" --csv "$out/alone_$gpu.csv" --races "${races#,}" --rounds 3 \
    --rivals fused-step,fused-phases --seconds 25 "${train_options[@]}"
  # Three times, as compilers take long: each race replaces the rows of the one before when it is done.
  headline=("${benchmark[@]}" --csv "$out/train_$gpu.csv" --races lenet5-d2l:128 --rounds 5)
  step race-eager 30 "${headline[@]}" --rivals fused-step,fused-phases,eager "${train_options[@]}"
  if ((unpacked)); then # a copy of the package, with the kernels that have clocks
    mkdir "$work/clocks" && cp -r lenet_fast "$work/clocks/" && cp "$bundle/clocks/_C_cuda.abi3.so" "$work/clocks/lenet_fast/"
    step phases 25 env PYTHONPATH="$work/clocks:$PYTHONPATH" "${python[@]}" benchmarks/phase_clocks.py \
      --instructions "$bundle/phase_instructions.csv" --csv "$out/phases_$gpu.csv"
  fi
  step race 75 "${headline[@]}" --rivals fused-step,fused-phases,eager,compile-graph "${train_options[@]}"
  if ((smoke == 1)); then # a check failed, and it was not the time that was short
    sanitize smoke-memcheck 60 memcheck "${python[@]}" benchmarks/gpu_smoke.py
  fi
  if command -v ncu > /dev/null; then
    step ncu 45 ncu --clock-control none --set full --launch-count 8 --log-file "$work/ncu.txt" \
      --kernel-name "regex:train_images_phase|update_phase|convolution|whole_image_backward" \
      "${python[@]}" benchmarks/gpu_profiled.py
    [[ -s $work/ncu.txt ]] && cp "$work/ncu.txt" "$out/ncu_$gpu.txt.unfinished" &&
      mv "$out/ncu_$gpu.txt.unfinished" "$out/ncu_$gpu.txt"
  fi
  step race-of-all 100 "${headline[@]}" --rivals fused-step,fused-phases,eager,compile,compile-graph,jax-scan \
    "${train_options[@]}"
else
  pytest=("${python[@]}" -m pytest -v -rf -p no:cacheprovider)
  if "${python[@]}" -c "import pytest_timeout" > /dev/null 2>&1; then
    # A thread ends the process of a test that hangs: a signal would wait for CUDA to come back.
    pytest+=(-p pytest_timeout --timeout 60 --timeout-method thread)
  fi
  parallel=("${pytest[@]}")
  if "${python[@]}" -c "import xdist" > /dev/null 2>&1; then parallel+=(-p xdist.plugin -n 8); fi
  step training-tests 75 "${parallel[@]}" "$training" -m "not alone"
  step operator-tests 60 "${parallel[@]}" tests/test_operators.py tests/test_transforms.py tests/test_nn.py tests/test_cuda.py \
    -m "not alone and not triton_selection" -k "cuda-native or test_cuda.py and not triton"
  step races 120 "${benchmark[@]}" --csv "$out/train_more_$gpu.csv" --rounds 5 \
    --races lenet5-d2l:4096,lenet5:128,lenet5-sparse:128,lenet5-1998:128,lenet1:128,lenet5-wide:128 \
    --rivals fused-step,compile-graph,eager --seconds 85 "${train_options[@]}"
  if [[ -n ${LENET_FAST_DATA:-} ]]; then # the 60,000 digits are there
    step accuracy 25 "${python[@]}" benchmarks/time_to_accuracy.py --device cuda --seeds 20 \
      --csv "$out/time_to_accuracy_$gpu.csv"
  fi
  check=("${pytest[@]}" "$training" -k test_small_training)
  sanitize racecheck 25 racecheck "${check[@]}" # races on a block's shared memory; blocks against each other it cannot see
  sanitize memcheck 20 memcheck "${check[@]}"
  step operators 60 "${python[@]}" benchmarks/bench_ops.py --device cuda --csv "$out/gpu_$gpu.csv" --keep-going \
    --batch 128,8192 --passes forward+backward --rounds 9 --sample-ms 3 --rivals fused-triton,eager,compile \
    --seconds 40 "${bench_options[@]}"
  step triton-tests 30 "${parallel[@]}" tests/test_triton_selection.py -k cuda-triton
  step alone-tests 20 "${pytest[@]}" tests/test_cuda.py "$training" -m alone
fi

if text=$("${python[@]}" benchmarks/gpu_report.py after "$steps" "$out" "$gpu" "$work/begin") && [[ -n $text ]]; then
  write_summary "$text"
else
  failed=1
fi
cat "$summary"
exit "$failed"
