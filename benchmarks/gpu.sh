#!/usr/bin/env bash
# Everything that needs a GPU, in one call: bash benchmarks/gpu.sh OUT [--tiny]. Each result is a text file ending with a
# line of JSON. --tiny runs every family and every arm on this CPU instead, in a minute or two, to prove the script.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-results}; mkdir -p "$out"
python=${PYTHON:-python}
failed=0
try() {
  local name=$1; shift
  echo "== $name"
  "$@" > "$out/$name.txt" 2>&1 || { echo "   exit code $?; see $out/$name.txt"; failed=1; }
}
if [ "${2:-}" = --tiny ]; then
  try scale "$python" benchmarks/scale.py --tiny
  tail -n 45 "$out/scale.txt" | grep -v '^{'
  exit $failed
fi
try doctor "$python" -m diptych doctor --json
try attention "$python" benchmarks/attention.py
try scale "$python" benchmarks/scale.py --device cuda --large
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
if [ "$gpus" -gt 1 ]; then
  try scale-sharded torchrun --nproc-per-node "$gpus" benchmarks/scale.py --device cuda --large --shard
fi
echo "results in $out; compare two folders file by file: $python benchmarks/compare.py BEFORE/scale.txt AFTER/scale.txt"
exit $failed
