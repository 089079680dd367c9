"""The runs that benchmarks/faults.py disturbs: a fine-tuning and an evaluation, each in a child process of its own."""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tqdm.std
from torch import Tensor, nn
from torch.utils.data import Dataset

from atop_fast import RT2, Defense, FinetuneConfig, build_classifier, build_purifier, evaluate
from atop_fast.attacks import frozen
from atop_fast.evaluation import quick_attacks
from atop_fast.randomness import seeded
from atop_fast.training import Feed, FinetuneStep, fit

IMAGES, BATCH, EPOCHS = 16, 4, 3
UPDATES = EPOCHS * IMAGES // BATCH
ATTACKED = 40
UNITS = 2 * ATTACKED // 5


@dataclass(frozen=True)
class Job:
    """The task of a child process.

    Attributes:
        task: "training" or "evaluation".
        folder: run folder; the child writes its exit report next to it.
        done: counter of finished updates or attacked batches, which the parent reads.
        fault: the fault that the child itself causes, or "".
        moment: the update or attacked batch before which it happens.
        seed: seed of the fault's random choices.
        rank, size, port: settings of the process group.
        workers: processes that read the images; -1: they are in memory.
    """

    task: str
    folder: Path
    done: Any
    fault: str = ""
    moment: int = 0
    seed: int = 0
    rank: int = 0
    size: int = 1
    port: int = 0
    workers: int = -1


def child(job: Job) -> None:
    """Do the job; how it ended is then in <folder>.ended-<rank>, and its result in <folder>.result-<rank>."""
    with open(f"{job.folder}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    if job.size > 1:
        group = {"RANK": job.rank, "WORLD_SIZE": job.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job.port}
        os.environ.update({name: str(value) for name, value in group.items()})
    ended = Path(f"{job.folder}.ended-{job.rank}")
    # Opened before a fault takes the right to write.
    with open(ended, "w") as file:
        try:
            {"training": _train, "evaluation": _evaluate}[job.task](job)
        except BaseException as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            json.dump([type(error).__name__, str(error)], file)
            raise


# Not in closures: to a run's folder, a model or an attack that holds something else is another one.
DISTURBANCE: ContextVar[Disturbance] = ContextVar("disturbance")


class Disturbance:
    """Brings about the job's fault when its moment has come; a model that it wraps may fail from then on."""

    def __init__(self, job: Job) -> None:
        self.job, self.random, self.active = job, random.Random(job.seed), False
        DISTURBANCE.set(self)

    def before(self, number: int) -> None:
        """Called before the update or attacked batch of this number."""
        if self.job.fault and number >= self.job.moment and not self.active:
            self.active = True
            getattr(self, f"_{self.job.fault.replace(' ', '_').replace('-', '_')}", lambda: None)()

    def model(self, network: nn.Module, most: int) -> nn.Module:
        """The network; once the fault is active it returns NaN, or has no memory for more than `most` rows."""

        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            disturbance = DISTURBANCE.get()
            fault = disturbance.job.fault if disturbance.active else ""
            if fault == "out of memory" and len(inputs[0]) > most:
                raise torch.OutOfMemoryError("no memory is left")
            return output * float("nan") if fault == "NaN from the model" else output

        network.register_forward_hook(after)
        return network

    def _disk_full(self) -> None:
        # The kernel refuses to let a file grow, in the middle of a write.
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.random.randrange(1, 3000), resource.RLIM_INFINITY))

    def _read_only_folder(self) -> None:
        for folder in (self.job.folder, *filter(Path.is_dir, self.job.folder.iterdir())):
            folder.chmod(0o555)
        # Import everything now, so that the fault does not hit a late import.
        importlib.import_module("sympy")
        if os.geteuid() == 0:
            os.seteuid(65534)

    def _clock_jumps(self) -> None:
        real, jump = time.time, self.random.uniform(-1e8, 1e8)
        time.time = lambda: real() + jump
        tqdm.std.time = time.time


