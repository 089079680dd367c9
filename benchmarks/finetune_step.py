"""A fine-tuning step of DeepFillV2 at 256x256, whole and by part: python benchmarks/finetune_step.py --help

FGSM on the classifier, the random transform, the purifier, a step of the discriminator, the losses of AToP's equation 8
with their gradients, and Adam. The variants:

    public      the public formulation: two identical generator passes, attention sample by sample, NCHW, float32
    one pass    that with one pass, without gradients that nobody reads, channels_last, bfloat16, none of our ops
    compiled    the same, the generator under torch.compile
    float32, bfloat16       atop_fast.training.FinetuneStep

Weights, images, masks and noise are the same. Beside the times stand the distance of the generator's weight gradients
from those of the first variant, and the peak memory of a process that runs the variant alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _harness
import torch
import torch.nn.functional as F
from deepfill_plain import PlainDeepFill
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import atop_fast as atop
from atop_fast.purifiers import SNPatchDiscriminator, discriminator_loss, generator_loss
from atop_fast.training import FinetuneConfig, FinetuneStep

CONFIG = FinetuneConfig(lr=1e-4, gan_weight=0.01, ce_weight=0.05, attacked="classifier", target="adversarial")
VARIANTS = ("public", "one pass", "compiled", "float32", "bfloat16")
PARTS = (
    "attack", "transform", "purifier", "discriminator", "losses",
    "backward of the purifier", "optimizer of the purifier",
)  # fmt: skip


class PlainStep:
    """The step as a user writes it from torch's own layers; the parts have the names of FinetuneStep's."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, classifier: nn.Module, variant: str) -> None:
        self.generator, self.discriminator, self.classifier = generator, discriminator, classifier
        self.passes = 2 if variant == "public" else 1
        self.transform = atop.RT2(32, sigma=0.25)
        if variant != "public":
            for module in (generator, discriminator, classifier):
                module.to(memory_format=torch.channels_last)
        self.stages = torch.compile(generator) if variant == "compiled" else generator
        self.optimizers = [
            torch.optim.Adam(module.parameters(), CONFIG.lr, (0.5, 0.999)) for module in (generator, discriminator)
        ]

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.passes == 1):
            return self._step(x, y, ids, epoch)

    def _step(self, x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> dict[str, Tensor]:
        with record_function("attack"):
            x = self._fgsm(x, y)
        with record_function("transform"):
            corrupted = self.transform(x, atop.randomness.derive_seed(0, "transform"), ids, epoch)
        with record_function("purifier"):
            outputs = [self.stages(corrupted) for _ in range(self.passes)]
            (coarse, refined), (_, last) = outputs[0], outputs[-1]
        wanted, mask = 2 * x - 1, corrupted[:, -1:].detach()
        with record_function("discriminator"):
            images = torch.cat((wanted, refined.detach().float()))
            d_loss = discriminator_loss(*self.discriminator(images, torch.cat((mask, mask))).float().chunk(2))
            self._update(1, d_loss)
        with record_function("losses"):
            l1 = F.l1_loss(coarse.float(), wanted) + F.l1_loss(refined.float(), wanted)
            ce = F.cross_entropy(self.classifier((last.float() + 1) / 2).float(), y)
            # The public code keeps the discriminator's weights attached here, though nobody reads their gradients.
            self.discriminator.eval().requires_grad_(self.passes == 2)
            gan = generator_loss(self.discriminator(refined.float(), mask).float())
        self._update(0, l1 + CONFIG.gan_weight * gan + CONFIG.ce_weight * ce)
        self.discriminator.train().requires_grad_(True)
        return {"l1": l1, "gan": gan, "ce": ce, "discriminator": d_loss}

    def _fgsm(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        loss = F.cross_entropy(self.classifier(x).float(), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        return (x.detach() + CONFIG.eps * gradient.sign()).clamp(0, 1)

    def _update(self, index: int, loss: Tensor) -> None:
        self.optimizers[index].zero_grad(set_to_none=True)
        name = ("purifier", "discriminator")[index]
        with record_function(f"backward of the {name}"):
            loss.backward()
        with record_function(f"optimizer of the {name}"):
            self.optimizers[index].step()


def build(variant: str, cnum: int, size: int) -> tuple[Any, nn.Module]:
    """The step and its generator, with the same weights for every variant."""
    with atop.randomness.seeded(0):
        plain, discriminator = PlainDeepFill(cnum), SNPatchDiscriminator()
        classifier = atop.build_classifier("resnet18_256").eval().requires_grad_(False)
    if variant not in ("float32", "bfloat16"):
        return PlainStep(plain, discriminator, classifier, variant), plain
    generator = atop.build_purifier("deepfill_v2", cnum=cnum)
    generator.load_state_dict(plain.state_dict())
    config = FinetuneConfig(**{**vars(CONFIG), "precision": variant})
    return FinetuneStep(
        atop.Defense(atop.RT2(32, sigma=0.25), generator, classifier), discriminator, config, 0
    ), generator


def data(batch: int, size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Smooth random images with labels, sample ids and the epoch."""
    g = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(batch, 3, 16, 16, generator=g), (size, size), mode="bilinear")
    return images, torch.arange(batch) % 10, torch.arange(batch), 0


def gradients(generator: nn.Module) -> Tensor:
    """All weight gradients of the last step."""
    return torch.cat([p.grad.flatten() for p in generator.parameters() if p.grad is not None])


def split(step: Callable[..., Any], batch: Any) -> dict[str, float]:
    """Seconds of every part, from one profiled step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(*batch)
    totals = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    return {part: round(totals.get(part, 0.0), 3) for part in PARTS}


def peak_mebibytes(args: argparse.Namespace, variant: str) -> int:
    """Peak resident memory of a process that runs two steps of the variant, above that of one that has run none."""
    command = [sys.executable, __file__, "--alone", variant, "--batch", str(args.batch), "--cnum", str(args.cnum)]
    done = subprocess.run([*command, "--size", str(args.size)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def run_alone(args: argparse.Namespace) -> None:
    """Two steps of one variant; prints the peak memory in MiB."""
    step, _ = build(args.alone, args.cnum, args.size)
    batch = data(args.batch, args.size)
    before = _peak_kibibytes()
    for _ in range(2):
        step(*batch)
    print((_peak_kibibytes() - before) // 1024)


def _peak_kibibytes() -> int:
    # Not getrusage, whose peak a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every variant; they run in turns."""
    batch = data(args.batch, args.size)
    steps, found = {}, {}
    for variant in args.variants:
        steps[variant], generator = build(variant, args.cnum, args.size)
        steps[variant](*batch)
        found[variant] = gradients(generator)
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(args.rounds):
        for variant, step in steps.items():
            start = time.perf_counter()
            step(*batch)
            seconds[variant].append(time.perf_counter() - start)
    rows, first = [], args.variants[0]
    for variant, step in steps.items():
        distance = float((found[variant] - found[first]).norm() / found[first].norm())
        median = statistics.median(seconds[variant])
        rows.append({
            "variant": variant, "batch": args.batch, "size": args.size, "cnum": args.cnum, "seconds": round(median, 3),
            "spread": round(max(seconds[variant]) - min(seconds[variant]), 3),
            "ratio": round(statistics.median(seconds[first]) / median, 2),
            "gradient_distance": float(f"{distance:.2g}"), "parts": split(step, batch),
            "peak_mib": None if variant == "compiled" else peak_mebibytes(args, variant),
        })  # fmt: skip
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, help="the first is the baseline")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="height and width of the images")
    parser.add_argument("--cnum", type=int, default=48, help="width of DeepFillV2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="write the results as JSON")
    parser.add_argument("--out", type=Path, default=_harness.RESULTS, help="folder for the JSON file")
    parser.add_argument("--commit", help="commit to record; by default what git says")
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the results if asked to."""
    args = parse()
    if args.alone:
        return run_alone(args)
    _harness.keep_heap()
    rows = measure(args)
    _harness.print_table([{**row, "parts": None, **row["parts"]} for row in rows])
    if args.json:
        document = {**_harness.metadata("cpu", args.commit), "rows": rows}
        print("wrote", _harness.write("finetune-step", "cpu", args.out, document))


if __name__ == "__main__":
    main()
