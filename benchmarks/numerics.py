"""The numbers under an evaluation: attack_loss against float64, lower precision, and flags that must not move.

python benchmarks/numerics.py [--json]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
# More threads than cores must not wait for one another in busy loops.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from _results import RESULTS, metadata, print_table, write
from torch import Tensor

import atop_fast
from atop_fast.attacks import APGD, PGD, Attack, draw_logits
from atop_fast.evaluation import wilson_interval
from atop_fast.ops import _registry
from atop_fast.ops.attack_loss import LOSSES

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import models

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["atop_fast"])
COUNT, DRAWS, CLASSES = 12, 8, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="write results/numerics--cpu.json")
    args = parser.parse_args()
    # Triton's interpreter warns about values in unused lanes.
    warnings.simplefilter("ignore", RuntimeWarning)
    parts = {}
    for work in (losses, strength, determinism):
        begin = time.monotonic()
        parts[work.__name__] = work()
        print_table(parts[work.__name__])
        print(f"{time.monotonic() - begin:.0f} s\n", flush=True)
    if args.json:
        rows = [{"part": part, **row} for part, rows in parts.items() for row in rows]
        document = {**metadata("cpu", None), "command": "python benchmarks/numerics.py", "rows": rows}
        print(write("numerics", "cpu", RESULTS, document))


def losses() -> list[dict[str, Any]]:
    """Largest relative errors of loss and gradient over margins, in units of the output type's eps."""
    rows = []
    for kind, dtype in itertools.product(LOSSES, (torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        for backend, op in _registry.impls("attack_loss").items():
            row = {"loss": kind, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
            for low, high in ((0, 80), (80, 100)):
                # Triton's interpreter takes some 20 ms a row.
                step = 5.0 if backend == "triton" else 0.5
                margins = torch.arange(low, high + step, step, dtype=torch.float64)
                z = (margins[:, None] * torch.tensor([0.0, 1.0, 0.25, *[0.1] * (CLASSES - 3)])).to(dtype)
                errors = torch.zeros(2, dtype=torch.float64)
                for label in (0, 1):
                    found = op(z, torch.full((len(z),), label), None, LOSSES.index(kind))
                    for i, (actual, wanted) in enumerate(zip(found, exact(z.double(), label, kind), strict=False)):
                        error = (actual.double() - wanted).abs() / wanted.abs().clamp_min(1e-300)
                        errors[i] = max(errors[i], error.max())
                unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
                for name, error in zip(("loss", "gradient"), errors.tolist(), strict=True):
                    row[f"{name}, margins {low} to {high}"] = round(error / unit, 2)
            rows.append(row)
    return rows


def exact(z: Tensor, label: int, kind: str) -> tuple[Tensor, Tensor]:
    """Losses and gradients of float64 logits without a difference of nearly equal numbers."""
    rows = torch.arange(len(z))
    if kind == "ce":
        e = (z - z.amax(dim=1, keepdim=True)).exp()
        others = e.sum(dim=1) - e[:, label] if label == 0 else e[:, [0, *range(2, CLASSES)]].sum(dim=1)
        gradient = e / (others + e[:, label])[:, None]
        gradient[:, label] = -others / (others + e[:, label])
        greatest = e.argmax(dim=1)
        rest = torch.where(greatest == label, others, e.sum(dim=1) - 1)
        return rest.log1p() + (z[rows, greatest] - z[:, label]), gradient
    order = z.argsort(dim=1, descending=True, stable=True)
    other = torch.where(order[:, 0] == label, order[:, 1], order[:, 0])
    if kind.startswith("pm"):
        return _log_odds(z, label, other, kind)
    losses, gradient = z[rows, other] - z[:, label], torch.zeros_like(z)
    gradient[:, label] = -1
    gradient[rows, other] = 1
    if kind == "dlr":
        width = z[rows, order[:, 0]] - z[rows, order[:, 2]] + 1e-12
        losses, gradient = losses / width, gradient / width[:, None]
        gradient[rows, order[:, 0]] -= losses / width
        gradient[rows, order[:, 2]] += losses / width
    return losses, gradient


def _log_odds(z: Tensor, label: int, other: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """log A - log B of docs/math.md#attack_loss, each of them from its own greatest logit."""
    rows, weight = torch.arange(len(z)), 2.0 if kind == "pm" else 1.0
    sums = []
    for member, has_rest in ((other, kind != "pm-other"), (torch.full_like(other, label), kind != "pm-label")):
        factors = torch.full_like(z, float(has_rest))
        factors[rows, label] = factors[rows, other] = 0
        factors[rows, member] = weight
        sums.append(torch.where(factors > 0, z + factors.log(), -torch.inf))
    return sums[0].logsumexp(dim=1) - sums[1].logsumexp(dim=1), sums[0].softmax(dim=1) - sums[1].softmax(dim=1)


def strength(count: int = 256) -> list[dict[str, Any]]:
    """Accuracy, in float32, under attacks whose networks run in lower precision."""
    digits, rows = models.mnist().take(slice(0, count)), []
    cases = (("standard_mnist", 0.1), ("robust_mnist", 0.2))
    for (name, eps), attack in itertools.product(cases, (PGD, APGD)):
        model, flags = getattr(models, name)(), {}
        for precision in ("float32", "bfloat16", "float16"):
            x = attack(model, eps=eps, steps=20, precision=precision)(digits.images, digits.labels)
            with torch.no_grad():
                flags[precision] = model(x).argmax(dim=1) == digits.labels
            accuracy = float(flags[precision].double().mean())
            low, high = wilson_interval(accuracy, count)
            rows.append(
                {
                    "model": name,
                    "attack": f"{attack.__name__}-20, Linf {eps}",
                    "precision": precision,
                    "images": count,
                    "accuracy": accuracy,
                    "accuracy_ci": [round(low, 4), round(high, 4)],
                    "judged otherwise than float32": int((flags[precision] != flags["float32"]).sum()),
                }
            )
    return rows


def determinism() -> list[dict[str, Any]]:
    """Flags of a random defense under two attacks: every backend, batch size, order, split and number of threads."""
    backends = [name for name in ("eager", "cpp") if name in _registry.impls("attack_loss")]
    settings = list(itertools.product(backends, (1, 5, COUNT), ("given", "shuffled"), (1, 2), (1, 2, 3, 4)))
    wanted, rows = None, []
    threads = torch.get_num_threads()
    with CONTEXT.Pool(2) as pool:
        for backend, batch, order, processes, used in settings:
            ids = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)) if order == "shuffled" else None
            ids = torch.arange(COUNT) if ids is None else ids
            jobs = [(backend, batch, part.tolist(), used) for part in ids.tensor_split(processes)]
            found = [flags(*jobs[0])] if processes == 1 else pool.starmap(flags, jobs)
            flag, pixels = (torch.cat(each)[ids.argsort()] for each in zip(*found, strict=True))
            wanted = (flag, pixels) if wanted is None else wanted
            rows.append(
                {
                    "backend": backend,
                    "batch": batch,
                    "order": order,
                    "processes": processes,
                    "threads": used,
                    "flags": flag.numel(),
                    "other flags": int((flag != wanted[0]).sum()),
                    "images with other bits": int((pixels != wanted[1]).flatten(1).any(dim=1).sum()),
                }
            )
    torch.set_num_threads(threads)
    return rows


def flags(backend: str, batch: int, ids: list[int], threads: int) -> tuple[Tensor, Tensor]:
    """Whether the defense is right, (n, attacks, DRAWS), and the candidates, (n, attacks, C, H, W)."""
    torch.set_num_threads(threads)
    digits = models.mnist()
    purifier = atop_fast.build_purifier("unet", channels=1, width=4).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in purifier.parameters():
            weights.copy_(0.2 * torch.randn(weights.shape, generator=generator))
    defense = atop_fast.Defense(atop_fast.RT2(8, sigma=0.1), purifier, models.standard_mnist())
    attacks: list[Attack] = [PGD(defense, eps=0.1, steps=3, eot_iter=2), APGD(defense, eps=0.1, steps=3, eot_iter=2)]
    found, pixels = [], []
    with _registry.owned_by(backend, [name for name in _registry.OPS if _registry.owner(name, "cpu") == "cpp"], "cpu"):
        for part in torch.tensor(ids).split(batch):
            x, y = digits.images[part], digits.labels[part]
            candidates = torch.stack([attack(x, y, part) for attack in attacks], dim=1)
            logits = [draw_logits(defense, x, 1, part, range(DRAWS)) for x in candidates.unbind(1)]
            found.append(torch.stack(logits, dim=1).argmax(dim=3) == y[:, None, None])
            pixels.append(candidates)
    return torch.cat(found), torch.cat(pixels)


if __name__ == "__main__":
    main()
