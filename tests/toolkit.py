"""Shared by tests of several files: the CUDA toolkit of this machine, and the variables of several processes."""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

# Seconds for a process that should end by itself, however loaded the machine is.
PATIENCE = 300
# Children of a process that has only imported what they need start quickly, and have no threads of the tests'. All
# files of tests share it. The first step of an optimizer would import torch._dynamo, which takes seconds.
PRELOADED = [
    *("atop_fast.recipes.run", "atop_fast.evaluation.evaluate", "atop_fast.training", "torch._dynamo", "pytest"),
    *("torchvision.transforms.v2", "jinja2", "matplotlib.figure"),
]
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(PRELOADED)
# Stores of runs that may still be active.
STORES: list[dist.TCPStore] = []


def nvcc() -> str | None:
    """The CUDA compiler, in CUDA_HOME, its usual place, or on PATH."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    usual = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    return next((path for path in usual if os.path.isfile(path)), shutil.which("nvcc"))


def end_itself(stop: int, due: Callable[[], bool], delay: float) -> None:
    """Have this process get the signal `stop` `delay` seconds after `due` first returns True.

    Another process would have to be in time: on a loaded machine it may run only when this one has long ended, while
    two threads of one process share what time it gets.
    """

    def watch() -> None:
        while not due():
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(os.getpid(), stop)

    threading.Thread(target=watch, daemon=True).start()


def cuobjdump() -> str | None:
    """The disassembler, beside the compiler or in Triton's package."""
    compiler, triton = nvcc(), importlib.util.find_spec("triton")
    folders = [Path(compiler).parent] if compiler else []
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = (folder / "cuobjdump" for folder in folders)
    return next((str(path) for path in found if path.is_file()), shutil.which("cuobjdump"))


def ranks(size: int) -> list[dict[str, str]]:
    """The environment variables of each process of a new run, as torchrun sets them; none for a single process.

    They meet in a store of this process, which holds its port: a free one that is given away may be taken by then.
    """
    if size == 1:
        return [{}]
    timeout = datetime.timedelta(seconds=120)
    STORES.append(dist.TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False))
    common = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": STORES[-1].port}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": True}
    return [{key: str(value) for key, value in {**common, "RANK": rank}.items()} for rank in range(size)]
