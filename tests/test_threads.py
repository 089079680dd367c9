"""How threads wait: what the command line asks OpenMP for, and what is said on a machine with other work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest
import torch

from atop_fast import ClassifierConfig, build_classifier, env, evaluate, train_classifier
from atop_fast._core import threads as _threads
from atop_fast._core.threads import POLICIES, Queueing, busy_cores, is_command, seconds_queued, spinning, wait_asleep
from atop_fast.evaluation import work
from atop_fast.training import engine


@pytest.fixture
def spins(monkeypatch):
    """An environment that says nothing about waiting."""
    for name in POLICIES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def busy_loop():
    """A process that computes without end on the cores that this one may use."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["/usr/bin/atop-fast", "demo"], [], True),
        (["-m", "train"], ["python", "-u", "-m", "atop_fast.cli", "train"], True),
        (["/usr/bin/atop-fast", "bench"], [], False),
        (["-m", "bench"], ["python", "-m", "atop_fast.cli", "bench"], False),
        (["mine.py"], ["python", "mine.py", "atop_fast.cli"], False),
        (["-m"], ["python", "-m", "atop_fast.env"], False),
        (["-c"], ["python", "-c", "import atop_fast"], False),
        ([], [], False),
    ],
)
def test_commands_are_told_from_programs(argv, original, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert is_command() is expected


def test_the_environment_and_a_torch_that_is_loaded_go_first(spins):
    wait_asleep()
    assert "OMP_WAIT_POLICY" not in os.environ
    spins.delitem(sys.modules, "torch")
    for name in POLICIES:
        with spins.context() as changed:
            changed.setenv(name, "7")
            wait_asleep()
            assert [os.environ.get(other) for other in POLICIES if other != name] == [None]
    assert spinning()
    # Put back by the fixture, which knows the variable.
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert not spinning()


@pytest.mark.slow
@pytest.mark.parametrize(("module", "word"), [("cli", "sleep"), ("env", "spin")])
def test_openmp_is_told_by_commands_alone(spins, module, word):
    """For how many turns threads spin, as the OpenMP library itself has understood it."""
    command = [sys.executable, "-m", f"atop_fast.{module}", *(["env"] if module == "cli" else [])]
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"which {word} while they wait" in done.stdout
    turns = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not turns:
        pytest.skip("another OpenMP than GNU's")
    assert (set(turns) == {"0"}) is (word == "sleep")


@pytest.mark.skipif(seconds_queued() is None, reason="the system does not tell")
def test_a_shared_core_makes_threads_queue(busy_loop):
    """Beside another process on one core, about half of the time goes by in the queue."""
    allowed = os.sched_getaffinity(0)
    try:
        for pid in (0, busy_loop):
            os.sched_setaffinity(pid, {min(allowed)})
        start, before = time.monotonic(), seconds_queued()
        while time.monotonic() - start < 0.5:
            pass
        share = (seconds_queued() - before) / (time.monotonic() - start)
    finally:
        os.sched_setaffinity(0, allowed)
    assert share > 0.2


@pytest.mark.skipif(busy_cores(0.0) is None, reason="the system does not tell")
def test_other_work_is_seen(busy_loop):
    assert 0.4 < busy_cores(0.5) < 1.1 * os.cpu_count() + 0.2


def test_remarks_are_made_once_and_where_they_are_true(spins):
    clock = [0.0]
    spins.setattr(time, "monotonic", lambda: clock[0])
    spins.setattr(_threads, "seconds_queued", lambda: clock[0])

    def remarks(threads, share=1.0):
        clock[0] = 0.0
        spins.setattr(_threads, "seconds_queued", lambda: share * threads * clock[0])
        queueing, said = Queueing(threads), []
        for now in (9.0, 11.0, 12.0, 30.0, 60.0):
            clock[0] = now
            said.append(queueing.remark())
        return said

    said = remarks(2, share=0.65)
    assert [text is not None for text in said] == [False, True, False, False, False]
    assert said[1].startswith("2 threads queue for a core 65 % of the time")
    assert not any(remarks(2, share=0.1))
    assert not any(remarks(1))
    spins.setenv("OMP_WAIT_POLICY", "passive")
    assert not any(remarks(2))


def test_progress_bars_say_it(spins, capfd):
    """In a training and in an evaluation; not without a progress bar, and nothing of either changes."""
    for module in (engine, work):
        spins.setattr(module, "Queueing", lambda threads: Queueing(2, every=0.0))
    spins.setattr(_threads, "seconds_queued", lambda: 2 * time.monotonic())
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    for progress in (True, False):
        model = build_classifier("small_cnn", channels=1, classes=2, width=4)
        train_classifier(model, x, y, config=ClassifierConfig(1, batch_size=4), progress=progress)
        evaluate(model, x, y, attacks={"none": lambda x, y, ids: x}, progress=progress)
        text = capfd.readouterr().err
        assert text.count("threads queue for a core") == (2 if progress else 0)


@pytest.mark.parametrize(
    ("busy", "threads", "policy", "advised"),
    [(1.0, 2, "", True), (1.0, 2, "PASSIVE", False), (0.1, 2, "", False), (1.9, 1, "", False), (None, 2, "", False)],
)
def test_env_says_when_a_machine_is_loaded(spins, busy, threads, policy, advised):
    spins.setenv("OMP_WAIT_POLICY", policy)
    spins.setattr(env, "busy_cores", lambda: busy)
    spins.setattr(torch, "get_num_threads", lambda: threads)
    spins.setattr(os, "cpu_count", lambda: 2)
    load = env.report()["Devices"]["load"]
    assert load.startswith("unknown" if busy is None else f"{busy} of 2 cores")
    assert ("OMP_NUM_THREADS" in load) is advised
