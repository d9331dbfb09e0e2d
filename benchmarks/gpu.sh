#!/usr/bin/env bash
# Measures on a CUDA device and runs the tests that need one: under 9 minutes on one GPU.
#
#   bash benchmarks/gpu.sh                    # PYTHON=python3, OUT=benchmarks/results/gpu
#   python benchmarks/report.py               # afterwards: what was found, in benchmarks/RESULTS.md
#
# Every part has a limit of its own, and one that fails does not stop the others; the last line says which did.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()
: >"$OUT/gpu.log"

part() { # seconds, name, command
  local limit=$1 name=$2
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee -a "$OUT/gpu.log" || failed+=("$name")
}

part 150 tests "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu \
  tests/test_gpu.py tests/test_fp16.py tests/test_sharpness_gpu.py tests/functional/test_state.py
# the loops of others too, where their packages are
if "$PYTHON" -c 'import accelerate, transformers' 2>/dev/null; then
  part 60 loops "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/integrations/test_gpu_loops.py
fi
part 70 tf32 "$PYTHON" benchmarks/step_cost.py --device cuda --rounds 20 --tf32 --output "$OUT/step_cost_tf32.json"
part 60 bf16 "$PYTHON" benchmarks/step_cost.py --device cuda --rounds 20 --precision bf16-mixed --no-memory \
  --output "$OUT/step_cost_bf16.json"
part 90 compiled "$PYTHON" benchmarks/step_cost.py --device cuda --rounds 20 --precision bf16-mixed --compile --no-memory \
  --only "Transformer, 2" --variants off IRE "IRE, SecondMoment" SAM --output "$OUT/step_cost_bf16_compiled.json"
part 60 sizes "$PYTHON" benchmarks/optimizer_step.py --device cuda --output "$OUT/optimizer_step.json"
# the configs too, where the command line can be imported
if "$PYTHON" -c 'import jsonargparse' 2>/dev/null; then
  part 90 configs "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/test_configs.py tests/test_text_configs.py
fi
if ((${#failed[@]})); then
  echo "failed or out of time: ${failed[*]}"
  exit 1
fi
echo "all parts done: $OUT"
