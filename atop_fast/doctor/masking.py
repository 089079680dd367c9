"""Checks for gradient masking: expectations that any genuine robustness meets, each judged relative to its noise.

A check warns if an accuracy violates an expectation by 2 standard errors of the paired difference, and fails at 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..attacks import FGSM, Square
from ..defense import Defense, with_fixed_randomness
from ..ops import attack_loss
from ..randomness import derive_seed
from ._probe import COSINE, FAIL, MOST_DRAWS, WARN, Finding, Probe, excess, judged

# Number of queries of the random search, and the noise of float32 logits relative to their size.
QUERIES, ROUNDING = 100, 1e-6
# Least number of images on which two attacks must differ for a comparison to fail: n images against none differ by
# sqrt(n) standard errors.
DIFFERING = int(FAIL**2) + 1
# A gain of accuracy worth the name: a few points are no more than a longer attack removes.
GAIN = 0.1


def evidence(probe: Probe) -> Finding:
    """Enough images are classified correctly, beyond guesses, for the comparisons of attacks to find anything."""
    with torch.no_grad():
        classes = probe.logits(probe.x).shape[1]
    count, accuracy, chance = len(probe.x), float(probe.clean.mean()), 1 / classes
    share = (accuracy - chance) / (1 - chance)
    numbers = {"images": count, "accuracy": accuracy, "chance": chance, "known": max(0.0, share * count)}
    if accuracy <= chance + FAIL * (chance * (1 - chance) / count) ** 0.5:
        text = f"Accuracy {accuracy:.2f} on {count} images is not above chance ({chance:.2f}) beyond noise: attacks "
        text += "have nothing to destroy, and no check of attacks means anything."
        return Finding("evidence", "fail", text, numbers)
    text = f"Beyond guesses, {share * count:.0f} of {count} images are classified correctly (accuracy {accuracy:.2f}, "
    text += f"chance {chance:.2f})"
    if share * count >= DIFFERING:
        return Finding("evidence", "pass", f"{text}; comparisons of attacks can fail from {DIFFERING} on.", numbers)
    text += f": too few to conclude, since no comparison of attacks can fail on fewer than {DIFFERING}; give at least "
    return Finding("evidence", "fail", f"{text}{math.ceil(DIFFERING / share)} images.", numbers)


def gradient_noise(probe: Probe) -> Finding:
    """The number of draws for which an averaged gradient points in the direction of the true mean gradient."""
    cosines = probe.cosines
    enough = next((n for n, cosine in cosines.items() if cosine >= COSINE), None)
    numbers = {"recommended_eot_iter": enough, "cosine": {str(n): c for n, c in cosines.items()}}
    if enough == 1:
        text = f"The gradient of one draw has cosine {cosines[1]:.2f} with the mean: eot_iter=1 is enough."
        return Finding("gradient_noise", "pass", text, numbers)
    if enough is not None:
        text = f"The gradient of one draw has cosine {cosines[1]:.2f} with the mean, that of {enough} draws "
        return Finding("gradient_noise", "pass", f"{text}{cosines[enough]:.2f}: use eot_iter={enough}.", numbers)
    last = cosines[MOST_DRAWS]
    text = f"Even the mean gradient of {MOST_DRAWS} draws has cosine {last:.2f} with the true one: attacks follow "
    text += "noise; use more draws, and a black-box attack beside them."
    return Finding("gradient_noise", "fail" if last < 0.5 else "warn", text, numbers)


def finite_difference(probe: Probe) -> Finding:
    """Along the gradient, the loss rises as predicted, over a step of 1 % of a pixel's share of eps.

    Compares L(x + h u) - L(x - h u) with 2 h |g|, u = g / |g|, where L is the margin loss, which does not saturate.
    """
    if not probe.reproducible:
        text = "Randomness that cannot be repeated hides how the loss changes: see determinism."
        return Finding("finite_difference", "warn", text, {})
    pixels = math.sqrt(probe.x[0].numel())
    step = 0.01 * (probe.eps * pixels if probe.norm == "Linf" else probe.eps)
    _, g, _ = probe.gradient(probe.x, "margin")
    length = g.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        ends = [probe.logits(probe.x + sign * step * g / length.clamp_min(1e-30)) for sign in (1, -1)]
        up, down = (attack_loss(z, probe.y, "margin").losses for z in ends)
        noise = ROUNDING * ends[0].abs().amax(dim=1)
    predicted = 2 * step * length.flatten()
    # A step within rounding noise is inconclusive. A zero gradient counts, because attacks rely on it.
    told = (predicted > 10 * noise) | (predicted == 0)
    agree = ((up - down - predicted).abs() <= 0.5 * predicted) & (predicted > 0)
    share = float((agree & told).sum() / told.sum().clamp_min(1))
    numbers = {"images": int(told.sum()), "agree": share, "step_l2": step}
    if 2 * int(told.sum()) < len(told):
        text = f"The loss moves less than rounding on {len(told) - int(told.sum())} of {len(told)} images: "
        return Finding("finite_difference", "warn", f"{text}use float32 logits, or a larger eps.", numbers)
    text = f"The loss rises along the gradient as predicted (within half) on {share:.0%} of {int(told.sum())} images"
    if share >= 0.8:
        return Finding("finite_difference", "pass", f"{text}.", numbers)
    text += ": the gradient does not describe the model (rounding, thresholds); use BPDA and a black-box attack."
    return Finding("finite_difference", "fail" if share < 0.5 else "warn", text, numbers)


def iterations(probe: Probe) -> Finding:
    """Many steps are not weaker than one."""
    one, many = probe.attacked(probe.eps, FGSM), probe.attacked(probe.eps)
    names = (f"PGD with {probe.steps} steps", "FGSM's single step")
    return _not_weaker("iterations", many, one, names, "raise steps and eot_iter, or use the margin loss")


def black_box(probe: Probe) -> Finding:
    """The white-box attack is not weaker than a random search that sees only logits."""
    white, black = probe.attacked(probe.eps), probe.correct(_black_box(probe))
    names = ("PGD", f"a random search of {QUERIES} queries")
    return _not_weaker("black_box", white, black, names, "do not trust its gradient; report a black-box attack too")


def eps_sweep(probe: Probe) -> Finding:
    """Accuracy equals the clean one at eps 0, does not rise with eps, and is about 0 if every image is in reach."""
    reach = 1.0 if probe.norm == "Linf" else math.sqrt(probe.x[0].numel())
    radii = sorted({0.0, probe.eps / 2, probe.eps, min(2 * probe.eps, reach), reach / 2, reach})
    curve = {eps: probe.attacked(eps) for eps in radii}
    accuracies = {f"{eps:.4g}": float(right.mean()) for eps, right in curve.items()}
    count = len(probe.x)
    # The binomial noise of an accuracy of 5 %.
    left = min(float(curve[eps].mean()) for eps in radii[-2:])
    broken = {
        "at eps 0 it is not the clean accuracy": abs(excess(curve[0.0], probe.clean)),
        "it does not fall to 0 at large eps": (left - 0.05) / math.sqrt(0.05 * 0.95 / count),
    }
    pairs = list(itertools.pairwise(radii))
    rises = {pair: excess(curve[pair[1]], curve[pair[0]]) for pair in pairs}
    worst = max(rises, key=lambda pair: rises[pair])
    broken[f"it rises from eps {worst[0]:.3g} to {worst[1]:.3g}"] = rises[worst]
    problem = max(broken, key=lambda name: broken[name])
    status = judged(broken[problem])
    shown = ", ".join(f"{accuracy:.2f} at {eps}" for eps, accuracy in accuracies.items())
    numbers = {"accuracy": accuracies, "standard_errors": broken}
    text = f"Accuracy under PGD is {shown}"
    if status == "pass":
        return Finding("eps_sweep", status, f"{text}: it falls as it must.", numbers)
    text += f"; {problem}, by {broken[problem]:.1f} standard errors: the attack fails, not the images' distance; "
    return Finding("eps_sweep", status, f"{text}raise steps and eot_iter, or attack without its gradient.", numbers)


def gradient_modes(probe: Probe) -> Finding:
    """Defense: the exact gradient is not weaker than BPDA or the classifier's alone."""
    curves = {name: probe.attacked(probe.eps, gradient=name) for name in ("exact", "bpda", "blind")}
    other = min(("bpda", "blind"), key=lambda name: float(curves[name].mean()))
    names = ("PGD with the exact gradient", f"PGD with the {other} one")
    advice = f"the transform or purifier masks the gradient; attack with gradient={other!r} too"
    finding = _not_weaker("gradient_modes", curves["exact"], curves[other], names, advice)
    accuracies = {name: float(right.mean()) for name, right in curves.items()}
    return Finding(finding.name, finding.status, finding.reason, {**finding.numbers, "accuracy": accuracies})


