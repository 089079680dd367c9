"""Tables of attacks that take few passes: parity.py and eot_curves.py."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any


def parity(document: dict[str, Any]) -> str:
    """AutoAttack fast, and with the rest of standard where it is in doubt, against the original standard."""
    lines = [
        "| model | threat | images | standard | fast | auto | left by one alone | passes | seconds | faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    titles = ("standard", "fast", "auto")
    for row in document["rows"]:
        left = " | ".join(f"{100 * row[title]:.1f} %" for title in titles)
        alone = f"{row['left by standard alone']}, {row['left by fast alone']}"
        passes = ", ".join(f"{row[f'{title} passes']:,}" for title in titles)
        seconds = ", ".join(f"{row[f'{title} s']:.1f}" for title in titles)
        left += " (in doubt)" if row["doubt"] else ""
        faster = ", ".join(f"{row[f'{title} x']:.1f}x" for title in titles[1:])
        threat = f"{row['norm']} {row['eps']:.3g}"
        lines.append(
            f"| {row['model']} | {threat} | {row['images']} | {left} | {alone} | {passes} | {seconds} | {faster} |"
        )
    return "\n".join(lines)


def verdicts(eotpgd: dict[str, Any], parity: dict[str, Any]) -> str:
    """Times to a verdict: the demo's defense, and the robust networks of the table of parity."""
    lines = ["| verdict on | theirs | ours | faster | accuracy left, theirs and ours |", "|---|---|---|---|---|"]
    found = eotpgd["summary"]
    low, high = found["difference"][1:]
    times = [f"{found[f'{side} seconds']:.0f} s" for side in ("theirs", "ours")]
    lines.append(
        f"| the demo's defense, Linf 0.25, {found['images']} digits | torchattacks EOTPGD, 200 steps x 20 draws: "
        f"{times[0]} | protocol `eot-fast`: {times[1]} | {found['ratio']:.0f}x | "
        f"{found['theirs accuracy']:.3f}, {found['ours accuracy']:.3f} (difference {low:+.3f} to {high:+.3f}) |"
    )
    for row in parity["rows"]:
        if row["model"] in ("robust CIFAR ResNet", "robust MNIST") and not row["doubt"]:
            lines.append(
                f"| {row['model']}, {row['norm']} {row['eps']:.3g}, {row['images']} images | pyautoattack standard: "
                f"{row['standard s']:.0f} s | AutoAttack `fast`: {row['fast s']:.0f} s | {row['fast x']:.1f}x | "
                f"{row['standard']:.3f}, {row['fast']:.3f} |"
            )
    return "\n".join(lines)


def eot_curves(document: dict[str, Any]) -> str:
    """Accuracy against passes, and paired differences from 200 steps x 20 draws."""
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in document["rows"]:
        groups[f"{row['defense']}, eps {row['eps']}", row["schedule"]][row["passes"]] = row
    passes = sorted({row["passes"] for row in document["rows"]})
    lines = [f"| defense | schedule | {' | '.join(map(str, passes))} |", "|---|---|" + "---|" * len(passes)]
    for (defense, schedule), found in sorted(groups.items()):
        cells = (f"{found[n]['accuracy']:.3f}" if n in found else "" for n in passes)
        lines.append(f"| {defense} | {schedule} | {' | '.join(cells)} |")
    literature = {d: found[4000] for (d, schedule), found in groups.items() if "pgd-eot" in schedule and 4000 in found}
    lines += ["", "| defense | schedule of 400 passes | minus 200 x 20 |", "|---|---|---|"]
    for (defense, schedule), found in sorted(groups.items()):
        if defense in literature and 400 in found:
            lines.append(f"| {defense} | {schedule} | {_difference(found[400], literature[defense])} |")
    return "\n".join(lines)


def _difference(row: dict[str, Any], other: dict[str, Any]) -> str:
    """The mean difference of two rows' accuracies, image by image, with its 95 % interval."""
    (key,) = (key for key in row if key.startswith("right of"))
    draws = int(key.split()[2])
    found = [(a - b) / draws for a, b in zip(row[key], other[key], strict=True)]
    mean, low, high = with_interval(found)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def with_interval(differences: list[float]) -> tuple[float, float, float]:
    """The mean of paired differences, and the ends of its 95 % interval."""
    mean, half = statistics.fmean(differences), 1.96 * statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - half, mean + half
