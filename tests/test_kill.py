"""kill -9: a demo or an evaluation that is killed again and again ends with the report of one that is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest
from test_evaluate_runs import COUNT, finish, results, run, start, units, written

pytestmark = pytest.mark.slow

ARGS = [
    *("--data.holdout=4936", "--evaluation.images=4", "--classifier.training.epochs=2", "--pretrain.epochs=2"),
    *("--finetune.epochs=2", "--evaluation.steps=2", "--evaluation.draws=2"),
]


# A process that kills itself at its first audited event (an open, an import, a removal) after the named file exists,
# because a watching process could miss a file that lives for milliseconds.
MORTAL = """
import os, signal, sys
path = sys.argv.pop(1)
sys.addaudithook(lambda *_: os.path.exists(path) and signal.raise_signal(signal.SIGKILL))
from atop_fast.cli import main
main()
"""


def test_killed_demo_resumes_to_the_same_report(tmp_path):
    pytest.importorskip("mlxtend")

    def demo(out, *start):
        command = [sys.executable, *start, "train", "demo", f"--out={out}", *ARGS]
        with open(f"{out}.log", "a") as log:
            return subprocess.run(command, stdout=log, stderr=subprocess.DEVNULL, timeout=300).returncode

    whole, state, seen = tmp_path / "whole", tmp_path / "killed", set()
    assert demo(whole, "-m", "atop_fast.cli") == 0
    for name in ("classifier.pt", "ablation.pt", "evaluate_pretrained/log.jsonl"):
        assert demo(state, "-c", MORTAL, str(state / name)) == -signal.SIGKILL
        seen |= set(os.listdir(state))
    assert demo(state, "-m", "atop_fast.cli") == 0
    assert "Going on with the run in" in (tmp_path / "killed.log").read_text()
    assert {"classifier.pt", "pretrained.safetensors", "ablation.pt", "evaluate_pretrained"} <= seen
    assert (state / "report.json").read_text() == (whole / "report.json").read_text()
    assert not list(state.glob("*.pt"))


@pytest.mark.parametrize("seed", [0])
def test_an_evaluation_killed_ten_times_ends_with_the_same_flags(tmp_path, seed):
    """At random moments, with any batch size and one or two processes."""
    moments, out, worlds = random.Random(seed), tmp_path / "run", set()
    for _ in range(10):
        size, batch_size = moments.choice((1, 2)), moments.choice((2, 3, 4))
        # Now and then before anything is done, else some time after the first or second unit.
        stop = units(out) + moments.choice((0, 1, 2)), moments.random() * 0.05
        codes = finish(start(size, out, tmp_path, batch_size=batch_size, delay=0.02, stop=stop))
        assert -signal.SIGKILL in codes, "it ended before it could be killed"
        worlds.add(size)
    assert worlds == {1, 2}
    assert not (out / "report.json").exists()
    assert 0 < units(out) < 4 * COUNT / 2
    assert finish(start(2, out, tmp_path, batch_size=5)) == [0, 0]
    assert written(out) == results(run(None))
