"""Checks of the contract between images, model and attack, before any attack: a few passes each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._core.checks import range_advice
from .._core.memory import bytes_saved
from ..classifiers.normalized import STATISTICS
from ..defense import Defense
from ..randomness import REPEATED_DRAWS
from ._order import find_order
from ._probe import FAIL, WARN, Finding, Probe, Status, difference, excess, same, untouched

NORMALIZATIONS = {
    "ImageNet's mean and deviation": STATISTICS["imagenet"],
    "CIFAR-10's mean and deviation": STATISTICS["cifar10"],
    "MNIST's mean and deviation": STATISTICS["mnist"],
    "mean and deviation 0.5": STATISTICS["half"],
}
# Sizes of values at the first layer that no single normalization gives, and above which images may be in 0..255.
TWICE = (5.0, 50.0)
_LAYERS = (nn.Conv2d, nn.Linear)
# Layers that act differently in training mode.
_ACTING = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
# (gradients, further forward passes) of an image under the usual protocols; docs/diagnostics.md says where from.
PASSES = {
    "deterministic": {"quick": (21, 4), "pgd-200": (200, 3), "autoattack": (1100, 3200)},
    # Forward: the draws of choice and verdict on the clean images and each attack's, and those of the 8-bit images.
    "random": {
        "quick": (84, 140),
        "eot-fast": (400, 100),
        "bpda-eot": (750, 490),
        "pgd-eot": (4000, 100),
        "autoattack-rand": (4000, 140),
    },
}


def images(probe: Probe) -> Finding:
    """Images are in [0, 1], not in 0..255, [-1, 1] or normalized."""
    low, high = (v.item() for v in probe.x.aminmax())
    numbers = {"min": low, "max": high}
    if low >= 0 and high <= 1:
        return Finding("images", "pass", f"Values lie in [{low:.3g}, {high:.3g}], within [0, 1].", numbers)
    if not low - high <= 0:
        text = "The images hold NaN: find where they come from."
    else:
        advice = range_advice(low, high) or "eps is in the unit of [0, 1] pixels: clamp them"
        text = f"Values lie in [{low:.3g}, {high:.3g}], outside [0, 1]; {advice}."
    return Finding("images", "fail", f"{text} The other checks were not run.", numbers)


def finite(probe: Probe) -> Finding:
    """Logits and input gradients are finite, and there is a gradient."""
    with torch.no_grad():
        logits = probe.logits(probe.x)
    _, gradient, attached = probe.gradient(probe.x)
    bad = [int((~torch.isfinite(t).flatten(1).all(dim=1)).sum()) for t in (logits, gradient)]
    numbers = {"images": len(probe.x), "bad_logits": bad[0], "bad_gradients": bad[1], "attached": attached}
    if not any(bad) and attached:
        return Finding("finite", "pass", f"Logits and gradients of all {len(probe.x)} images are finite.", numbers)
    if any(bad):
        text = (
            f"{bad[0]} of {len(probe.x)} images have NaN or infinite logits, and {bad[1]} such gradients: an attack "
            "stands still on them; look for overflow in half precision, division by 0, log or sqrt of 0."
        )
    else:
        text = (
            "No gradient reaches the images, since the logits are cut off from them (detach, no_grad, NumPy): "
            "differentiate through the model, or attack it with a black-box attack only."
        )
    return Finding("finite", "fail", f"{text} The later checks were not run.", numbers)


def logits(probe: Probe) -> Finding:
    """Outputs are logits, not probabilities or their logarithms."""
    with torch.no_grad():
        z = probe.logits(probe.x)
    low, high = (v.item() for v in z.aminmax())
    sums, log_sums = z.sum(dim=1), z.logsumexp(dim=1)
    numbers = {"min": low, "max": high, "row_sum": float(sums.mean()), "row_logsumexp": float(log_sums.mean())}
    span = f"[{low:.3g}, {high:.3g}]"
    if low >= 0 and high <= 1 and bool((sums - 1).abs().max() < 1e-3):
        text = f"Every row lies in {span} and sums to 1, a softmax's output: return the logits before it, or "
        return Finding("logits", "fail", f"{text}losses apply a second softmax and gradients vanish.", numbers)
    if high <= 0 and bool(log_sums.abs().max() < 1e-3):
        text = f"Every row lies in {span} and its exponentials sum to 1, a log-softmax's output: "
        text += "losses are the same, but confident rows have lost digits; return the logits before it."
        return Finding("logits", "warn", text, numbers)
    if low >= 0 and high <= 1:
        text = f"All outputs lie in {span} without summing to 1, as a sigmoid's do: return the logits before it."
        return Finding("logits", "warn", text, numbers)
    return Finding("logits", "pass", f"Outputs lie in {span} and do not sum to 1: logits.", numbers)


def accuracy(probe: Probe) -> Finding:
    """Clean accuracy is above chance, and no other order of the classes does better."""
    with torch.no_grad():
        logits = probe.logits(probe.x)
    classes = logits.shape[1]
    clean, chance, count = float(probe.clean.mean()), 1 / classes, len(probe.x)
    noise = (chance * (1 - chance) / count) ** 0.5
    numbers: dict[str, Any] = {"accuracy": clean, "chance": chance, "images": count}
    above = clean > chance + FAIL * noise
    if (found := find_order(logits.argmax(dim=1), probe.y, classes)) is not None:
        numbers |= {"order": found[0].tolist(), "accuracy_in_order": found[1]}
        moved = [f"{i} for {label}" for i, label in enumerate(numbers["order"]) if i != label]
        text = f"Clean accuracy is {clean:.2f} of {count} images, and {found[1]:.2f} if outputs stand for other labels "
        text += f"({', '.join(moved[:10])}{', ...' if len(moved) > 10 else ''}): labels and classifier number the "
        text += "classes differently; give the classifier's class names in its order (--classes of `atop-fast check`)."
        return Finding("accuracy", "warn" if above else "fail", text, numbers)
    if above:
        return Finding("accuracy", "pass", f"Clean accuracy {clean:.2f} is above chance ({chance:.2f}).", numbers)
    text = f"Clean accuracy {clean:.2f} of {count} images is not above chance ({chance:.2f}) beyond noise: "
    # Even all images right would not be enough.
    few = "give more images, " if chance + FAIL * noise >= 1 else ""
    return Finding("accuracy", "warn", f"{text}{few}check labels, weights and normalization.", numbers)


def normalization(probe: Probe) -> Finding:
    """The classifier does not do better on images normalized once more or less, and its first layer sees usual values.

    Networks that tolerate contrast keep their accuracy under a second normalization; the values then give it away.
    """

    alone = probe.alone
    with torch.no_grad(), _first_layer_input(alone.model) as seen:
        logits = alone.logits(probe.x)
    predicted, classes = logits.argmax(dim=1), logits.shape[1]
    # Classes in another order are no fault of the normalization: each label becomes the output that stands for it.
    found = find_order(predicted, probe.y, classes)
    outputs = probe.y if found is None else found[0].argsort()[probe.y]
    given = alone.correct(probe.x, outputs)
    scores = {name: alone.correct(x, outputs) for name, x in _variants(probe.x).items()}
    best = max(scores, key=lambda name: float(scores[name].mean()))
    gain, errors = float((scores[best] - given).mean()), excess(scores[best], given)
    numbers: dict[str, Any] = {"given": float(given.mean()), **{name: float(s.mean()) for name, s in scores.items()}}
    numbers["first_layer_largest"] = largest = seen[0] if seen else None
    text = f"The classifier is right on {float(given.mean()):.2f} of the images as given and on "
    text += f"{float(scores[best].mean()):.2f} of {best}"
    advice = "give images in [0, 1] and normalize once, inside the model."
    if errors > WARN and gain >= 0.05:
        status: Status = "fail" if errors > FAIL and gain >= 0.1 else "warn"
        text += f": it normalizes twice, or not at all; {advice}"
        return Finding("normalization", status, text, numbers)
    if largest is not None and TWICE[0] < largest < TWICE[1]:
        text = (
            f"The first layer sees values up to {largest:.1f} in size, where one normalization gives up to 3 and two "
        )
        return Finding("normalization", "warn", f"{text}about 10: if it normalizes twice, {advice}", numbers)
    return Finding("normalization", "pass", f"{text}, which is no gain.", numbers)


def mode(probe: Probe) -> Finding:
    """The model in its given mode returns the logits of its evaluation mode."""
    modules = list(probe.model.named_modules()) if isinstance(probe.model, nn.Module) else []
    training = [(name, m) for name, m in modules if getattr(m, "training", False)]
    with torch.no_grad():
        # First, since a pass in training mode writes running statistics.
        with untouched(probe.model, probe.x.device):
            evaluated = probe.logits(probe.x)
        given = probe.logits(probe.x)
    change = difference(given, evaluated)
    numbers = {"modules_in_training_mode": len(training), "relative_change": change}
    if not training or same(given, evaluated):
        text = "The training mode of some modules changes nothing." if training else "No module is in training mode."
        return Finding("mode", "pass", text, numbers)
    name, module = next((pair for pair in training if isinstance(pair[1], _ACTING)), training[0])
    text = f"{len(training)} modules are in training mode, such as {name!r} ({type(module).__name__}), and change the "
    return Finding("mode", "fail", f"{text}logits by {change:.1%}: call model.eval().", numbers)


def determinism(probe: Probe) -> Finding:
    """The source of the model's randomness: none, a Defense's keys, the global generators, or another."""
    with torch.no_grad():
        repeated = difference(probe.logits(probe.x), probe.logits(probe.x))
    other = probe.change()
    numbers: dict[str, Any] = {"same_draw_change": repeated, "other_draw_change": other}
    is_defense = isinstance(probe.model, Defense)
    if repeated > 1e-4:
        source = "its networks draw without the key"
        if not is_defense:
            source = "it draws without a key, like a generator of its own, a counter or a Defense inside another module"
        text = f"Repeating one draw changes the logits by {repeated:.1%}: {source}, so that no result can be repeated; "
        text += "make every draw a function of (seed, sample id, draw), as in a Defense."
        return Finding("determinism", "fail", text, {**numbers, "source": "other"})
    if other <= 1e-4:
        return Finding("determinism", "pass", "Every call gives the same logits.", {**numbers, "source": "none"})
    if is_defense:
        text = f"Draws differ by {other:.1%} of the logits, and equal keys give equal logits."
        return Finding("determinism", "pass", text, {**numbers, "source": "keys"})
    text = (
        f"Calls differ by {other:.1%} of the logits through global generators (torch's, Python's or numpy's): results "
        "depend on batch size and order; switch it off if it was not meant (dropout), else make it a Defense with "
        "keyed draws."
    )
    if one := _one_draw(probe):
        text += " One draw decides for a whole batch, so that accuracies vary more than intervals over images say."
    numbers |= {"source": "global generators", "one_draw_for_a_batch": one}
    return Finding("determinism", "warn", text, numbers)


def _one_draw(probe: Probe) -> bool:
    """Whether a call draws once for all images: copies of one image have equal logits in every call."""
    copies = probe.x[:1].expand_as(probe.x)
    with torch.no_grad():
        calls = [probe.logits(copies, draw) for draw in range(-(-REPEATED_DRAWS // len(copies)))]
    return len(copies) > 1 and all(same(z, z[:1].expand_as(z)) for z in calls)


def batch_coupling(probe: Probe) -> Finding:
    """The logits of an image do not depend on the other images of its batch."""
    if len(probe.x) == 1:
        return Finding("batch_coupling", "warn", "One image has no batch mates: give more images.", {})
    if not probe.reproducible:
        text = "Randomness that cannot be repeated hides whether batch mates matter: see determinism."
        return Finding("batch_coupling", "warn", text, {})

    # Equal batch sizes use equal kernels, so that differences are not rounding.
    half = len(probe.x) // 2
    mates = torch.cat((probe.x[:half], 1 - probe.x[half:]))

    def change() -> float:
        return difference(probe.logits(probe.x)[:half], probe.logits(mates)[:half])

    with torch.no_grad():
        # First, since a pass in training mode writes running statistics.
        with untouched(probe.model, probe.x.device):
            evaluated = change()
        given = change()
    numbers = {"relative_change": given, "relative_change_in_evaluation_mode": evaluated}
    if given <= 1e-4:
        return Finding("batch_coupling", "pass", "Other batch mates leave an image's logits as they are.", numbers)
    text = f"Other batch mates change an image's logits by {given:.1%}"
    if evaluated <= 1e-4:
        text += ", in training mode only: call model.eval()."
    else:
        # The modules in a function stay in the mode in which they are.
        text += ", in evaluation mode too" if isinstance(probe.model, nn.Module) else ""
        text += (
            ": statistics of the batch (batch norm in training mode, or without running statistics?) let one image "
            "attack another; make every image's logits its own."
        )
    return Finding("batch_coupling", "fail", text, numbers)


def zero_gradient(probe: Probe) -> Finding:
    """No image has an input gradient of exactly zero; otherwise, tells saturation from a shattered gradient."""
    shares = {}
    for loss in ("ce", "margin"):
        gradient = probe.gradient(probe.x, loss)[1].flatten(1)
        shares[loss] = float((gradient == 0).all(dim=1).float().mean())
    numbers = {f"zero_{loss}": share for loss, share in shares.items()}
    if not any(shares.values()):
        return Finding("zero_gradient", "pass", "No image has a zero gradient.", numbers)
    share, both = max(shares.values()), min(shares.values())
    status: Status = "fail" if share >= 0.1 else "warn"
    text = f"{shares['ce']:.0%} of the images have a gradient of exactly zero under cross-entropy and "
    text += f"{shares['margin']:.0%} under the margin loss: "
    if both < share / 2 and shares["ce"] == share:
        text += "large logits saturate the softmax; attack with the margin or DLR loss, or scale the logits."
    else:
        text += "the gradient is shattered (rounding, thresholds, argmax); attack with BPDA and a black-box attack."
    return Finding("zero_gradient", status, text, numbers)


def cost(probe: Probe) -> Finding:
    """Predicted time and memory: passes of a protocol times seconds per pass, and the bytes saved for a gradient."""
    count = min(32, len(probe.x))
    x, ids = probe.x[:count], probe.ids[:count]
    with torch.no_grad():
        forward = _seconds(lambda: probe.logits(x, ids=ids), x.device) / count
    gradient = _seconds(lambda: probe.gradient(x, count=count), x.device) / count
    saved = bytes_saved(lambda: probe.gradient(x, count=count), probe.model) / count
    protocols = {
        name: probe.total * (gradients * gradient + forwards * forward)
        for name, (gradients, forwards) in PASSES["random" if probe.draws > 1 else "deterministic"].items()
    }
    numbers = {
        "images": probe.total,
        "forward_seconds": forward,
        "gradient_seconds": gradient,
        "saved_bytes": saved,
        "protocol_seconds": protocols,
    }
    times = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in protocols.items())
    text = f"{probe.total} images take about: {times}; a gradient keeps {saved / 2**20:.2g} MiB an image, so that a "
    return Finding("cost", "pass", f"{text}GiB holds {int(2**30 / max(saved, 1))} images.", numbers)


# In the order of execution. The checks in AS_GIVEN run in the mode of the given model; a failure of a check in STOPS
# makes later checks meaningless.
CHECKS: dict[str, Callable[[Probe], Finding]] = {
    f.__name__: f
    for f in (
        *(images, finite, logits, mode, determinism, batch_coupling),
        *(accuracy, normalization, zero_gradient, cost),
    )
}
AS_GIVEN = ("mode", "determinism", "batch_coupling")
STOPS = ("images", "finite")


@contextlib.contextmanager
def _first_layer_input(model: object) -> Iterator[list[float]]:
    """The largest magnitude at the input of the first convolution or linear layer, once one has been called."""
    seen: list[float] = []

    def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and not seen:
            seen.append(float(inputs[0].detach().abs().max()))

    layers = [m for m in model.modules() if isinstance(m, _LAYERS)] if isinstance(model, nn.Module) else []
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _variants(x: Tensor) -> dict[str, Tensor]:
    """The images normalized once more and once less, by every usual rule."""
    variants = {"255 x": 255 * x, "x / 255": x / 255}
    rules = {k: v for k, v in NORMALIZATIONS.items() if len(v[0]) in (1, x.shape[1])}
    for name, (mean, deviation) in rules.items():
        m, s = (torch.tensor(v, dtype=x.dtype, device=x.device)[:, None, None] for v in (mean, deviation))
        variants[f"images normalized by {name}"] = (x - m) / s
        variants[f"images with a normalization by {name} undone"] = x * s + m
    return variants


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of three calls after a warm-up call."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
