"""Predicted costs of workloads on an H200, before any has run: python benchmarks/roofline.py

Networks run on fake tensors: nothing is computed, and every operation that reaches the dispatcher is counted with its
floating-point operations (1 multiplication and addition = 2; torch.utils.flop_counter has the formulas) and the bytes
of its inputs and outputs. The results are:

    floor      max(FLOP / datasheet's rate, bytes of products / datasheet's bandwidth), products being convolutions and
               matrix products, each of whose inputs and outputs passes the memory once. Nothing can be faster without
               another algorithm, or products that stay on the chip from one to the next.
    predicted  the sum over operations of max(FLOP / sustained rate, bytes / sustained bandwidth): every operation is as
               fast as the device was seen to be, one after the other, launches for free.

Backward passes of the ops of atop_fast count as one operation each, as the kernels are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

import atop_fast as atop
from atop_fast.attacks.folding import fold_batch_norm
from atop_fast.bench.deepfill_plain import PlainDeepFill
from atop_fast.ops import _registry
from atop_fast.purifiers import SNPatchDiscriminator, discriminator_loss, generator_loss

PATH = Path(__file__).parent / "results" / "counted" / "roofline--h200.json"
# Dense rates and bandwidth of the SXM part in NVIDIA's "H200 Tensor Core GPU" datasheet (2023); `sustained` is what
# torch 2.11's matrix product of random numbers and its copy reached on one such card, measured once and not by this
# script. Float32 is of the CUDA cores: verdicts do not round to TF32.
H200 = {
    "bfloat16": {"peak_tflops": 989.0, "sustained_tflops": 790.0},
    "float32": {"peak_tflops": 67.0, "sustained_tflops": 50.0},
    "memory": {"peak_tbps": 4.8, "sustained_tbps": 4.3},
}
# Our ops with matrix products inside, which are in float32 for any feature type: counted by their references.
INNER = ("contextual_attention", "contextual_attention_bwd")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Operation:
    """One launch: its FLOP, the bytes of its inputs and outputs, and the type in which it computes."""

    flop: float
    nbytes: int
    dtype: str

    def seconds(self, kind: str) -> float:
        """The longer of computing and moving, at the "peak" or "sustained" rates."""
        return max(self.flop / (H200[self.dtype][f"{kind}_tflops"] * 1e12), self.nbytes / bandwidth(kind))


def bandwidth(kind: str) -> float:
    """Bytes a second."""
    return H200["memory"][f"{kind}_tbps"] * 1e12


class Counted(TorchDispatchMode):
    """The operations that run inside; views move nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and func.overloadpacket not in flop_registry:
            # A function that is made of others, such as matmul, is counted by them.
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if func.is_view or func.namespace not in ("aten", "atop_fast") or name in ("empty", "detach"):
            return out
        tensors = [t for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor)]
        formula = flop_registry.get(func.overloadpacket)
        flop = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        narrow = bool(tensors) and tensors[0].dtype == torch.bfloat16
        if name in INNER:
            with Counted() as inner:
                _registry.OPS[name].reference(*args)
            flop, narrow = sum(o.flop for o in inner.operations), False
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        self.operations.append(Operation(float(flop), nbytes, "bfloat16" if narrow else "float32"))
        return out


def count(work: Callable[[], object], times: float = 1.0) -> tuple[list[Operation], float]:
    """The operations of `work`, and how often it runs."""
    with Counted() as counted:
        work()
    return counted.operations, times