def fixed_randomness(probe: Probe) -> Finding:
    """Defense: the cost of an attacker who knows the verdict's draw, and whether one draw's gradient suffices.

    An attacker who knows the draw may use either attack, so the lower accuracy of each image counts. The gradient of a
    single draw can be the weaker one: pixels clipped by its noise have no gradient, and no other draw provides one.
    """
    assert isinstance(probe.model, Defense)
    # The draw that the verdict of `probe` takes first.
    run = probe.of(with_fixed_randomness(probe.model, derive_seed(probe.seed, "verdict")), eot_iter=1)
    known, fresh = run.attacked(probe.eps), probe.attacked(probe.eps)
    transferred = run.correct(probe.adversarial(probe.eps))
    worth, errors = float((fresh - torch.minimum(known, transferred)).mean()), excess(known, transferred)
    numbers = {
        "fresh": float(fresh.mean()),
        "known": float(known.mean()),
        "known_transferred": float(transferred.mean()),
        "worth_of_secrecy": worth,
        "standard_errors": errors,
    }
    text = (
        f"PGD leaves {numbers['fresh']:.2f} correct on fresh draws, and {numbers['known']:.2f} on a draw that it knows"
    )
    if errors > FAIL:
        text += f", where the images of the fresh draws leave only {numbers['known_transferred']:.2f}, {errors:.1f} "
        text += "standard errors less: one draw's gradient is masked (clipped pixels?); start from those images."
        return Finding("fixed_randomness", "warn", text, numbers)
    return Finding("fixed_randomness", "pass", f"{text}: keeping the draws secret is worth {worth:.2f}.", numbers)