class Pictures(Dataset[tuple[Tensor, int]]):
    """The training's images, one of which may kill the process that reads it."""

    def __init__(self, job: Job, x: Tensor, y: Tensor) -> None:
        self.job, self.x, self.y, self.reads = job, x, y, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads += 1
        # In a worker: each has a copy of this object and reads every other batch.
        if torch.utils.data.get_worker_info() is not None and self.reads > self.job.moment:
            if self.job.fault == "a worker raises":
                raise OSError(5, "Input/output error")
            if self.job.fault == "a worker is killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return self.x[i], int(self.y[i])


class Watched(FinetuneStep):
    """A fine-tuning step that counts."""

    def watch(self, job: Job, disturbance: Disturbance) -> None:
        """Count in job.done, and let the disturbance know."""
        self.job, self.disturbance = job, disturbance

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.disturbance.before(self.job.done.value)
        logs = super().__call__(*args, **kwargs)
        if self.job.rank == 0:
            self.job.done.value += 1
        return logs


def _train(job: Job) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(IMAGES, 1, 16, 16, generator=generator), torch.arange(IMAGES) % 4
    with seeded(0):
        classifier = build_classifier("small_cnn", channels=1, classes=4).eval()
        purifier = build_purifier("unet", channels=1, width=4)
    disturbance = Disturbance(job)
    defense = Defense(RT2(4, sigma=0.1), disturbance.model(purifier, 0), classifier)
    config = FinetuneConfig(epochs=EPOCHS, batch_size=BATCH, eps=0.1, attack="pgd", steps=1, average="ema")
    images = (x, y) if job.workers < 0 else (Pictures(job, x, y), None)
    with frozen(classifier):
        step = Watched(defense, None, config, 0)
        step.watch(job, disturbance)
        feed = Feed("faults", *images, step.device, max(0, job.workers))
        options = {"checkpoint": job.folder / "run.pt", "checkpoint_minutes": 0, "metrics": job.folder / "metrics"}
        history = fit("faults", step, feed, seed=0, **options)
    torch.save({"history": history, "weights": purifier.state_dict()}, f"{job.folder}.result-{job.rank}")


def _evaluate(job: Job) -> None:
    y = torch.arange(ATTACKED) % 10
    x = torch.rand(ATTACKED, 1, 8, 8, generator=torch.Generator().manual_seed(1)) / 2
    # The classes are pixels, and the right one is brighter by little more than the noise.
    x.flatten(1)[torch.arange(ATTACKED), y] = 0.7
    disturbance = Disturbance(job)

    def attacks(model: Any) -> dict[str, Callable[..., Tensor]]:
        def counted(attack: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def attacked(*args: Tensor) -> Tensor:
                disturbance = DISTURBANCE.get()
                disturbance.before(disturbance.job.done.value)
                result = attack(*args)
                disturbance.job.done.value += 1
                return result

            return attacked

        return {name: counted(attack) for name, attack in quick_attacks(model, eps=0.1, steps=10).items()}

    defense = Defense(RT2(4, sigma=0.1), None, disturbance.model(nn.Flatten(), 8))
    evaluate(
        defense, x, y, eps=0.1, attacks=attacks, draws=4, selection_draws=3, batch_size=5, out=job.folder,
        diagnostics=(),
    )  # fmt: skip


def kept(task: str, folder: Path) -> int:
    """The number of updates or attacked batches whose results are in the folder."""
    if task == "training":
        if not (folder / "run.pt").exists():
            return 0
        return torch.load(folder / "run.pt", weights_only=True)["done"]
    lines = b"".join(path.read_bytes().rpartition(b"\n")[0] + b"\n" for path in folder.glob("log*.jsonl")).split(b"\n")
    names = [json.loads(line)["name"] for line in lines if line]
    return sum(name != "clean" and not name.endswith("8bit") for name in names)


def result(task: str, folder: Path, size: int = 1) -> Any:
    """The result of a finished run, as numbers and lists."""
    if task == "training":
        ends = [torch.load(f"{folder}.result-{rank}", weights_only=True) for rank in range(size)]
        return [(end["history"], {k: v.tolist() for k, v in end["weights"].items()}) for end in ends]
    report = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in report.items() if key not in ("seconds", "passes")}
