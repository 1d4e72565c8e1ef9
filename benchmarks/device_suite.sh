#!/usr/bin/env bash
# Everything a GPU machine can tell about this checkout, in under 8 minutes: bash benchmarks/device_suite.sh [--quick]
#
# Runs from a bare checkout with the python3 there (torch with CUDA, cupy, transformers, pytest), installs nothing and
# needs no network. VBERT_MODEL may name a real MiniLM folder. Writes $OUT (else benchmarks/results/device) suite.json
# with device, commit, versions and every step's outcome, and logs.tar.gz. Exit code 1 when a step failed.
set -u
cd "$(dirname "$0")/.." || exit 1
quick=() pool=(--queries 1024) tasks=(--tasks 1 8 64)
[ "${1:-}" = "--quick" ] && quick=(--quick) pool=(--queries 256) tasks=(--tasks 1 8)
out=${OUT:-benchmarks/results/device}
mkdir -p "$out" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
steps="$work/steps.jsonl"
: >"$steps"

# step NAME SECONDS COMMAND...: what it prints goes to NAME.log; the outcome is one line of steps.jsonl.
step() {
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$work/$name.log" 2>&1
    code=$?
    tail -n 3 "$work/$name.log" | cut -c1-400
    printf '{"step": "%s", "exit_code": %d, "seconds": %d}\n' "$name" "$code" $((SECONDS - begin)) >>"$steps"
}

# The checkout's own pytest settings name plug-ins that the machine may lack.
pytest=("$python" -m pytest -c /dev/null --rootdir=. --confcutdir=. --import-mode=importlib -q -rs -p no:cacheprovider)

step operators 100 "${pytest[@]}" tests/cuda/test_operators.py --junitxml="$work/operators.xml"
step model 80 "${pytest[@]}" tests/cuda/test_streams.py tests/cuda/test_model.py tests/cuda/test_engine.py tests/cuda/test_operator_streams.py --junitxml="$work/model.xml"
step device 85 "$python" -m benchmarks.device "${quick[@]}"
step overlap 40 "$python" -m benchmarks.overlap --json --kinds adapter --budgets 0.01 --rounds 3
step pets_throughput 27 "$python" -m benchmarks.experiments.pets_throughput --json --device cuda --full-models "${tasks[@]}"
step pets_batching 28 "$python" -m benchmarks.experiments.pets_batching --json --device cuda --tasks 32 --std 1 8 "${pool[@]}"
step streams 36 "$python" -m benchmarks.experiments.pets_streams --json --shape minilm-l6 --tasks 32 --lengths 4 32 --streams 1 2 4 0 --rounds 5
step instances 28 "$python" -m benchmarks.experiments.fastptm_instances --json --device cuda --kinds 4 --requests 24 --traces cyclic --instances 2 --systems "weight swap" fair kind-batches
# Further benchmarks go here, one step each: what they print as JSON becomes a row of suite.json.
if command -v compute-sanitizer >/dev/null; then
    # Every tensor in an allocation of its own, so that an access behind its end is seen.
    step sanitizer 55 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
        "${pytest[@]}" tests/cuda/test_operators.py::test_operator -k "zipf or empty_segment"
else
    echo '{"step": "sanitizer", "skipped": "compute-sanitizer is not on PATH"}' >>"$steps"
fi

tar -czf "$out/logs.tar.gz" -C "$work" .
"$python" -m benchmarks.device_report "$work" "$out"
