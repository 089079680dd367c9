"""Findings on the evaluation itself: the contract, candidates outside the ball, other radii or models, the budget."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from .._core.checks import message
from .._core.files import write_text
from .._core.hidden import hidden_modules
from ..attacks import NORMS, Attack, Ball, GradientEstimator, Model, Square, draw_logits, frozen
from ..attacks.autoattack import leaves_doubt
from ..data import chance_level
from ..doctor import Finding, examine, sampled
from ..doctor._probe import MOST_DRAWS
from ..doctor.contract import CHECKS as CONTRACT
from ..randomness import derive_seed
from .judge import Judge, full_precision, judged
from .protocols import AnyAttack
from .runs import Run
from .source import Source
from .verdict import Verdict

# Checks of the contract that take few passes, except `mode` and `cost`: evaluate sets the mode and reports the time.
CHEAP = ("finite", "logits", "determinism", "batch_coupling", "accuracy", "normalization", "zero_gradient")
IMAGES = 32
# Share of the predictions on clean images from which on one class counts as a constant answer.
CONSTANT = 0.9


class Threat(Ball):
    """The ball in which attacks look for candidates."""

    def distance(self, delta: Tensor) -> Tensor:
        """The norm of every perturbation (B, C, H, W), float32 (B,)."""
        return self.length(delta.float())

    def outside(self, distance: Tensor, x: Tensor) -> Tensor:
        """Whether candidates at a distance (B,) from images like x (B, C, H, W) lie outside, beyond rounding; bool."""
        size = x[0].numel()
        rounded = {"Linf": 1, "L2": size**0.5, "L1": size}[self.norm] * max(torch.finfo(x.dtype).eps, 2.0**-23)
        return distance > self.eps * (1 + 1e-4) + rounded


def check_findings(diagnostics: Any) -> list[dict[str, Any]]:
    """The caller's findings, of which True and False have none; raises unless each has name, status and reason."""
    if isinstance(diagnostics, bool):
        return []
    found: list[Any] = [None]
    if isinstance(diagnostics, Sequence):
        found = [asdict(finding) if isinstance(finding, Finding) else finding for finding in diagnostics]
    if not all(isinstance(finding, Mapping) and {"name", "status", "reason"} <= finding.keys() for finding in found):
        expected = 'True, False, or findings with "name", "status" and "reason"'
        raise TypeError(message("evaluate", "diagnostics", expected, type(diagnostics).__name__))
    return [dict(finding) for finding in found]


