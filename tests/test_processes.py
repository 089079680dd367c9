"""A process of a run that dies takes the others along, at once and with a message; what was saved stays whole."""

from __future__ import annotations

import datetime
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from test_engine import CPU, Line, X, Y, written
from toolkit import PATIENCE, SPAWN, ranks

from atop_fast._core.distributed import process_group
from atop_fast.training import Feed, fit


def endless(variables, folder):
    """One of two processes of a training without end, its standard error in a file."""
    os.dup2(os.open(folder / f"error{variables['RANK']}.txt", os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    options = {"checkpoint": folder / "run.pt", "checkpoint_minutes": 0, "progress": False}
    fit("test", Line(epochs=10**6, batch_size=6), Feed("test", X, Y, CPU), seed=0, **options)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other(tmp_path, victim):
    processes = [SPAWN.Process(target=endless, args=(variables, tmp_path)) for variables in ranks(2)]
    try:
        for process in processes:
            process.start()
        while written(tmp_path / "run.pt") == 0:
            assert all(process.is_alive() for process in processes)
            time.sleep(0.005)
        os.kill(processes[victim].pid, signal.SIGKILL)
        other = processes[1 - victim]
        other.join(PATIENCE)
        assert other.exitcode == 1
    finally:
        for process in processes:
            process.kill()
    assert "ConnectionError: another process of this run has ended" in (tmp_path / f"error{1 - victim}.txt").read_text()
    assert torch.load(tmp_path / "run.pt", weights_only=True)["done"] >= 1


def test_the_wait_for_the_others_has_a_limit(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: given.update(timeout=timeout))
    for text, seconds in ((None, 86400), ("90", 90), ("0.5", 0.5)):
        if text is not None:
            monkeypatch.setenv("ATOP_FAST_TIMEOUT", text)
        with process_group():
            assert given["timeout"] == datetime.timedelta(seconds=seconds)
    for text in ("soon", "0", "inf"):
        monkeypatch.setenv("ATOP_FAST_TIMEOUT", text)
        with (
            pytest.raises(ValueError, match="process_group: ATOP_FAST_TIMEOUT must be seconds > 0, got"),
            process_group(),
        ):
            pass
