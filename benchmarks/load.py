"""Memory over 1,000 iterations of every attack and a long evaluation, threads, and workers of both kinds.

python benchmarks/load.py [--iterations 1000] [--images 10000] [--steps 5] [--json]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS, metadata, print_table, write
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from atop_fast import RT2, ClassifierConfig, Defense, build_classifier, evaluate, train_classifier
from atop_fast.attacks import APGD, APGDT, CW, FAB, FGSM, MIFGSM, PGD, Attack, Square, StAdv
from atop_fast.evaluation import quick_attacks
from atop_fast.randomness import seeded

STEPS = 20
X = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 10
MAKERS: dict[str, Callable[[Any], Attack]] = {
    "FGSM": lambda model: FGSM(model, eps=0.1),
    "PGD": lambda model: PGD(model, eps=0.1, steps=STEPS),
    "MIFGSM": lambda model: MIFGSM(model, eps=0.1, steps=STEPS),
    "APGD": lambda model: APGD(model, eps=0.1, steps=STEPS),
    "APGDT": lambda model: APGDT(model, eps=0.1, steps=STEPS // 2, target_classes=2),
    "FAB": lambda model: FAB(model, eps=0.1, steps=STEPS // 2, target_classes=2),
    "CW": lambda model: CW(model, steps=STEPS),
    "Square": lambda model: Square(model, eps=0.1, n_queries=STEPS),
    "StAdv": lambda model: StAdv(model, steps=STEPS),
}


class Noisy(nn.Module):
    """A network whose images get noise of torch's generator."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + 0.1 * torch.randn_like(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=1000, help="of every attack")
    parser.add_argument("--images", type=int, default=10000, help="of the long evaluation")
    parser.add_argument("--steps", type=int, default=5, help="of its attack")
    parser.add_argument("--json", action="store_true", help="write results/load--cpu.json")
    args = parser.parse_args()
    memory = [*(leak(name, args.iterations) for name in MAKERS), long_evaluation(args.images, args.steps)]
    print_table(memory)
    threads = [concurrent(8, shared=False), concurrent(8, shared=True)]
    print_table(threads)
    trained = feeds()
    print_table(trained)
    rows = [*memory, *threads, *trained]
    if args.json:
        options = " ".join(f"--{name} {getattr(args, name)}" for name in ("iterations", "images", "steps"))
        command = f"python benchmarks/load.py {options}"
        print(write("load", "cpu", RESULTS, {**metadata("cpu", None), "command": command, "rows": rows}))