def examined(
    folder: Path | None, model: Model, source: Source, threat: Threat, seed: int, progress: bool = False
) -> list[dict[str, Any]]:
    """The findings of atop_fast.doctor, with a warning for each that is not a pass.

    With a folder, all checks run, and it keeps their findings for a call that resumes the run; without one, the cheap
    checks run, on at most as many images as fit into one pass with gradients.
    """
    path = None if folder is None else folder / "diagnostics.json"
    if path is not None and path.exists():
        try:
            found = check_findings(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            expected = "a run folder with whole findings"
            raise ValueError(
                message("evaluate", "out", expected, f"{path} ({error}); without it, the model is examined again")
            ) from error
    else:
        try:
            found = [asdict(finding) for finding in _checked(model, source, threat, seed, path is not None, progress)]
            if path is not None:
                write_text(path, json.dumps(found, indent=2) + "\n")
        except (RuntimeError, NotImplementedError) as error:
            # The checks need more of a model than some attacks do.
            reason = f"The contract could not be checked: {type(error).__name__}: {error}".partition("\n")[0]
            found = [_finding("contract", "warn", reason, {})]
    for finding in found:
        if finding["status"] != "pass":
            verb = "fails" if finding["status"] == "fail" else "warns"
            warnings.warn(f"evaluate: the check {finding['name']!r} {verb}: {finding['reason']}", stacklevel=3)
    return found


def _checked(model: Model, source: Source, threat: Threat, seed: int, whole: bool, progress: bool) -> list[Finding]:
    """All findings, or those of the cheap checks."""
    total = len(source)

    def part(most: int) -> dict[str, Any]:
        ids = sampled(total, seed, most)
        x, y = source.take(ids)
        return {"images": judged(x), "labels": y, "ids": ids, "total": total, "seed": seed}

    # The checks for masking attack in the Linf and L2 balls.
    if whole and threat.norm != "L1" and threat.eps > 0:
        return examine("diagnose", model, **part(64), norm=threat.norm, eps=threat.eps, progress=progress)
    if whole:
        return examine("check_contract", model, **part(64), checks=tuple(CONTRACT))
    with frozen(model), full_precision(source.sample.device):
        sample = judged(source.sample)
        estimator, zero = GradientEstimator(model, seed=seed), torch.zeros(1, dtype=torch.int64, device=sample.device)
        estimator.logits(sample, zero, zero)
        most = min(estimator.rows or IMAGES, IMAGES)
        return examine("check_contract", model, **part(most), checks=CHEAP)


def is_bound(attack: AnyAttack) -> bool:
    """Whether candidates must lie in the ball; an attack with another `norm`, such as StAdv's "flow", opts out."""
    norm = getattr(attack, "norm", None)
    return not isinstance(norm, str) or norm in NORMS


def outside_finding(run: Run, attacks: Mapping[str, AnyAttack], x: Tensor, threat: Threat) -> list[dict[str, Any]]:
    """A finding that names the attacks with candidates outside of the ball, if there are any."""
    texts, numbers = [], {}
    for name, attack in attacks.items():
        if name not in run.tables or not is_bound(attack):
            continue
        distance = run.tables[name]["distance"][run.done(name)]
        if count := int(threat.outside(distance, x).sum()):
            numbers[name] = {"outside": count, "candidates": len(distance), "farthest": float(distance.max())}
            texts.append(outside_text(name, count, distance, threat))
    return [_finding("ball", "fail", " ".join(texts), numbers)] if texts else []


def outside_text(name: str, count: int, distance: Tensor, threat: Threat) -> str:
    """The sentence on an attack with `count` candidates outside of the ball."""
    return (
        f"attacks[{name!r}]: {count} of {len(distance)} candidates lie outside of the {threat.norm} ball of radius "
        f"{threat.eps:.6g}, the farthest at {float(distance.max()):.6g}, so that accuracies are not those of this "
        "threat model: give attack and evaluate the same norm and eps, or the attack another attribute `norm`."
    )


def radius_finding(attacks: Mapping[str, AnyAttack], threat: Threat) -> list[dict[str, Any]]:
    """A finding, with a warning, if every attack states its radius and all of them are below the threat model's."""
    radii: dict[str, float] = {}
    for name, attack in attacks.items():
        norm, eps = getattr(attack, "norm", None), getattr(attack, "eps", None)
        if norm not in (None, threat.norm) or isinstance(eps, bool) or not isinstance(eps, (int, float)):
            return []
        radii[name] = float(eps)
    if not radii or max(radii.values()) >= threat.eps * (1 - 1e-6):
        return []
    shown = ", ".join(f"{eps:.6g} ({name})" for name, eps in radii.items())
    text = f"The attacks search within eps {shown}, and the threat model is the {threat.norm} ball of radius "
    text += f"{threat.eps:.6g}: the robust accuracy is that of the smaller one; give attacks and evaluate the same eps."
    return _said("radius", "fail", text, radii)


def warn_of_dropout(model: Model) -> None:
    """Warn if a network in training mode has dropout, which evaluation mode turns off."""
    if not isinstance(model, torch.nn.Module) or not getattr(model, "training", False):
        return
    drawing = [name for name, part in model.named_modules() if isinstance(part, _DropoutNd) and part.p > 0]
    if drawing:
        text = (
            f"The model is in training mode, and judged in evaluation mode, in which its dropout ({drawing[0]}) draws "
        )
        text += "nothing. If it is meant to draw, call model.eval() and then train() on the dropout alone."
        warnings.warn(f"evaluate: {text}", stacklevel=3)


def transfer_finding(attacks: Mapping[str, AnyAttack], judge: Judge, source: Source) -> list[dict[str, Any]]:
    """A finding, with a warning, if every attack states its model, and none of them attacks the judged one.

    A model is the judged one if it calls it, as BPDA does, or gives the same logits on a few images.
    """
    for attack in attacks.values():
        model = getattr(attack, "model", None)
        if not callable(model) or judge.model in (model, *_networks(model)) or _same_logits(judge, model, source):
            return []
    if not attacks:
        return []
    text = f"The attacks ({', '.join(attacks)}) were built for another model than the evaluated one: their candidates "
    text += "transfer from it, and attacks on the evaluated model itself may leave far less accuracy."
    return _said("transfer", "warn", text, {})


def _networks(model: object) -> list[torch.nn.Module]:
    return [part for module in hidden_modules(model) for part in module.modules()]


def _same_logits(judge: Judge, model: Model, source: Source) -> bool:
    """Whether the models agree on a few images under the same draws."""
    x = judged(source.take(torch.arange(min(len(source), 8)))[0])
    key, ids = derive_seed(judge.seed, "transfer"), torch.arange(len(x), device=x.device)
    try:
        with full_precision(x.device), frozen(model):
            a, b = (draw_logits(m, x, key, ids, range(2), len(x), "evaluate") for m in (judge.model, model))
    except Exception:  # a model of other images, devices or outputs is another one
        return False
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def budget_finding(reached: Mapping[str, int], images: int) -> list[dict[str, Any]]:
    """A finding that says which attacks the budget cut, if any; `reached`: attack -> images."""
    cut = [f"{name} {count} of {images} attacked" for name, count in reached.items() if count < images]
    text = f"The budget ended before every attack had reached every image ({', '.join(cut)}): their columns are of the "
    text += "attacked images alone, and the robust accuracy is an upper bound."
    return [_finding("budget", "warn", text, dict(reached))] if cut else []


def unchanged_finding(run: Run, attacks: Sequence[str], eps: float) -> list[dict[str, Any]]:
    """A finding if no attack changed an image although the ball has other points."""
    met = {name: run.tables[name]["distance"][run.done(name)] for name in attacks if name in run.tables}
    if eps == 0 or not met or any(bool(distance.any()) for distance in met.values()):
        return []
    text = f"The attacks ({', '.join(met)}) returned every image unchanged: they found nothing, or do not attack, and "
    text += "the robust accuracy is that without an attack."
    return [_finding("unchanged", "warn", text, {name: len(distance) for name, distance in met.items()})]


def draws_finding(findings: Sequence[Mapping[str, Any]], attacks: Mapping[str, AnyAttack]) -> list[dict[str, Any]]:
    """A finding if no attack averages its gradient over as many draws as the check gradient_noise recommends.

    Momentum m averages over about 1 / (1 - m) steps, whose draws count.
    """
    noise = next((f["numbers"] for f in findings if f["name"] == "gradient_noise" and f.get("numbers")), None)
    own = {name: attack for name, attack in attacks.items() if isinstance(attack, Attack)}
    taken = {name: _averaged(attack) for name, attack in own.items() if not isinstance(attack, Square)}
    if noise is None or not taken:
        return []
    recommended = noise["recommended_eot_iter"] or MOST_DRAWS + 1
    if max(taken.values()) >= recommended:
        return []
    least = f"more than {MOST_DRAWS}" if recommended > MOST_DRAWS else str(recommended)
    text = f"The gradient's noise asks for {least} draws, and the attacks average over about "
    text += ", ".join(f"{count:.0f} ({name})" for name, count in taken.items())
    text += ": the robust accuracy may be too high; take a protocol with more draws, or a larger eot_iter."
    return [_finding("draws", "warn", text, {"recommended": recommended, **taken})]


def _averaged(attack: Attack) -> float:
    """About how many draws the gradient of a step averages over."""
    momentum = min(getattr(attack, "momentum", 0.0), 1.0)
    return attack.eot_iter * (attack.steps if momentum == 1 else min(attack.steps, 1 / (1 - momentum)))


def constant_finding(predictions: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """A finding on predictions (N, K) of clean images that hardly depend on these: a verdict on them says little."""
    counts = predictions.flatten().bincount()
    share, label = float(counts.max()) / predictions.numel(), int(counts.argmax())
    expected = chance_level(labels)
    text = f"{share:.0%} of the predictions on clean images are class {label}, the most frequent class has "
    text += f"{expected:.0%} of the images: the predictions hardly depend on them."
    numbers = {"share": share, "class": label, "most_frequent": expected}
    return [_finding("constant", "warn", text, numbers)] if share >= CONSTANT and share > expected + 0.2 else []


def doubt_finding(attacks: Mapping[str, Verdict | None]) -> list[dict[str, Any]]:
    """A finding if the protocol fast may have left too many images robust, by the criteria of AutoAttack's "fast"."""
    left = {name: verdict.mean for name, verdict in attacks.items() if verdict is not None}
    counts = {verdict.images for verdict in attacks.values() if verdict is not None}
    # Verdicts of a budget's cut attacks are of different images.
    if left.keys() != {"pma", "apgd_t", "square"} or len(counts) > 1:
        return []
    late, probed = left["pma"] - left["apgd_t"], left["apgd_t"] - left["square"]
    if not leaves_doubt(left["pma"], left["apgd_t"], left["square"]):
        return []
    text = f"APGD-T fooled {late:.2%} of the images after PMA, and a short random search {probed:.2%} after both: this "
    text += "protocol may overestimate robustness; use 'paper', whose attacks are those of AutoAttack standard."
    return [_finding("doubt", "warn", text, left)]


def _said(name: str, status: str, reason: str, numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The finding, after a warning of evaluate's caller: it concerns work that may take hours."""
    warnings.warn(f"evaluate: {reason}", stacklevel=4)
    return [_finding(name, status, reason, numbers)]


def _finding(name: str, status: str, reason: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "status": status, "reason": reason, "numbers": dict(numbers)}
