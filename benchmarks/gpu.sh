#!/usr/bin/env bash
# Builds in place, tests and measures on a GPU machine with torch, triton and nvcc. Needs no network.
# Usage: benchmarks/gpu.sh [folder for the JSON files, default benchmarks/results]
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
    echo "benchmarks/gpu.sh: no GPU is visible to torch; nothing to do"
    exit 0
fi

mkdir -p "$out"
# pip where it works offline; otherwise setuptools alone, and the checkout on the path.
if ! "$python" -m pip install -e . --no-build-isolation --no-deps --no-index --quiet; then
    "$python" setup.py build_ext --inplace
    ln -sfn ../kernels atop_fast/kernels
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi

"$python" -m atop_fast.env | tee "$out/env--cuda.txt"
status=0
"$python" -m pytest tests/ops tests/test_cuda_compiles.py tests/test_triton_compiles.py \
    --require-backends eager,triton,cuda -q --junitxml="$out/tests--cuda.xml" || status=$?
"$python" - "$out" <<'PY'
import json, pathlib, sys
import xml.etree.ElementTree as tree

out = pathlib.Path(sys.argv[1])
suite = tree.parse(out / "tests--cuda.xml").getroot().find("testsuite").attrib
counts = {key: int(suite[key]) for key in ("tests", "failures", "errors", "skipped")}
(out / "tests--cuda.json").write_text(json.dumps(counts) + "\n")
(out / "tests--cuda.xml").unlink()
PY
"$python" benchmarks/ops.py --device cuda --json --out "$out"
exit "$status"