def row(name: str, precision: str, images: int, parts: list[tuple[list[Operation], float]]) -> dict[str, Any]:
    """The total cost of a workload."""

    def total(value: Callable[[Operation], float], products: bool = False) -> float:
        return sum(times * sum(value(o) for o in found if o.flop or not products) for found, times in parts)

    compute = total(lambda o: o.flop / (H200[o.dtype]["peak_tflops"] * 1e12))
    return {
        "workload": name,
        "precision": precision,
        "images": images,
        "pflop": _digits(total(lambda o: o.flop) / 1e15),
        "terabytes": _digits(total(lambda o: o.nbytes) / 1e12),
        "launches": round(total(lambda o: 1)),
        "floor_s": _digits(max(compute, total(lambda o: o.nbytes, products=True) / bandwidth("peak"))),
        "predicted_s": _digits(total(lambda o: o.seconds("sustained"))),
    }


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def gradient(model: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Callable[[], object]:
    """A gradient in images, of a frozen model."""

    def work() -> object:
        x = torch.empty(shape, requires_grad=True)
        loss = F.cross_entropy(model(x).float(), torch.zeros(len(x), dtype=torch.int64), reduction="sum")
        return torch.autograd.grad(loss, x)

    return work


def forward(model: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Callable[[], object]:
    """A pass without gradients."""

    def work() -> object:
        with torch.no_grad():
            return model(torch.empty(shape))

    return work


def finetune_step(batch: int) -> Callable[[], object]:
    """AToP's step on DeepFillV2 at 256x256, as atop_fast.training.FinetuneStep makes it, without Adam."""
    purifier, discriminator = atop.build_purifier("deepfill_v2"), SNPatchDiscriminator()
    classifier = atop.build_classifier("resnet18_256").eval().requires_grad_(False)
    attack = gradient(classifier, (batch, 3, 256, 256))

    def work() -> object:
        attack()
        coarse, refined = purifier.stages(torch.empty(batch, 5, 256, 256))
        wanted, mask = torch.empty(batch, 3, 256, 256), torch.empty(batch, 1, 256, 256)
        both = discriminator(torch.cat((wanted, refined.detach().float())), torch.cat((mask, mask)))
        discriminator_loss(*both.float().chunk(2)).backward()
        discriminator.requires_grad_(False)
        loss = F.l1_loss(coarse.float(), wanted) + F.l1_loss(refined.float(), wanted)
        loss = loss + generator_loss(discriminator(refined.float(), mask).float())
        logits = classifier((refined.float() + 1) / 2).float()
        (loss + F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64))).backward()
        return discriminator.requires_grad_(True)

    return work


def networks() -> dict[str, Callable[[Tensor], Tensor]]:
    """The models under attack, folded as attacks fold them; a fake tensor cannot be traced, so of real weights."""

    def folded(module: nn.Module) -> nn.Module:
        return fold_batch_norm(module.eval().requires_grad_(False))

    small, large = folded(atop.build_classifier("resnet18")), folded(atop.build_classifier("resnet18_256"))
    unet = folded(atop.build_purifier("unet", width=32, blocks=2))
    deepfill = folded(atop.build_purifier("deepfill_v2"))

    def behind(purifier: nn.Module, classifier: nn.Module) -> Callable[[Tensor], Tensor]:
        # The transform is left out: one launch, which reads and writes the images.
        def model(x: Tensor) -> Tensor:
            mask = torch.empty_like(x[:, :1])
            return classifier((purifier(torch.cat((x, mask, mask), dim=1)) + 1) / 2)

        return model

    return {"resnet18": small, "native": behind(unet, small), "deepfill": behind(deepfill, large)}


