#!/usr/bin/env bash
# Builds in place, tests and measures on a GPU machine with torch, triton and nvcc. Needs no network.
# Usage: benchmarks/gpu.sh [--sanitize] [folder for the files, default benchmarks/results] [seconds, default 530]
# Leaves env--cuda.txt, tests--cuda.json and SUITE--cuda.json: every suite in its quick form, then in full as far as the
# time goes. Exit code 1 if the build, a test or a quick suite fails.
# With --sanitize, the tests of the CUDA kernels under compute-sanitizer's memcheck and racecheck instead, which leaves
# memcheck--cuda.txt and racecheck--cuda.txt; exit code 1 if one of them finds something, or does not end in its time.
set -euo pipefail
sanitize=false
if [ "${1:-}" = --sanitize ]; then
    sanitize=true
    shift
fi
out=$(realpath -m "${1:-$(dirname "$0")/results}")
limit=${2:-530}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
status=0

# left: the seconds that remain, at least 1.
left() { echo $((limit > SECONDS ? limit - SECONDS : 1)); }
# within SECONDS COMMAND...: the command, ended when its time or the whole run's is over.
within() {
    local most=$1 rest
    shift
    rest=$(left)
    timeout --kill-after=5 $((most < rest ? most : rest)) "$@"
}

if ! capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2> /dev/null); then
    echo "benchmarks/gpu.sh: no GPU is visible to torch; nothing to do"
    exit 0
fi

mkdir -p "$out"
echo "==> build for compute capability $capability"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
# pip where it works offline; otherwise setuptools alone, and the checkout on the path.
if ! within 240 "$python" -m pip install -e . --no-build-isolation --no-deps --no-index --quiet; then
    within 240 "$python" setup.py build_ext --inplace
    ln -sfn ../kernels atop_fast/kernels
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
within 60 "$python" -m atop_fast.env | tee "$out/env--cuda.txt"

if [ "$sanitize" = true ]; then
    # torch's memory cache would hide reads beyond a tensor. The tool makes a kernel 10 to 100 times slower.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
        echo "==> $tool, after $SECONDS s"
        rest=$(left)
        [ "$tool" = racecheck ] || rest=$((rest / 2))
        within "$rest" compute-sanitizer --tool "$tool" --error-exitcode 9 --log-file "$out/$tool--cuda.txt" \
            "$python" -m pytest tests/ops --require-backends eager,cuda -q -p no:cacheprovider \
            -k "cuda and not opcheck and not compile and not 2_to_the_31" || status=1
        tail -n 3 "$out/$tool--cuda.txt" || true
    done
    exit "$status"
fi

echo "==> tests, after $SECONDS s"
rm -f "$out/tests--cuda.xml"
within 180 "$python" -m pytest tests/ops tests/test_cuda_compiles.py tests/test_triton_compiles.py \
    -m "not (slow and gpu)" --require-backends eager,triton,cuda -q --junitxml="$out/tests--cuda.xml" || status=1
if [ -f "$out/tests--cuda.xml" ]; then
    "$python" - "$out" <<'PY'
import json, pathlib, sys
import xml.etree.ElementTree as tree

out = pathlib.Path(sys.argv[1])
suite = tree.parse(out / "tests--cuda.xml").getroot().find("testsuite").attrib
counts = {key: int(suite[key]) for key in ("tests", "failures", "errors", "skipped")}
(out / "tests--cuda.json").write_text(json.dumps(counts) + "\n")
(out / "tests--cuda.xml").unlink()
PY
else
    echo "benchmarks/gpu.sh: the tests did not end in their time"
fi

for quick in true false; do
    for suite in ops attacks evaluate finetune scaling; do
        # A suite in full takes a minute or more: it would only be cut off, and its quick result stays.
        if [ "$quick" = false ] && [ "$(left)" -lt 45 ]; then
            continue
        fi
        echo "==> $suite, quick=$quick, after $SECONDS s"
        if ! within 300 "$python" -m atop_fast.cli bench "$suite" --device=cuda --quick="$quick" \
            --json="$out/$suite--cuda.json"; then
            echo "benchmarks/gpu.sh: $suite, quick=$quick did not end well"
            [ "$quick" = false ] || status=1
        fi
    done
done
echo "==> done after $SECONDS s"
exit "$status"
