#!/usr/bin/env bash
# On a machine with a GPU: all that only a GPU can show, in two stages of minutes, the figures first.
#
#     benchmarks/gpu_run.sh first      at most 270 s: smoke test, our trainer alone, its phases, the headline race
#     benchmarks/gpu_run.sh second     at most 450 s: tests, the other races, time to accuracy, sanitizers, operators
#
# Names of steps behind the stage choose some of them: benchmarks/gpu_run.sh second races operators
#
# Nothing is installed: PYTHON (python3) is an interpreter that has PyTorch. Compiled libraries come from the folder
# .gpu (make gpu-bundle) where they load; otherwise _C_cuda is built here. All results go into OUT (benchmarks/results),
# at most eight files, each written anew after every step or race: whatever ends this script, they are whole. A step
# that fails or exceeds its time does not stop the later ones: the exit status tells. benchmarks/README.md says more.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

read -ra python <<< "${PYTHON:-python3}"
stage=${1:-}
chosen=("${@:2}") # steps; none: all
slower=${GPU_RUN_SLOWER:-1} # every limit is so many times as long: for a pretended GPU
case $stage in
  first) limit=$((slower * ${GPU_RUN_SECONDS:-270})) ;;
  second) limit=$((slower * ${GPU_RUN_SECONDS:-450})) ;;
  *)
    echo "gpu_run: expected first or second, got '$stage'" >&2
    exit 2
    ;;
esac
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"

