#!/usr/bin/env bash
# One training run of at most nine minutes on a CUDA machine without a network, where one file may be bounded in size.
#
#   bench/gpu/train.sh --base-parts parts/NAME.whl.sha256 --checkpoint last/checkpoint.pt.sha256 --out results/
#   bench/gpu/train.sh --dry --out /tmp/dry        the same path in seconds, on the CPU, on a tiny random base
#
# It checks and joins the base model's parts, resumes the checkpoint (or starts at step 0), trains in bfloat16 autocast,
# evaluates, and prints a table last. In --out (default $OUT): checkpoint.pt.part*, checkpoint.pt.sha256, metrics.jsonl,
# evaluation.json. Beforehand, on a machine that has the base model:
#
#   split -b 60000000 -d -a 3 NAME.whl parts/NAME.whl.part
#   (cd parts && sha256sum NAME.whl.part* > NAME.whl.sha256)
#
# --base-parts SUMS   checksums beside the parts of a .whl or .gguf with the base model
# --checkpoint SUMS   checksums beside the parts of a checkpoint.pt and its metrics.jsonl, to go on from
# --part-bytes N      largest part of the checkpoint (default 16000000)
# --wheels DIR        wheels of pure-Python packages that the machine lacks (gguf, which reads that base model; peft);
#                     they are unpacked for this run alone
# Other options: python -m bench.gpu.train --help. Paths are relative to the checkout. PYTHON=... picks the interpreter.
set -euo pipefail

started=$(date +%s)
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
cd "$root"
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
fi

wheels= base= checkpoint= out=${OUT:-} part_bytes=16000000
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=${2:?--wheels: expected a folder}; shift 2 ;;
        --base-parts) base=${2:?--base-parts: expected a .sha256}; shift 2 ;;
        --checkpoint) checkpoint=${2:?--checkpoint: expected a .sha256}; shift 2 ;;
        --part-bytes) part_bytes=${2:?--part-bytes: expected a number}; shift 2 ;;
        --out) out=${2:?--out: expected a folder}; shift 2 ;;
        --help|-h) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
        *) options+=("$1"); shift ;;
    esac
done
[ -n "$out" ] || { echo "error: --out: expected a folder for the results (or \$OUT), got none" >&2; exit 2; }

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if [ -n "$wheels" ]; then
    mkdir "$scratch/packages"
    found=0
    for wheel in "$wheels"/*.whl; do
        [ -e "$wheel" ] || continue
        case $wheel in
            *-none-any.whl) "$python" -m zipfile -e "$wheel" "$scratch/packages"; found=1 ;;
            *) echo "error: --wheels: expected pure-Python wheels (*-none-any.whl), got $wheel" >&2; exit 2 ;;
        esac
    done
    [ $found = 1 ] || { echo "error: --wheels: expected wheels in $wheels, got none" >&2; exit 2; }
    export PYTHONPATH=$PYTHONPATH:$scratch/packages
fi

# join SUMS FOLDER: check the parts beside their checksums and join them in the folder
join() {
    mkdir -p "$2"
    (cd "$(dirname "$1")" && sha256sum --check --quiet "$(basename "$1")" >&2 &&
        cut -c67- "$(basename "$1")" | xargs -d '\n' cat --) > "$2/$(basename "$1" .sha256)"
}

if [ -n "$base" ]; then
    join "$base" "$scratch/base"
    options+=(--base "$scratch/base/$(basename "$base" .sha256)")
fi
if [ -n "$checkpoint" ]; then
    join "$checkpoint" "$scratch/last"
    cp "$(dirname "$checkpoint")/metrics.jsonl" "$scratch/last/"
    options+=(--resume "$scratch/last")
fi

"$python" -m bench.gpu.train --started "$started" --out "$out" "${options[@]}"

cd "$out"
rm -f checkpoint.pt.part*
split -b "$part_bytes" -d -a 3 checkpoint.pt checkpoint.pt.part
sha256sum checkpoint.pt.part* > checkpoint.pt.sha256
rm checkpoint.pt