def workloads(precision: str, models: dict[str, Callable[[Tensor], Tensor]]) -> list[dict[str, Any]]:
    """The rows of one precision."""
    rows = []
    for batch in (8, 64):
        parts = [count(finetune_step(batch), 10_000 / batch)]
        rows.append(row(f"fine-tuning DeepFillV2, FGSM, batches of {batch}", precision, 10_000, parts))
    resnet = models["resnet18"]
    shape, batches = (512, 3, 32, 32), 10_000 / 512
    # APGD-CE, APGD-T and FAB-T on 9 classes; FAB-T and Square also forward alone.
    parts = [
        count(gradient(resnet, shape), (101 + 9 * 101 + 9 * 100) * batches),
        count(forward(resnet, shape), (9 * 100 + 5002) * batches),
    ]
    rows.append(row("AutoAttack standard, ResNet-18, no image fooled", precision, 10_000, parts))
    settings = (
        ("U-Net and ResNet-18, 32x32", "native", 32, 512),
        ("DeepFillV2 and ResNet-18, 256x256", "deepfill", 256, 8),
    )
    for name, key, size, rows_a_pass in settings:
        model = models[key]
        shape, batches = (rows_a_pass, 3, size, size), 512 / rows_a_pass
        # 200 gradients of 20 draws; choice and verdict of two candidates, and of the one rounded to 8 bits.
        parts = [
            count(gradient(model, shape), 200 * 20 * batches),
            count(forward(model, shape), (2 * (20 + 20) + 20) * batches),
        ]
        rows.append(row(f"PGD-200 x EOT-20, {name}", precision, 512, parts))
    return rows


def purifier_costs() -> dict[str, dict[str, float]]:
    """GFLOP and saved megabytes of DeepFillV2 for one image of 256x256, as published and here."""
    checkpointed = atop.build_purifier("deepfill_v2", checkpointing=True)
    published, ours = PlainDeepFill(48), atop.build_purifier("deepfill_v2")
    x, features, mask = (torch.empty(1, *shape) for shape in ((5, 256, 256), (96, 64, 64), (1, 256, 256)))
    attention = {
        "published": lambda: published.stage2.contextual_attention(features, mask),
        "ours": lambda: atop.ops.contextual_attention(features, mask),
    }
    models = {"published": (published, published), "ours": (ours, ours.stages)}
    models["checkpointed"] = (checkpointed, checkpointed.stages)
    costs = {}
    for name, (module, run) in models.items():
        costs[name] = {
            "forward_gflop": _gflop(lambda run=run: run(x)),
            "both_gflop": _gflop(lambda run=run: sum(y.float().sum() for y in run(x)).backward()),
            **_saved(run, x),
        }
        if name in attention:
            costs[name]["attention_gflop"] = _gflop(attention[name])
            costs[name]["upsampling_gflop"] = _gflop(lambda module=module: _upsampled(module))
    return costs


def _upsampled(module: nn.Module) -> None:
    """The four layers that double the images' sides."""
    for stage in ("stage1", "stage2"):
        for block, shape in (("up_block1", (1, 96, 64, 64)), ("up_block2", (1, 48, 128, 128))):
            module.get_submodule(f"{stage}.{block}.conv1_upsample")(torch.empty(shape))


def _gflop(work: Callable[[], object]) -> float:
    return round(sum(o.flop for o in count(work)[0]) / 1e9, 1)


def _saved(model: Callable[[Tensor], Any], x: Tensor) -> dict[str, int]:
    """Megabytes that autograd keeps for the backward pass, weights not counted; each tensor once."""
    found = {}
    for precision in PRECISIONS:
        kept: dict[int, Any] = {}

        def keep(t: Tensor, kept: dict[int, Any] = kept) -> Tensor:
            if not isinstance(t, nn.Parameter):
                kept[id(t.untyped_storage())] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), _autocast(precision):
            outputs = model(x)
        found[f"{precision}_mb"] = round(sum(storage.nbytes() for storage in kept.values()) / 1e6)
        del outputs
    return found


def _autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def main() -> None:
    """Count, and write the result file."""
    # Plain convolutions stand for those of a GPU: Winograd's algorithm is for CPUs.
    _registry.MISSING["cpp"] = "not counted"
    rows = []
    models = networks()
    with FakeTensorMode(allow_non_fake_inputs=True):
        costs = purifier_costs()
        for precision in PRECISIONS:
            with _autocast(precision):
                rows += workloads(precision, models)
    document = {"device": "NVIDIA H200, on paper", "constants": H200, "deepfill_v2": costs, "rows": rows}
    PATH.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
