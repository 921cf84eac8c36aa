#!/usr/bin/env bash
# Everything that needs a GPU, in one run of at most nine minutes on a CUDA machine without a network:
#
#   OUT=results bench/gpu/run.sh           build, tests, compute-sanitizer, benchmarks, engine, codec
#   OUT=results bench/gpu/run.sh --dry     the same steps on the CPU with tiny shapes and nothing built
#
# Needs torch with CUDA, Triton, nvcc, g++, CMake >= 3.24, pytest, hypothesis; ninja, compute-sanitizer, matplotlib and the
# baselines are used where they are there. Every step has a time budget and none stops the others. A table comes
# last; the exit status is 0 only when no step failed. In $OUT: summary.txt, log.txt, bench-cuda.json with its plots,
# bench-engine-cuda.json, bench-codec-cuda.json.
#
# --steps a,b   only these steps (build tests memcheck bits bench engine codec racecheck)
# --seconds N   time of the whole run (default 540)
# PYTHON=... picks the interpreter. In a tree without .git, BENCH_COMMIT=... is recorded as its commit.
set -uo pipefail

started=$(date +%s)
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root" || exit 2
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
fi

dry=0 total= only=
while [ $# -gt 0 ]; do
    case $1 in
        --dry) dry=1; shift ;;
        --steps) only=,${2:?--steps: expected names},; shift 2 ;;
        --seconds) total=${2:?--seconds: expected a number}; shift 2 ;;
        --help|-h) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
        *) echo "error: unknown option $1 (see --help)" >&2; exit 2 ;;
    esac
done
: "${total:=$([ $dry = 1 ] && echo 2000 || echo 540)}"
: "${OUT:?error: OUT must name a folder for the results}"
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
log=$OUT/log.txt
: > "$log"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

rows=() failures=0

note() { # NAME RESULT SECONDS BUDGET
    rows+=("$(printf '%-10s %-52.52s %6s %6s' "$1" "$2" "$3" "$4")")
    echo "== $1: $2 (${3} s)"
}

# step NAME BUDGET COMMAND...: runs within its budget and what is left of the whole; all output goes to the log
step() {
    local name=$1 budget=$2 left begin took status result
    shift 2
    [ -z "$only" ] || [[ $only == *,$name,* ]] || return 0
    left=$((started + total - $(date +%s) - 5))
    [ $dry = 0 ] || budget=$((4 * budget)) # a dry run is not to fail because the machine is busy
    [ "$budget" -le "$left" ] || budget=$left
    if [ "$budget" -le 3 ]; then
        failures=$((failures + 1))
        note "$name" "FAILED: no time left" 0 "$budget"
        return 0
    fi
    begin=$(date +%s)
    printf '\n== %s: %s\n' "$name" "$*" >> "$log"
    timeout -k 5 "$budget" "$@" < /dev/null >> "$log" 2>&1
    status=$?
    took=$(($(date +%s) - begin))
    case $status in
        0) result=ok ;;
        77) result="skipped: $(tail -n 1 "$log")" ;;
        124|137) result="FAILED: over its time"; failures=$((failures + 1)) ;;
        *) result="FAILED: exit status $status: $(grep -v '^$' "$log" | tail -n 1)"; failures=$((failures + 1)) ;;
    esac
    note "$name" "$result" "$took" "$budget"
}

build() {
    [ $dry = 0 ] || { "$python" -m ztok_fast.native; return; }
    command -v nvcc > /dev/null || [ -x /usr/local/cuda/bin/nvcc ] || { echo "nvcc was not found"; return 1; }
    command -v cmake > /dev/null || "$python" -c 'import cmake' 2> /dev/null || {
        echo "cmake was not found: it comes as a wheel too (cmake, ninja)"; return 1; }
    ZTOK_CUDA=1 "$python" setup.py build_ext --inplace && "$python" -m ztok_fast.doctor
}

tests() {
    [ $dry = 0 ] || { "$python" -m pytest -q -p no:cacheprovider -x tests/ops/test_every_op.py \
            -k "exact and codebook_assign-reference-cpu"; return; }
    local workers=()
    "$python" -c 'import xdist' 2> /dev/null && workers=(-n 4)
    # the rows of every op on the CUDA device, and what is marked as needing one
    "$python" -m pytest -q -p no:cacheprovider -m "not slow" "${workers[@]}" tests/ops tests/native -k "cuda or gpu"
}

bits() { # the kernels of the engine's passes: the oracle's bits, and the CPU's
    local files=(tests/engine/test_gpu_pieces.py tests/engine/test_gpu_passes.py)
    [ $dry = 0 ] || { "$python" -m pytest -q -p no:cacheprovider -x "${files[@]}" -k "angles or gated or refused"; return; }
    "$python" -c 'import peft, transformers, mpmath' 2> /dev/null || {
        echo "transformers, peft and mpmath are not all installed"; return 77; }
    "$python" -m pytest -q -p no:cacheprovider "${files[@]}"
}

sanitize() {
    local tool=$1
    [ $dry = 0 ] || { "$python" -m bench --check --set tiny; return; }
    local program
    program=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null) || {
        echo "compute-sanitizer is not installed"; return 77; }
    # without torch's caching every tensor is an allocation of its own, so that a byte past its end is seen
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 --print-limit 20 \
        "$python" -m bench --check --device cuda
}

bench() {
    [ $dry = 0 ] || { "$python" -m bench --set tiny --seconds 0.01 --json "$OUT/bench-cpu.json" --ops ragged_pack z_select; return; }
    local plots=()
    "$python" -c 'import matplotlib' 2> /dev/null && plots=(--plots "$OUT")
    "$python" -m bench --device cuda --seconds 0.3 --limit 110 --json "$OUT/bench-cuda.json" "${plots[@]}"
}

engine() { # bits at full size are checked against the CPU's engine before anything is timed
    [ $dry = 0 ] || { "$python" -m bench --set tiny --seconds 0.01 --json "$OUT/bench-engine-cpu.json" --ops engine_prefill engine_step; return; }
    "$python" -c 'import transformers' 2> /dev/null || { echo "transformers is not installed"; return 77; }
    "$python" -m bench --device cuda --ops engine_prefill engine_step --seconds 0.3 --limit 70 \
        --json "$OUT/bench-engine-cuda.json"
}

codec() {
    [ $dry = 0 ] || { "$python" -m bench --set tiny --seconds 0.01 --json "$OUT/bench-codec-cpu.json" --ops compress decompress; return; }
    "$python" -c 'import peft, transformers' 2> /dev/null || { echo "transformers and peft are not installed"; return 77; }
    "$python" -m bench --device cuda --ops compress decompress --cases documents=8 "characters=150]" \
        --seconds 1 --limit 40 --json "$OUT/bench-codec-cuda.json"
}

export -f build tests bits sanitize bench engine codec
export python dry OUT

run=(bash -c '"$@"' run)
step build     120 "${run[@]}" build
step tests     100 "${run[@]}" tests
step memcheck   50 "${run[@]}" sanitize memcheck
step bits       50 "${run[@]}" bits
step bench     140 "${run[@]}" bench
step engine     80 "${run[@]}" engine
step codec      70 "${run[@]}" codec
step racecheck  50 "${run[@]}" sanitize racecheck

{
    printf '%-10s %-52s %6s %6s\n' step result took budget
    printf '%s\n' "${rows[@]}"
    echo "$failures failed, $(($(date +%s) - started)) s in all, results in $OUT"
} | tee "$OUT/summary.txt"
exit $((failures > 0))
