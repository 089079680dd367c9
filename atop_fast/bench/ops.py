"""The suite `ops`: every op in every backend of a device, over shapes, dtypes and layouts."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._core.precision import is_fast
from ..ops import _registry, gated
from . import attack_losses, attack_ops, attack_steps, transforms
from .harness import Case, Function, Options, by_backend, gradient_in, op_case

# The package exports each function under the name of its module.
contextual_attention = importlib.import_module("atop_fast.ops.contextual_attention")
conv3x3 = importlib.import_module("atop_fast.ops.conv3x3")
upsample_conv3x3 = importlib.import_module("atop_fast.ops.upsample_conv3x3")
random_bits = importlib.import_module("atop_fast.ops.random_bits")
pgd_step_linf = importlib.import_module("atop_fast.ops.pgd_step_linf")
NUMBERS = (2 / 255, 8 / 255)
# Batch, channels, outputs and size: a CIFAR ResNet-18 under attack, and an inpainting network.
CONVOLUTIONS = ((64, 64, 64, 32), (64, 128, 128, 16), (64, 256, 256, 8), (64, 512, 512, 4), (8, 96, 192, 64))
# Batch, channels and size, of the same network.
UPSAMPLINGS = ((8, 96, 64), (8, 48, 128))
# Cases in which torch.compile is the main peer, or a target of docs/transforms.md: it runs in all shapes and types.
COMPILED = ("gated_elu forward", "gated_elu both", "corrupt forward", "corrupt both", "random_normal forward")
# A quick run on a GPU takes a second case of the same name only if it moves as many times the bytes.
LARGER = 16
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def pgd_cases(device: str, quick: bool) -> Iterator[Case]:
    """The step out of place and in place; in place, eager also writes into the images."""
    shapes = ((64, 3, 32, 32), (8, 3, 224, 224), (64, 3, 256, 256))[: 1 if quick else None]
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.float64)):
        x0 = torch.rand(shape, dtype=dtype, device=device)
        grad = torch.randn_like(x0)
        x = (x0 + 0.02 * torch.randn_like(x0)).clamp(0, 1)
        nbytes = 4 * x.nbytes
        formula = functools.partial(pgd_step_linf.formula, x, grad, x0, *NUMBERS)
        run = {name: functools.partial(f, x, grad, x0, *NUMBERS) for name, f in _impls("pgd_step_linf", device).items()}
        yield _case("pgd_step_linf", "forward", x, "nchw", nbytes, formula, run, tolerance=0)
        moved = x.clone()
        in_place = {name: _in_place(f, moved, grad, x0) for name, f in _impls("pgd_step_linf_", device).items()}

        def formula_in_place(x: Tensor = moved, grad: Tensor = grad, x0: Tensor = x0) -> Tensor:
            return x.copy_(pgd_step_linf.formula(x, grad, x0, *NUMBERS))

        # No check, because that would move the images; the tests compare it, and it shares the other variant's code.
        yield _case("pgd_step_linf_", "forward", x, "nchw", nbytes, formula_in_place, in_place, tolerance=None)


def gated_cases(device: str, quick: bool) -> Iterator[Case]:
    """Forward, and forward plus backward as autograd runs it; relu, and the bias with its gradient, at one size."""
    shapes = ((8, 96, 32, 32), (8, 96, 128, 128), (8, 96, 256, 256))[: 2 if quick else None]
    for shape, dtype, layout in itertools.product(shapes, gated.FLOATS, LAYOUTS):
        # The usual types of networks at every size, the others at one size.
        if dtype in (torch.float32, torch.bfloat16) or shape == shapes[1]:
            yield from _gated_cases("gated_elu", device, shape, dtype, layout)
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), LAYOUTS):
        yield from _gated_cases("gated_relu", device, shapes[1], dtype, layout)
        for channels in (96, 24):
            yield from _gated_cases("gated_elu_bias", device, (8, channels, 128, 128), dtype, layout)


def _gated_cases(name: str, device: str, shape: Sequence[int], dtype: torch.dtype, layout: str) -> Iterator[Case]:
    h = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    bias = torch.randn(shape[1], device=device) if name.endswith("bias") else None
    rest = (bias, gated.RELU if "relu" in name else gated.ELU)
    formula = functools.partial(gated.formula, h, *rest)
    forward = {backend: functools.partial(f, h, *rest) for backend, f in _impls("gated", device).items()}
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    yield _case(name, "forward", h, layout, h.nbytes * 3 // 2, formula, forward, tolerance)
    dy = torch.randn_like(formula())
    both = {backend: functools.partial(_gate_pass, backend, h, dy, *rest) for backend in forward}
    formula = functools.partial(_gate_gradient, gated.formula, h, dy, *rest)
    yield _case(name, "both", h, layout, h.nbytes * 4, formula, both, tolerance)


def conv3x3_cases(device: str, quick: bool) -> Iterator[Case]:
    """Forward, and forward plus the gradient of the images, with prepared weights; and the preparation."""
    if device != "cpu":
        return
    for batch, channels, outputs, size in CONVOLUTIONS[: 1 if quick else None]:
        x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5, torch.randn(outputs)
        prepared = [conv3x3.OP_PREPARE(weight, transposed) for transposed in (False, True)]
        forward = {
            name: functools.partial(f, x, weight, bias, *prepared, 1) for name, f in _impls("conv3x3", device).items()
        }
        formula = functools.partial(conv3x3.formula, x, weight, bias, 1)
        dy = torch.randn_like(formula())
        nbytes = x.nbytes + dy.nbytes + weight.nbytes
        yield _case("conv3x3", "forward", x, "nhwc", nbytes, formula, forward, tolerance=1e-4, products=True)
        fixed = {"weight": weight, "bias": bias, "dilation": 1}
        ours = functools.partial(conv3x3.OP, **fixed, prepared=prepared[0], prepared_t=prepared[1])
        functions = (functools.partial(conv3x3.formula, **fixed), ours)
        formula, mine = (functools.partial(gradient_in, x, f, dy) for f in functions)
        both = {_registry.owner("conv3x3", device): mine}
        yield _case("conv3x3", "both", x, "nhwc", 2 * nbytes, formula, both, tolerance=1e-4, products=True)
        of_weight = [functools.partial(f, x, bias=None, dilation=1) for f in (conv3x3.formula, conv3x3.conv3x3)]
        formula, mine = (functools.partial(gradient_in, weight, f, dy) for f in of_weight)
        both = {_registry.owner("conv3x3", device): mine}
        yield _case("conv3x3_bwd_weight", "both", x, "nhwc", 2 * nbytes, formula, both, tolerance=1e-3, products=True)
        formula = functools.partial(conv3x3.reference_prepare, weight, False)
        run = {name: functools.partial(f, weight, False) for name, f in _impls("conv3x3_prepare", device).items()}
        yield _case("conv3x3_prepare", "forward", weight, "nchw", 5 * weight.nbytes, formula, run, tolerance=1e-6)


def upsample_conv3x3_cases(device: str) -> Iterator[Case]:
    """Forward plus the gradients of the images and the weights; a composition of torch's functions on every device."""
    names = [name for name in ("float32", "bfloat16") if is_fast(torch.device(device), name)]
    for (batch, channels, size), dtype in itertools.product(UPSAMPLINGS, [getattr(torch, name) for name in names]):
        x = torch.randn(batch, channels, size, size, device=device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = (torch.randn(channels, channels, 3, 3, device=device) / (9 * channels) ** 0.5).to(dtype)
        dy = torch.randn_like(upsample_conv3x3.formula(x, weight))
        functions = (upsample_conv3x3.formula, upsample_conv3x3.upsample_conv3x3)
        formula, mine = (functools.partial(_two_gradients, f, x, weight, dy) for f in functions)
        nbytes = 2 * (x.nbytes + dy.nbytes + weight.nbytes)
        yield _case(
            "upsample_conv3x3",
            "both",
            x,
            "nhwc",
            nbytes,
            formula,
            {"transposed": mine},
            tolerance=0.05 if dtype == torch.bfloat16 else 1e-4,
            products=True,
        )


def attention_cases(device: str) -> Iterator[Case]:
    """Forward, and forward plus backward, with a quarter of the blocks of 32 pixels masked."""
    for layout in LAYOUTS:
        features = 0.3 * torch.randn(8, 96, 64, 64, device=device).contiguous(memory_format=LAYOUTS[layout])
        blocks = (torch.rand(8, 1, 8, 8, device=device) < 0.25).float()
        valid = contextual_attention._valid(blocks.repeat_interleave(32, 2).repeat_interleave(32, 3), features)
        name = "contextual_attention"
        run = {
            backend: functools.partial(f, features, valid)
            for backend, f in _impls("contextual_attention", device).items()
        }
        formula = functools.partial(contextual_attention.formula, features, valid)
        yield _case(name, "forward", features, layout, 2 * features.nbytes, formula, run, tolerance=1e-3, products=True)
        dy = torch.randn_like(features)
        functions = [functools.partial(f, valid=valid) for f in (contextual_attention.formula, contextual_attention.OP)]
        formula, mine = (functools.partial(gradient_in, features, f, dy) for f in functions)
        both = by_backend(name, device, mine)
        yield _case(name, "both", features, layout, 5 * features.nbytes, formula, both, tolerance=1e-3, products=True)


def bits_cases(device: str) -> Iterator[Case]:
    """Random words for images; GPUs alone have a kernel."""
    for shape in ((64, 3, 32, 32), (64, 3, 256, 256)):
        x = torch.empty(shape, device=device)
        seed, ids = torch.full((), 5, device=device), torch.arange(len(x), device=device)
        key = (seed, ids, seed, 3, x[0].numel())
        run = {name: functools.partial(f, *key) for name, f in _impls("random_bits", device).items()}
        formula = functools.partial(random_bits.reference, *key)
        yield _case("random_bits", "forward", x, "nchw", 2 * x.nbytes, formula, run, tolerance=0)


def _impls(name: str, device: str) -> dict[str, Callable[..., Any]]:
    """The kernels of a device; the reference is checked by the tests, the formula is the baseline here."""
    return {backend: f for backend, f in _registry.impls(name).items() if backend in _registry.KERNELS[device]}


def _in_place(function: Callable[..., None], x: Tensor, grad: Tensor, x0: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        function(x, grad, x0, *NUMBERS)
        return x

    return run


def _gate_gradient(
    function: Callable[..., Tensor], h: Tensor, dy: Tensor, bias: Tensor | None, activation: int
) -> Tensor:
    """The gradient in `h`; the gradient in `bias` is computed, too."""
    leaves = [t.detach().requires_grad_() for t in (h, bias) if t is not None]
    y = function(leaves[0], None if bias is None else leaves[1], activation)
    return torch.autograd.grad(y, leaves, dy)[0]


def _two_gradients(function: Callable[..., Tensor], x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    return torch.autograd.grad(function(*leaves), leaves, dy)


class _Gate(torch.autograd.Function):
    """A backend's forward and backward as one autograd function, for equal autograd overhead."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor | None, activation: int, backend: str) -> Tensor:
        ctx.save_for_backward(h, bias)
        ctx.activation, ctx.backend = activation, backend
        return _registry.impls("gated")[backend](h, bias, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        with_db = ctx.needs_input_grad[1]
        dh, db = _registry.impls("gated_bwd")[ctx.backend](dy, *ctx.saved_tensors, ctx.activation, with_db)
        return dh, db if with_db else None, None, None


def _gate_pass(backend: str, h: Tensor, dy: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return _gate_gradient(lambda *inputs: _Gate.apply(*inputs, backend), h, dy, bias, activation)


def _case(
    op: str,
    direction: str,
    like: Tensor,
    layout: str,
    nbytes: int,
    formula: Function,
    run: Mapping[str, Function],
    tolerance: float | None,
    products: bool = False,
) -> Case:
    """An op_case of tensors like `like`."""
    ours = {name: function for name, function in run.items() if name != "eager"}
    shape = "x".join(map(str, like.shape)) + f", {layout}"
    dtype = str(like.dtype).removeprefix("torch.")
    return op_case(f"{op} {direction}", shape, dtype, formula, ours, nbytes, tolerance, products)


def all_cases(device: str, quick: bool) -> Iterator[Case]:
    """The cases of all ops; `quick` skips cases that take long to construct."""
    for sized in (pgd_cases, gated_cases, conv3x3_cases):
        yield from sized(device, quick)
    for make in (
        upsample_conv3x3_cases,
        attention_cases,
        bits_cases,
        attack_steps.step_cases,
        attack_losses.attack_loss_cases,
        attack_ops.attack_op_cases,
        transforms.transform_cases,
    ):
        yield from make(device)


def cases(options: Options) -> Iterator[Case]:
    """All cases, with torch.compile in each name's first one in float32 and in COMPILED.

    quick: each name's first one alone, and on a GPU, where kernels compete, larger ones; no torch.compile.
    """
    on_gpu = options.device == "cuda"
    sizes: dict[str, int] = {}
    for case in all_cases(options.device, options.quick and not on_gpu):
        single = case.dtype == "float32"
        first = single and case.name not in sizes
        larger = single and on_gpu and case.nbytes >= LARGER * sizes.get(case.name, case.nbytes)
        if first or larger:
            sizes[case.name] = case.nbytes
        if set(case.ours) <= {"eager"} or (options.quick and not (first or larger)):
            continue
        if options.quick or not (first or options.compile_all or case.name in COMPILED):
            case = replace(case, run={name: run for name, run in case.run.items() if name != "compile"})
        # Reset for each case: otherwise a second shape would cause a dynamic graph.
        torch._dynamo.reset()
        yield replace(case, replays=True)