def resident() -> float:
    """Resident MiB of this process without mapped files, after free memory went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (pages - shared) * os.sysconf("SC_PAGESIZE") / 2**20


def leak(name: str, iterations: int) -> dict[str, Any]:
    """An attack again and again on a small network; the first fifth of the iterations is not counted."""
    with seeded(0):
        network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    attack = MAKERS[name](Defense(RT2(4, sigma=0.1), None, network))
    calls = iterations // (STEPS if name != "FGSM" else 1)
    # Held until the end, so that none of them goes between the two counts, and no other takes its id.
    others = {id(tensor): tensor for tensor in _tensors()}
    sizes = []
    for call in range(calls):
        attack(X, Y)
        if call == calls // 5 or call == calls - 1:
            sizes.append((resident(), sum(id(tensor) not in others for tensor in _tensors())))
    return _row(f"{name}, {iterations} iterations", sizes[0], sizes[-1])


def long_evaluation(count: int, steps: int) -> dict[str, Any]:
    """Many small images, with everything written: memory from a fifth of the way to the last attack."""
    begin = time.monotonic()
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) / 2
    y = torch.arange(count) % 10
    sizes: list[tuple[float, int]] = []
    seen = 0

    def attack(images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        nonlocal seen
        result = pgd(images, labels, ids)
        if seen <= count // 5 < seen + len(ids) or seen + len(ids) == count:
            sizes.append((resident(), len(_tensors())))
        seen += len(ids)
        return result

    model = Defense(RT2(4, sigma=0.1), None, nn.Flatten())
    pgd = PGD(model, eps=0.1, steps=steps)
    with tempfile.TemporaryDirectory() as out:
        evaluate(model, x, y, attacks={"pgd": attack}, eps=0.1, draws=4, selection_draws=2, out=out, diagnostics=(),
                 progress=False)  # fmt: skip
    minutes = (time.monotonic() - begin) / 60
    return _row(f"evaluation of {count} images, {steps} steps, {minutes:.0f} min", sizes[0], sizes[-1])


def concurrent(count: int, shared: bool) -> dict[str, Any]:
    """Evaluations in threads, of networks of their own or one for all that is in training mode, and each alone."""

    def network() -> nn.Module:
        with seeded(0):
            return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))

    def noise(x: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        return (x + 0.2 * torch.rand_like(x) - 0.1).clamp(0, 1)

    def run(number: int, model: nn.Module) -> str:
        # Every other one draws from torch's generator, as the attack that is not of the library does.
        system = Noisy(model) if number % 2 else Defense(RT2(4, sigma=0.1), None, model)
        options = {"eps": 0.1, "seed": number}
        attacks = {**quick_attacks(system, steps=5, **options), "noise": noise}
        report = evaluate(
            system, X, Y, attacks=attacks, draws=4, selection_draws=3, batch_size=5, progress=False, **options
        )
        return json.dumps({k: v for k, v in report.to_dict().items() if k not in ("seconds", "passes")})

    alone = [run(number, network().eval()) for number in range(count)]
    together: list[str | None] = [None] * count
    common = network()
    networks = [common if shared else network() for _ in range(count)]

    def work(number: int) -> None:
        together[number] = run(number, networks[number])

    state = torch.get_rng_state()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    restored = all(m.training and all(p.requires_grad for p in m.parameters()) for m in networks)
    restored = restored and torch.equal(torch.get_rng_state(), state)
    equal = sum(a == b for a, b in zip(alone, together, strict=True))
    return {"load": f"{count} evaluations in threads, {'one network' if shared else 'a network each'}",
            "equal": f"{equal} of {count}", "state restored": restored}  # fmt: skip


def feeds() -> list[dict[str, Any]]:
    """A training whose images come from memory, from worker processes of both kinds, and with 1 to 4 threads."""
    context = multiprocessing.get_context("spawn")
    wanted: Any = None
    rows = []
    cases = [("fork", -1, 1), ("fork", 2, 1), ("spawn", 2, 1), *(("fork", -1, n) for n in (2, 3, 4))]
    for method, workers, threads in cases:
        # Not a Pool, whose processes may have no children.
        with ProcessPoolExecutor(1, context) as pool:
            found = pool.submit(_trained, method, workers, threads).result()
        wanted = found if wanted is None else wanted
        name = "images in memory" if workers < 0 else f"{workers} workers, {method}"
        furthest = max(float(abs(found[1][key] - value).max()) for key, value in wanted[1].items())
        same = found[0] == wanted[0] and furthest == 0
        row = {
            "load": f"training, {name}, {threads} threads",
            "equal": same,
            "furthest weight": float(f"{furthest:.2g}"),
        }
        rows.append(row)
    return rows[1:]


def _trained(method: str, workers: int, threads: int) -> tuple[Any, dict[str, Any]]:
    torch.set_num_threads(threads)
    torch.multiprocessing.set_start_method(method, force=True)
    with seeded(0):
        classifier = build_classifier("small_cnn", channels=1)
    images = (X, Y) if workers < 0 else (TensorDataset(X, Y), None)
    history = train_classifier(
        classifier, *images, config=ClassifierConfig(epochs=2, batch_size=5), workers=max(0, workers), progress=False
    )
    # Not tensors: those would go with the memory of this process.
    return history, {key: value.double().numpy() for key, value in classifier.state_dict().items()}


def _tensors() -> list[Tensor]:
    # By type: asking some objects of torch for their class warns.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def _row(load: str, first: tuple[float, int], last: tuple[float, int]) -> dict[str, Any]:
    return {"load": load, "MiB": round(last[0], 1), "MiB more": round(last[0] - first[0], 2),
            "tensors more": last[1] - first[1]}  # fmt: skip


if __name__ == "__main__":
    main()
