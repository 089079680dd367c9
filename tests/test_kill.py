"""kill -9: a demo that is killed again and again ends with the report of one that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

ARGS = [
    *("--options.train_images=256", "--options.test_images=8", "--options.classifier_epochs=2"),
    *("--options.pretrain_epochs=2", "--options.finetune_epochs=2", "--options.steps=2", "--options.draws=2"),
]


def test_killed_demo_resumes_to_the_same_report(tmp_path):
    pytest.importorskip("mlxtend")

    def start(out):
        command = [sys.executable, "-m", "atop_fast.cli", "demo", f"--out={out}", *ARGS]
        with open(f"{out}.log", "a") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.DEVNULL)

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=300) == 0
    state, seen = tmp_path / "killed/demo-state", set()
    # Each round is killed as soon as one more of these files exists.
    for name in ("classifier.pt", "finetune_pipeline.pt", "evaluate_pretrained.pt"):
        run = start(tmp_path / "killed")
        while not (state / name).exists():
            assert run.poll() is None, "the demo ended before it could be killed"
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        seen |= set(os.listdir(state))
    run = start(tmp_path / "killed")
    assert run.wait(timeout=300) == 0
    assert "Going on with the run that was stopped" in (tmp_path / "killed.log").read_text()
    assert {"classifier.pt", "pretrain.pt", "finetune_pipeline.pt", "evaluate_pretrained.pt"} <= seen
    assert (tmp_path / "killed/report.json").read_text() == (tmp_path / "whole/report.json").read_text()
    assert not state.exists()