def useless_transform(probe: Probe) -> Finding:
    """Defense: it is more robust than its classifier alone, each under the best attack on it.

    Both are attacked at eps / 2 and eps; the Defense with exact, BPDA and blind gradients, of which the strongest
    counts. The mean of the two radii counts, and eps by itself if the classifier loses there.
    """
    levels = (probe.eps / 2, probe.eps)
    whole = torch.stack([_strongest(probe, eps) for eps in levels])
    alone = torch.stack([probe.alone.attacked(eps) for eps in levels])
    (gain, above), (last, last_above) = _gain(whole.mean(0), alone.mean(0)), _gain(whole[1], alone[1])
    loses = float((probe.alone.clean - alone[1]).mean()) >= GAIN
    with torch.no_grad():
        classes = torch.stack([probe.logits(probe.x, draw).argmax(dim=1) for draw in range(probe.draws)])
    unsteady = float((classes != classes[0]).any(dim=0).float().mean())
    numbers = {
        "defense": float(whole.mean()),
        "classifier": float(alone.mean()),
        "gain": gain,
        "gain_at_most": above,
        "gain_at_eps": last,
        "gain_at_eps_at_most": last_above,
        "images_whose_class_changes_with_the_draw": unsteady,
    }
    text = f"Attacked at eps / 2 and eps, the defense keeps {numbers['defense']:.2f} and its classifier alone "
    text += f"{numbers['classifier']:.2f}, a gain of {gain:.2f}"
    if above < GAIN:
        text += f" (at most {above:.2f}): transform and purifier add no robustness worth the name; "
        return Finding("useless_transform", "fail", f"{text}report the classifier.", numbers)
    if loses and last_above < GAIN:
        text += f", but at eps {float(whole[1].mean()):.2f} and {float(alone[1].mean()):.2f}, a gain of {last:.2f} (at "
        text += f"most {last_above:.2f}): at this radius, transform and purifier add no robustness worth the name; "
        return Finding("useless_transform", "fail", f"{text}report the classifier, or a smaller radius.", numbers)
    if excess(whole.mean(0), alone.mean(0)) > WARN:
        return Finding("useless_transform", "pass", f"{text}.", numbers)
    return Finding("useless_transform", "warn", f"{text} that noise explains: give more images.", numbers)


def _gain(whole: Tensor, alone: Tensor) -> tuple[float, float]:
    """The mean of whole - alone, accuracies (B,) on the same images, and its upper bound of WARN standard errors."""
    gain, count = float((whole - alone).mean()), len(whole) + 2
    # With two more pairs, of which half a pair speaks for either system, as in paired_interval: a few equal differences
    # are no proof.
    variance = (float((whole - alone).square().sum()) + 1) / count - (gain * len(whole) / count) ** 2
    return gain, gain + WARN * math.sqrt(variance / count)


# In the order of execution; the checks in DEFENSE require a Defense.
CHECKS: dict[str, Callable[[Probe], Finding]] = {
    f.__name__: f
    for f in (
        *(evidence, gradient_noise, finite_difference, iterations, black_box, eps_sweep),
        *(gradient_modes, fixed_randomness, useless_transform),
    )
}
DEFENSE = ("gradient_modes", "fixed_randomness", "useless_transform")


def _not_weaker(name: str, strong: Tensor, weak: Tensor, names: Sequence[str], advice: str) -> Finding:
    """The finding on the accuracies (B,) under two attacks, where the first must not be higher than the second."""
    a, b = float(strong.mean()), float(weak.mean())
    errors = excess(strong, weak)
    numbers = {"expected_stronger": a, "expected_weaker": b, "standard_errors": errors}
    status = judged(errors)
    if status == "pass":
        return Finding(name, status, f"{names[0]} leaves {a:.2f} correct, {names[1]} {b:.2f}.", numbers)
    text = f"{names[0]} leaves {a:.2f} correct and {names[1]} only {b:.2f}, {errors:.1f} standard errors less: "
    return Finding(name, status, f"{text}{advice}.", numbers)


def _strongest(probe: Probe, eps: float) -> Tensor:
    """Accuracy (B,) under the gradient mode that leaves the lowest mean."""
    curves = [probe.attacked(eps, gradient=mode) for mode in ("exact", "bpda", "blind")]
    return min(curves, key=lambda right: float(right.mean()))


def _black_box(probe: Probe) -> Tensor:
    """Adversarial images from queries for logits."""
    seed = derive_seed(probe.seed, "black box")
    # A single lucky draw must not end the attack on an image, and a Defense may always take another draw.
    ends = probe.draws == 1 and not isinstance(probe.model, Defense)
    square = Square(probe.model, probe.norm, probe.eps, n_queries=QUERIES, seed=seed, early_stop=ends)
    return square(probe.x, probe.y, probe.ids)
