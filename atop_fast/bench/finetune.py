"""The suite `finetune`: fine-tuning steps compared to the same step built from torch's layers.

FGSM on the classifier, the random transform, the purifier, a step of the discriminator, the losses of AToP's equation 8
with their gradients, and Adam. Weights, images, masks and noise are the same in all variants. The rows also report the
distance of the generator's weight gradients from those of the first variant, relative to their norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from .._core.capture import WARM_UP
from ..classifiers import build_classifier
from ..defense import Defense
from ..purifiers import SNPatchDiscriminator, build_purifier, discriminator_loss, generator_loss
from ..randomness import derive_seed, seeded
from ..training import FinetuneConfig
from ..training.finetuning import FinetuneStep
from ..transforms import RT2
from .deepfill_plain import PlainDeepFill
from .harness import Case, Function, Options, Quality, flops
from .models import smooth_images
from .unet_plain import PlainUNet

CONFIG = FinetuneConfig(lr=1e-4, gan_weight=0.01, ce_weight=0.05, attacked="classifier", target="adversarial")
UNET = {"channels": 3, "width": 32, "blocks": 2}


class Plain(NamedTuple):
    """How a user writes the step."""

    passes: int = 1
    channels_last: bool = False
    bfloat16: bool = False
    compiled: bool = False


# "public" is the public code's formulation: two identical generator passes, attention in a loop over samples, NCHW.
# "one pass" has none of our ops, but all optimizations available to any user.
PLAIN = {
    "plain": Plain(),
    "compile": Plain(compiled=True),
    "public": Plain(passes=2),
    "one pass bfloat16": Plain(channels_last=True, bfloat16=True),
    "compile bfloat16": Plain(channels_last=True, bfloat16=True, compiled=True),
}


class PlainStep:
    """The step as a user writes it from torch's own layers; the parts have the names of FinetuneStep's."""

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, classifier: nn.Module, transform: RT2, how: Plain
    ) -> None:
        self.generator, self.discriminator, self.classifier = generator, discriminator, classifier
        self.transform, self.how = transform, how
        if how.channels_last:
            for module in (generator, discriminator, classifier):
                module.to(memory_format=torch.channels_last)
        self.stages: Any = torch.compile(generator) if how.compiled else generator
        self.optimizers = [
            torch.optim.Adam(module.parameters(), CONFIG.lr, (0.5, 0.999)) for module in (generator, discriminator)
        ]

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> dict[str, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.how.bfloat16):
            return self._step(x, y, ids, epoch)

    def _step(self, x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> dict[str, Tensor]:
        with record_function("attack"):
            x = self._fgsm(x, y)
        with record_function("transform"):
            corrupted = self.transform(x, derive_seed(0, "transform"), ids, epoch)
        with record_function("purifier"):
            outputs = [self.stages(corrupted) for _ in range(self.how.passes)]
        stages, refined, last = outputs[0], outputs[0][-1], outputs[-1][-1]
        wanted, mask = 2 * x - 1, corrupted[:, -1:].detach()
        with record_function("discriminator"):
            images = torch.cat((wanted, refined.detach().float()))
            d_loss = discriminator_loss(*self.discriminator(images, torch.cat((mask, mask))).float().chunk(2))
            self._update(1, d_loss)
        with record_function("losses"):
            l1 = torch.stack([F.l1_loss(stage.float(), wanted) for stage in stages]).sum()
            ce = F.cross_entropy(self.classifier((last.float() + 1) / 2).float(), y)
            # The public code does not detach the discriminator's weights here, although their gradients are unused.
            self.discriminator.eval().requires_grad_(self.how.passes == 2)
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


def cases(options: Options) -> Iterator[Case]:
    """The step of a U-Net at 32x32 and of DeepFillV2 at 256x256."""
    gpu = options.device == "cuda"
    variants = ["plain", "atop_fast", "atop_fast bfloat16", *(("one pass bfloat16",) if gpu else ())]
    yield step_case("unet", (64 if gpu else 16, 32), options, [*variants, *_compiled(options, gpu)])
    if options.quick:
        return
    variants = ["public", "one pass bfloat16", "atop_fast", "atop_fast bfloat16"]
    compiled = ("compile bfloat16",) if options.compile_all or gpu else ()
    yield step_case("deepfill_v2", (16 if gpu else 8, 256), options, [*variants, *compiled])


def _compiled(options: Options, gpu: bool) -> tuple[str, ...]:
    """The compiled variants of the U-Net, in each precision of ours."""
    if options.quick:
        return ()
    return ("compile", "compile bfloat16") if gpu else ("compile",)


def step_case(purifier: str, size: tuple[int, int], options: Options, variants: list[str]) -> Case:
    """The step of a purifier for (images, their side), by the names of the variants."""
    x, y, ids, epoch = batch(*size, options.device)
    run: dict[str, Function] = {
        name: _run(*build(name, purifier, options.device), (x, y, ids, epoch)) for name in variants
    }

    def judge(outputs: dict[str, Any]) -> Quality:
        first = outputs[variants[0]]
        return {name: {"difference": float((found - first).norm() / first.norm())} for name, found in outputs.items()}

    title = {"unet": "U-Net, width 32, 2 blocks", "deepfill_v2": "DeepFillV2"}[purifier]
    # Counting runs a step, so it has separate networks.
    plain, _ = build("plain", purifier, options.device)
    work = flops(lambda: plain(x, y, ids, epoch))
    ours = [name for name in variants if name.startswith("atop_fast")]
    shape = "x".join(map(str, x.shape))
    # On a GPU, the first updates are a warm-up and the next is captured as a CUDA graph, so that replays are timed.
    rounds, warm_up = (10, WARM_UP + 3) if options.device == "cuda" else (3, 2)
    return Case("finetune", title, shape, "float32", run, ours, 0, work, len(x), judge, rounds, warm_up=warm_up)


def build(variant: str, purifier: str, device: str) -> tuple[Any, nn.Module]:
    """The step and its generator, with the same weights for every variant."""
    deep = purifier == "deepfill_v2"
    with seeded(0):
        plain = PlainDeepFill() if deep else PlainUNet(*UNET.values())
        discriminator = SNPatchDiscriminator() if deep else SNPatchDiscriminator(width=32, depth=3)
        classifier = build_classifier("resnet18_256" if deep else "resnet18")
    transform = RT2(32 if deep else 4, sigma=0.25)
    classifier = classifier.to(device).eval().requires_grad_(False)
    plain, discriminator = plain.to(device), discriminator.to(device)
    if variant in PLAIN:
        return PlainStep(plain, discriminator, classifier, transform, PLAIN[variant]), plain
    generator = build_purifier(purifier, **({} if deep else UNET)).to(device)
    generator.load_state_dict(plain.state_dict())
    config = replace(CONFIG, precision="bfloat16" if variant.endswith("bfloat16") else "float32")
    return FinetuneStep(Defense(transform, generator, classifier), discriminator, config, 0), generator


def batch(count: int, size: int, device: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """Smooth random images with labels, sample ids and the epoch."""
    ids = torch.arange(count, device=device)
    return smooth_images(count, size).to(device), ids % 10, ids, 0


def gradients(generator: nn.Module) -> Tensor:
    """All weight gradients of the last step."""
    return torch.cat([p.grad.flatten() for p in generator.parameters() if p.grad is not None])


def _run(step: Any, generator: nn.Module, data: tuple[Any, ...]) -> Function:
    def run() -> Tensor:
        step(*data)
        return gradients(generator)

    return run
