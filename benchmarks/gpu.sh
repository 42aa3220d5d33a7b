#!/usr/bin/env bash
# Everything that needs a GPU, in one call: bash benchmarks/gpu.sh OUT. Each result is a text file ending with a line of JSON.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-results}; mkdir -p "$out"
python=${PYTHON:-python}
try() { echo "== $1"; shift_name=$1; shift; "$@" > "$out/$shift_name.txt" 2>&1; echo "   exit code $?"; }
try doctor "$python" -m diptych doctor --json
try attention "$python" benchmarks/attention.py
try scale "$python" benchmarks/scale.py --device cuda --width 1024 --layers 16
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -gt 1 ]; then
  try scale-sharded torchrun --nproc-per-node "$gpus" benchmarks/scale.py --device cuda --width 1024 --layers 16 --shard
fi
echo "results in $out; compare two folders file by file: $python benchmarks/compare.py BEFORE/scale.txt AFTER/scale.txt"