facts=$("${python[@]}" benchmarks/gpu_report.py before) || exit 2
read -r gpu capability <<< "$facts"
out=${OUT:-benchmarks/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu_run_$stage.log
summary=$out/${stage}_${gpu}.md
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
steps=$work/steps
printf '| step | | from | to | last words |\n| --- | --- | --- | --- | --- |\n' > "$steps"
: > "$log"
failed=0

# step NAME SECONDS COMMAND...: run the command, for so long at most and not beyond the stage's limit
step() {
  local name=$1 seconds=$((slower * $2)) left=$((limit - SECONDS)) start=$SECONDS status=0 outcome
  shift 2
  ((${#chosen[@]} == 0)) || [[ " ${chosen[*]} " == *" $name "* ]] || return 0
  echo "$name ..." >&2
  printf '\n=== %s: %s\n' "$name" "$*" >> "$log"
  if ((left < 1)); then
    outcome="no time left"
    status=1
  else
    timeout --signal=INT --kill-after=5 $((seconds < left ? seconds : left)) "$@" >> "$log" 2>&1
    status=$?
    case $status in
      0) outcome=ok ;;
      124 | 137) outcome="OUT OF TIME" ;;
      *) outcome="FAILED ($status)" ;;
    esac
  fi
  ((status == 0)) || failed=1
  printf '| %s | %s | %s | %s | %s |\n' "$name" "$outcome" "$start" "$SECONDS" \
    "$(tail -n 1 "$log" | tr -d '\t' | tr '|' ' ' | cut -c 1-90)" >> "$steps"
  write_summary "$(cat "$steps")"
  return "$status"
}

# In the place of the old one at once: a kill meanwhile leaves the old one.
write_summary() {
  printf '%s\n' "$1" > "$work/summary"
  cp "$work/summary" "$summary.unfinished"
  mv "$summary.unfinished" "$summary"
}

loads() {
  "${python[@]}" -c "from lenet_fast import backends; raise SystemExit(backends.why_unavailable('native', 'cuda'))" >> "$log" 2>&1
}

# The libraries of the bundle, if it was made of these sources and they load here.
bundle=.gpu
unpack() {
  [[ -d $bundle/lib ]] || return 1
  if ! "${python[@]}" scripts/gpu_bundle.py check "$bundle" >> "$log" 2>&1; then
    echo "gpu_run: the bundle is not of these sources" | tee -a "$log" >&2
    return 1
  fi
  cp "$bundle"/lib/*.so lenet_fast/ && loads
}

commit=${LENET_FAST_COMMIT:-}
[[ -z $commit && ! -e .git && -f $bundle/commit ]] && commit=$(cat "$bundle/commit")
[[ -n $commit ]] && export LENET_FAST_COMMIT=$commit
[[ -z ${LENET_FAST_DATA:-} && -d $bundle/mnist ]] && export LENET_FAST_DATA=$PWD/$bundle
if ! loads && ! unpack; then
  export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}" # what other GPUs need takes time
  step build 150 env LENET_FAST_CUDA=only "${python[@]}" setup.py --quiet build_ext --inplace
fi

benchmark=("${python[@]}" benchmarks/bench_train.py --device cuda --keep-going)
read -ra train_options <<< "${GPU_RUN_TRAIN:-}" # more of them, for bench_train.py
read -ra bench_options <<< "${GPU_RUN_BENCH:-}" # more of them, for bench_ops.py
pytest=("${python[@]}" -m pytest -v -rf -p no:cacheprovider)
if "${pytest[@]}" -p pytest_timeout --markers > /dev/null 2>&1; then pytest+=(-p pytest_timeout --timeout 60); fi
parallel=("${pytest[@]}")
if "${pytest[@]}" -p xdist.plugin --markers > /dev/null 2>&1; then parallel+=(-p xdist.plugin -n 8); fi
training=tests/test_cuda_training.py

if [[ $stage == first ]]; then
  step facts 15 bash -c 'nvidia-smi; "$@"' facts "${python[@]}" -m lenet_fast env
  step smoke 45 "${python[@]}" benchmarks/gpu_smoke.py ||
    step smoke-memcheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
      "${python[@]}" benchmarks/gpu_smoke.py
  step alone 40 "${benchmark[@]}" --csv "$out/alone_$gpu.csv" --batch 128,4096,512,32 --rounds 3 --sample-ms 1 \
    --networks lenet5-d2l,lenet5,lenet5-sparse,lenet5-1998,lenet1,lenet5-wide --rivals fused-step,fused-phases \
    --seconds 33 "${train_options[@]}"
  if [[ -f $bundle/clocks/_C_cuda.abi3.so ]]; then # a copy of the package, with the kernels that have clocks
    mkdir "$work/clocks" && cp -r lenet_fast "$work/clocks/" && cp "$bundle/clocks/_C_cuda.abi3.so" "$work/clocks/lenet_fast/"
    read -ra options <<< "${GPU_RUN_CLOCKS:-}" # more of them, for phase_clocks.py
    step phases 25 env PYTHONPATH="$work/clocks:$PYTHONPATH" "${python[@]}" benchmarks/phase_clocks.py \
      --instructions "$bundle/phase_instructions.csv" --csv "$out/phases_$gpu.csv" "${options[@]}"
  fi
  if command -v ncu > /dev/null; then
    step ncu 45 ncu --clock-control none --set full --launch-count 8 --log-file "$out/ncu_$gpu.txt" \
      --kernel-name "regex:train_images_phase|update_phase|convolution|whole_image_backward" \
      "${python[@]}" benchmarks/gpu_profiled.py
  fi
  # Twice, as compilers take long: the second race replaces the rows of the first when it is done.
  headline=("${benchmark[@]}" --csv "$out/train_$gpu.csv" --races lenet5-d2l:128 --rounds 5 --sample-ms 1)
  step race 90 "${headline[@]}" --rivals fused-step,fused-phases,eager,compile-graph "${train_options[@]}"
  step race-of-all 100 "${headline[@]}" --rivals fused-step,fused-phases,eager,compile,compile-graph,jax-scan \
    "${train_options[@]}"
else
  step training-tests 75 "${parallel[@]}" "$training" -m "not alone"
  step operator-tests 60 "${parallel[@]}" tests/test_operators.py tests/test_transforms.py tests/test_nn.py tests/test_cuda.py \
    -m "not alone and not triton_selection" -k "cuda-native or test_cuda.py and not triton"
  step races 150 "${benchmark[@]}" --csv "$out/train_more_$gpu.csv" --rounds 5 --sample-ms 1 \
    --races lenet5-d2l:4096,lenet5:128,lenet5-sparse:128,lenet5-1998:128,lenet1:128,lenet5-wide:128 \
    --rivals fused-step,compile-graph,eager --seconds 125 "${train_options[@]}"
  if [[ -n ${LENET_FAST_DATA:-} ]]; then # the 60,000 digits are there
    step accuracy 30 "${python[@]}" benchmarks/time_to_accuracy.py --device cuda --seeds 20 \
      --csv "$out/time_to_accuracy_$gpu.csv"
  fi
  # The trainer comes first: its barriers across blocks are what no other tool has seen.
  check=(--error-exitcode 1 "${pytest[@]}" "$training" -k test_small_training)
  step racecheck 25 compute-sanitizer --tool racecheck "${check[@]}"
  # Uncached, every tensor is an allocation of its own: reading past its end is an error.
  step memcheck 20 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck "${check[@]}"
  step operators 60 "${python[@]}" benchmarks/bench_ops.py --device cuda --csv "$out/gpu_$gpu.csv" --keep-going \
    --batch 128,8192 --passes forward+backward --rounds 9 --sample-ms 3 --rivals fused-triton,eager,compile \
    --seconds 45 "${bench_options[@]}"
  step triton-tests 60 "${parallel[@]}" tests -m triton_selection -k cuda-triton
  step alone-tests 40 "${pytest[@]}" tests/test_cuda.py "$training" -m alone
fi

write_summary "$("${python[@]}" benchmarks/gpu_report.py after "$steps" "$out" "$gpu")"
cat "$summary"
exit "$failed"
