"""Pictures of a report: images before and after the defense, galleries and curves, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.precision import full_precision
from ..attacks import Model
from ..defense import Defense
from ..randomness import derive_seed, seeded

# Rows of a gallery: (title, images (n, C, H, W), captions); negative values make a row of perturbations.
Rows = Sequence[tuple[str, Tensor, Sequence[str]]]
# Keys of a line of metrics.jsonl that are not losses.
NOT_DRAWN = ("training", "epoch", "updates", "lr", "seconds", "images_per_second")


def gallery_rows(
    model: Model, clean: Tensor, adversarial: Tensor, ids: Tensor, seed: int, classes: Sequence[str] | None
) -> list[tuple[str, Tensor, list[str]]]:
    """Rows of clean and adversarial images, their difference and, for a Defense, what it makes of these.

    A caption is the class that the model assigns to the picture; of a Defense it is that of the classifier behind the
    transform and the purifier. No rows for images with neither one nor three channels.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        clean, adversarial: images (n, C, H, W) in [0, 1].
        ids: int64 (n,), the identity of every image.
        seed: key of the one draw that is shown.
        classes: names of the classes; None shows their numbers.
    """
    if clean.shape[1] not in (1, 3):
        return []
    key = (derive_seed(seed, "gallery"), ids.to(clean.device), 0)
    defended = isinstance(model, Defense)

    def row(title: str, images: Tensor) -> tuple[str, Tensor, list[str]]:
        if defended and images.shape[1:] != seen:
            # The classifier does not take images of another size than those that it sees in the defense.
            return title, images.clamp(0, 1), [""] * len(images)
        logits = model.classify(images, *key) if isinstance(model, Defense) else model(images)
        # Purifiers may leave [0, 1] a little, which the classifier sees and a picture does not.
        return title, images.clamp(0, 1), [class_name(c, classes) for c in logits.argmax(dim=1).tolist()]

    with torch.no_grad(), full_precision(clean.device), seeded(key[0], clean.device):
        if not isinstance(model, Defense):
            return [row("clean", clean), row("adversarial", adversarial), _difference(clean, adversarial)]
        purified = model.purify(adversarial, *key)
        seen = purified.shape[1:]
        rows = [row("clean", clean), row("adversarial", adversarial), _difference(clean, adversarial)]
        rows.append(row("corrupted", (model.transform(adversarial, *key)[:: model.transform.copies, :-2] + 1) / 2))
        if model.purifier is not None:
            rows.append(row("purified", purified))
    return rows


def _difference(clean: Tensor, adversarial: Tensor) -> tuple[str, Tensor, list[str]]:
    perturbation = adversarial - clean
    scale = 2 * perturbation.abs().amax().clamp_min(1e-12)
    return "perturbation, scaled", 0.5 + perturbation / scale, [""] * len(clean)


def class_name(label: int, classes: Sequence[str] | None) -> str:
    """The name of a class, or its number if no name is known."""
    return classes[label] if classes is not None and label < len(classes) else str(label)


def gallery(rows: Sequence[tuple[str, Tensor, Sequence[str]]], eps: float) -> bytes:
    """A PNG of image rows.

    Args:
        rows: (title, images (n, C, H, W), captions). Rows with negative values are shown as perturbations, in colors
            from -10 eps (blue) to 10 eps (red); the others in [0, 1].
        eps: radius of the attack.
    """
    count = max(len(images) for _, images, _ in rows)
    figure = new_figure(1.25 * count + 1.6, 1.5 * len(rows))
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (title, images, captions) in zip(axes, rows, strict=True):
        signed = bool((images < 0).any())
        for axis in line:
            axis.set_axis_off()
        for axis, image, caption in zip(line, images, captions, strict=False):
            pixels = (image.mean(dim=0) if signed or len(image) == 1 else image.permute(1, 2, 0)).cpu()
            if signed:
                axis.imshow(pixels.numpy(), cmap="RdBu_r", vmin=-10 * eps, vmax=10 * eps)
            else:
                axis.imshow(pixels.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            # Class names are plain text, even if they contain dollar signs.
            axis.set_title(caption, fontsize=9, pad=2, parse_math=False)
        where = {"transform": line[0].transAxes, "ha": "right", "va": "center"}
        line[0].text(-0.12, 0.5, title, fontsize=10, parse_math=False, **where)
    return as_png(figure)


def picture(image: Tensor) -> bytes:
    """A PNG of an image (C, H, W) in [0, 1], one or three channels, pixel for pixel."""
    from matplotlib.image import imsave

    pixels = image.detach().float().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)
    buffer = io.BytesIO()
    imsave(buffer, pixels.contiguous().numpy(), format="png", metadata={"Software": None})  # type: ignore[dict-item]
    return buffer.getvalue()


def curve_picture(points: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of accuracy (mean, with its interval) against eps."""
    points = sorted((point for point in points if "mean" in point), key=lambda point: point["eps"])
    figure = new_figure(6, 3.2)
    axis = figure.subplots()
    radii = [point["eps"] for point in points]
    low, high = ([point["mean_ci"][end] for point in points] for end in (0, 1))
    axis.fill_between(radii, low, high, alpha=0.25, color="#4878a8", linewidth=0)
    axis.plot(radii, [point["mean"] for point in points], "o-", color="#4878a8")
    axis.set(xlabel="eps", ylabel="accuracy of one draw", ylim=(0, 1))
    axis.grid(alpha=0.3)
    return as_png(figure)


def resubmission_picture(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG of accuracy, with its interval, against the number of tries; see resubmission_curve."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6, 3.2)
    axis = figure.subplots()
    for (name, points), color in zip(curves.items(), ("#8aa06b", "#4878a8"), strict=False):
        tries = [point["tries"] for point in points]
        low, high = zip(*(point["accuracy_ci"] for point in points), strict=True)
        axis.fill_between(tries, low, high, alpha=0.25, color=color, linewidth=0)
        axis.plot(tries, [point["accuracy"] for point in points], ".-", color=color, label=name)
    axis.set(xlabel="tries", ylabel="images that survive them all", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    axis.grid(alpha=0.3)
    return as_png(figure)


def training_picture(lines: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of all scalars of all trainings against updates, from the lines of a metrics.jsonl; None if it is empty."""
    trainings: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        trainings.setdefault(line["training"], []).append(line)
    if not trainings:
        return None
    scalars = {title: [key for key in part[-1] if key not in NOT_DRAWN] for title, part in trainings.items()}
    columns = max(map(len, scalars.values()))
    figure = new_figure(2.1 * columns, 1.9 * len(trainings))
    for row, (title, part) in zip(
        figure.subplots(len(trainings), columns, squeeze=False), trainings.items(), strict=True
    ):
        for axis, key in zip(row, scalars[title], strict=False):
            axis.plot([line["updates"] for line in part], [line.get(key) for line in part], ".-", color="#4878a8")
            axis.set_title(f"{title}: {key}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        for axis in row[len(scalars[title]) :]:
            axis.set_axis_off()
    return as_png(figure)


def new_figure(width: float, height: float) -> Any:
    """A figure of this size in inches, outside of pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_png(figure: Any) -> bytes:
    """A PNG that depends only on the figure's contents."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
