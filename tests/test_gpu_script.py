"""benchmarks/gpu.sh without a GPU: its order, its limit of time and its exit codes, by a stand-in for python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
SUITES = ["ops", "attacks", "evaluate", "finetune", "scaling"]
# Answers as python would on a GPU machine, and notes what it was asked.
STAND_IN = r"""#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
    *get_device_capability*) [ -z "${NO_GPU:-}" ] && echo 9.0 ;;
    -\ *) exec "$REAL" "$@" ;;
    "-m atop_fast.env") echo environment ;;
    "-m pytest"*)
        for word in "$@"; do
            case "$word" in --junitxml=*) cp "$XML" "${word#--junitxml=}" ;; esac
        done
        exit "${TESTS:-0}" ;;
    *"bench ${BROKEN:-nothing} "*) exit 1 ;;
    *"bench ${SLOW:-nothing} "*) exec sleep 60 ;;
esac
"""
# Runs the command behind its options, and notes the tool and whether torch keeps memory.
CHECKER = r"""#!/usr/bin/env bash
echo "$2 caching ${PYTORCH_NO_CUDA_MEMORY_CACHING:-on}" >> "$LOG"
while [ "$1" != "$PYTHON" ]; do
    [ "$1" != --log-file ] || echo "ERROR SUMMARY" > "$2"
    shift
done
"$@" || exit 9
"""


@pytest.fixture
def script(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    xml = tmp_path / "junit.xml"
    xml.write_text('<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2"/></testsuites>')
    log = tmp_path / "log"

    checker = tmp_path / "compute-sanitizer"
    checker.write_text(CHECKER)
    checker.chmod(0o755)

    def run(*options, seconds=530, **environment):
        log.write_text("")
        variables = {**os.environ, "PYTHON": str(python), "REAL": sys.executable, "LOG": str(log), "XML": str(xml)}
        variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
        command = [str(SCRIPT), *options, str(tmp_path / "out"), str(seconds)]
        done = subprocess.run(command, env={**variables, **environment}, capture_output=True, text=True, check=False)
        return done, log.read_text().splitlines()

    return run


def measured(lines):
    """The suites of a run with their quick flag, in order."""
    words = [line.split() for line in lines if "atop_fast.cli bench" in line]
    return [(line[3], line[5].removeprefix("--quick=")) for line in words]


def test_everything_runs_in_order(script, tmp_path):
    done, lines = script()
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in lines[1:4]] == ["pip", "atop_fast.env", "pytest"]
    assert measured(lines) == [(suite, quick) for quick in ("true", "false") for suite in SUITES]
    counts = json.loads((tmp_path / "out" / "tests--cuda.json").read_text())
    assert counts == {"tests": 5, "failures": 1, "errors": 0, "skipped": 2}
    assert (tmp_path / "out" / "env--cuda.txt").read_text() == "environment\n"


def test_without_a_gpu_nothing_is_done(script, tmp_path):
    done, lines = script(NO_GPU="1")
    assert (done.returncode, len(lines)) == (0, 1)
    assert "no GPU" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("environment", [{"TESTS": "1"}, {"BROKEN": "attacks"}])
def test_a_failure_stops_nothing_but_is_told(script, environment):
    done, lines = script(**environment)
    assert done.returncode == 1
    assert len(measured(lines)) == 10


def test_the_time_is_kept(script):
    """With little time left, no suite starts in full, and one that hangs is ended."""
    done, lines = script(seconds=2, SLOW="finetune")
    assert done.returncode == 1
    assert measured(lines) == [(suite, "true") for suite in SUITES]
    assert "finetune, quick=true did not end well" in done.stdout


@pytest.mark.parametrize("tests", [0, 1])
def test_sanitizers_run_over_the_op_tests_instead(script, tmp_path, tests):
    done, lines = script("--sanitize", TESTS=str(tests))
    assert done.returncode == tests
    assert lines[3::2] == ["memcheck caching 1", "racecheck caching 1"]
    assert all("pytest tests/ops" in line for line in lines[4::2])
    assert len(lines) == 7
    assert not measured(lines)
    for tool in ("memcheck", "racecheck"):
        assert (tmp_path / "out" / f"{tool}--cuda.txt").read_text() == "ERROR SUMMARY\n"
