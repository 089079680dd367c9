"""Does the fast tier of the tests notice a wrong op? One deliberate mistake at a time, in a copy of the repository.

    python benchmarks/mutations.py --scratch DIR

Every mutation changes one line of an op's eager specification, C++ or Triton kernel (in Triton's interpreter); the
tests of that op then run up to the first failure. It counts as caught if that test passes on the unchanged copy.
Rows already in the result file are kept, so that a stopped run resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from _results import RESULTS, metadata, write

ROOT = Path(__file__).parent.parent
COMMAND = "python benchmarks/mutations.py --scratch DIR"


class Mutation(NamedTuple):
    """`old`, which stands in `file` once, becomes `new`."""

    family: str
    mistake: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(family: str, tests: str, *mutations: tuple[str, str, str, str]) -> list[Mutation]:
    files = tuple(f"tests/ops/test_{name}.py" for name in tests.split())
    return [Mutation(family, *mutation, files) for mutation in mutations]


STEPS_PY, STEPS_TRITON = "atop_fast/ops/_steps.py", "kernels/_steps.py"
MUTATIONS = [
    *_of(
        "PGD steps", "pgd_step_linf",
        ("wrong sign of the step", "csrc/math/pgd_step_linf.h", "e.x + alpha * sign(e.g)", "e.x - alpha * sign(e.g)"),
        ("the second draw is left out", STEPS_TRITON, "range(1, DRAWS)", "range(2, DRAWS)"),
        ("gradient through the dropped clamp", "atop_fast/ops/pgd_step_linf.py",
         "    dy = dy * ((projected >= 0) & (projected <= 1))\n", ""),
    ),
    *_of(
        "PGD steps", "pgd_step_l2",
        ("dropped clamp to the image range", "csrc/math/pgd_step_l2.h", "return clamp(x0 + d * scale, T(0), T(1));",
         "return x0 + d * scale;"),
        ("the second draw is left out", STEPS_PY, "for draw in grad[1:]:", "for draw in grad[2:]:"),
    ),
    *_of(
        "APGD steps", "apgd_step_linf",
        ("wrong sign of the momentum", "csrc/math/apgd_step_linf.h", "(e.x - e.x_prev)", "(e.x_prev - e.x)"),
        ("momentum in the place of its rest", STEPS_PY, "(1 - m) * (x - x_prev)", "m * (x - x_prev)"),
    ),
    *_of(
        "attack losses", "attack_loss",
        ("ties go to the larger class", "csrc/cpu/attack_loss.cpp", "z[l] > value[i][l], above = i > 0 && z[l] > value",
         "z[l] >= value[i][l], above = i > 0 && z[l] >= value"),
        ("gradient of the label's logit of wrong sign", "atop_fast/ops/attack_loss.py", "-others / total",
         "others / total"),
    ),
    *_of(
        "L1 projection", "project_l1",
        ("room on the wrong side", "csrc/math/project_l1.h", "y > T(0) ? T(1) - x0 : x0", "y > T(0) ? x0 : T(1) - x0"),
        ("cap left out of the length", "atop_fast/ops/project_l1.py", "left = length.minimum(cap).sum(",
         "left = length.sum("),
    ),
    *_of(
        "hyperplane step", "hyperplane_step",
        ("wrong sign of the change", "atop_fast/ops/hyperplane_step.py", "torch.where(change < 0, -1.0, 1.0)",
         "torch.where(change < 0, 1.0, -1.0)"),
        ("room on the wrong side", "atop_fast/ops/hyperplane_step.py", "torch.where(direction > 0, 1 - x, x)",
         "torch.where(direction > 0, x, 1 - x)"),
    ),
    *_of(
        "masks", "mask_blocks",
        ("one block too many", "atop_fast/ops/mask_blocks.py", "ranks < masked.reshape(-1, 1)",
         "ranks <= masked.reshape(-1, 1)"),
        ("ties are lost", "kernels/mask_blocks.py", "((b_other[None, :] < b_word[:, None]) | is_tie)",
         "((b_other[None, :] <= b_word[:, None]) | is_tie)"),
    ),
    *_of(
        "random numbers", "random_normal",
        ("cosine and sine change places", "atop_fast/ops/random_normal.py", "(radius * cosine, radius * sine)",
         "(radius * sine, radius * cosine)"),
        ("stale draw key", "kernels/philox.py", "draws + i_sample * DRAW_STRIDE", "draws"),
    ),
    *_of(
        "corruption", "corrupt",
        ("dropped clamp at 1", "csrc/math/corrupt.h", "  v = v > T(1) ? T(1) : v;\n", ""),
        ("half a pixel off", "kernels/corrupt.py", "position = (2 * i + 1) * GIVEN - WANTED",
         "position = 2 * i * GIVEN - WANTED"),
    ),
    *_of(
        "assembly", "assemble",
        ("the next copy's block", "atop_fast/ops/assemble.py", "torch.where(owners == n, stacked[:, n], y)",
         "torch.where(owners == n + 1, stacked[:, n], y)"),
        ("blocks that no copy masked are read", "kernels/assemble.py", "mask & is_owned, other=0.0", "mask, other=0.0"),
    ),
    *_of(
        "resampling", "resample",
        ("each pixel's neighbor", "atop_fast/ops/resample.py", "(taps.start + k).view(shape)",
         "(taps.start + k - 1).clamp_min(0).view(shape)"),
        ("the last tap is left out", "atop_fast/ops/resample.py", "range(taps.weight.shape[2])",
         "range(taps.weight.shape[2] - 1)"),
    ),
    *_of(
        "gates", "gated",
        ("features and gates change places", "atop_fast/ops/gated.py",
         "    f, g = h.chunk(2, dim=1)\n    return (F.elu", "    g, f = h.chunk(2, dim=1)\n    return (F.elu"),
        ("the gates get the features' bias", "kernels/gated.py", "tl.load(bias + o_bias + CHANNELS, mask)",
         "tl.load(bias + o_bias, mask)"),
    ),
    *_of(
        "convolutions", "conv3x3",
        ("weights of the gradient not flipped", "atop_fast/ops/conv3x3.py", "weight.transpose(0, 1).flip(2, 3)",
         "weight.transpose(0, 1)"),
        ("gradient through the dropped ReLU", "atop_fast/ops/conv3x3.py",
         "passed = dy if y is None else relu_bwd(dy, y)", "passed = dy"),
    ),
    *_of(
        "convolutions", "frozen_conv",
        ("rows and columns change places", "atop_fast/ops/frozen_conv.py", "i - top, j - left] = weight[:, :, k, n]",
         "i - top, j - left] = weight[:, :, n, k]"),
    ),
    *_of(
        "convolutions", "upsample_conv3x3",
        ("weights not flipped", "atop_fast/ops/upsample_conv3x3.py", "weight.flip(2, 3)", "weight"),
    ),
    *_of(
        "contextual attention", "contextual_attention",
        ("invalid places get weight", "csrc/cpu/contextual_attention.cpp", "z[i] = z[i] * inverse * valid[i];",
         "z[i] = z[i] * inverse;"),
        ("wrong sign in the softmax's gradient", "atop_fast/ops/contextual_attention.py", "(dweights - (weights",
         "(dweights + (weights"),
    ),
    *_of(
        "squares", "square_ops",
        ("dropped clamp at 1", "csrc/cpu/square.cpp", "std::min(T(1), std::max(T(0), s.x0[at + j] + shift))",
         "std::max(T(0), s.x0[at + j] + shift)"),
        ("rows in the place of the square", "atop_fast/ops/square.py", "clamp_(0, 1), rows * columns)",
         "clamp_(0, 1), rows.expand(-1, -1, -1, x.shape[3]))"),
    ),
]  # fmt: skip


def layer(mutation: Mutation) -> str:
    """The implementation that the mutation changes."""
    return {"csrc": "C++", "kernels": "Triton"}.get(mutation.file.split("/")[0], "eager")


class Scratch:
    """A copy of the repository's tracked files, with its native library."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in listed.splitlines():
            source, target = ROOT / name, folder / name
            # Files that are as they were keep their times, for the sake of the build.
            if source.is_file() and (not target.exists() or target.read_bytes() != source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        link = folder / "atop_fast/kernels"
        if not link.exists():
            link.symlink_to("../kernels")
        for library in (ROOT / "atop_fast").glob("*.so"):
            shutil.copyfile(library, folder / "atop_fast" / library.name)

    def change(self, file: str, old: str, new: str) -> None:
        """Replace what must be there once."""
        path = self.folder / file
        text = path.read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{file} has {old!r} {text.count(old)} times, not once")
        path.write_text(text.replace(old, new))

    def build(self) -> None:
        """Compile what has changed of the CPU library."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = {**os.environ, "ATOP_FAST_BUILD": "cpu"}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the native code does not build:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def libraries(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (self.folder / "atop_fast").glob("*.so")}

    def first_failure(self, tests: tuple[str, ...]) -> str | None:
        """The first test that fails, or None; anything else than passed and failed tests ends the script."""
        options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", *options, *tests]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        found = re.search(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::.+?)?)(?: - .*)?$", done.stdout, re.MULTILINE)
        if found and done.returncode in (1, 2):
            return found[1]
        # A process that a wrong kernel crashes names no test.
        if done.returncode < 0:
            return f"{tests[0]} (killed by signal {-done.returncode})"
        if done.returncode != 0:
            raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return None


def attempt(scratch: Scratch, mutation: Mutation) -> dict[str, Any]:
    """The row of one mutation; the copy is afterwards as it was."""
    start, native = time.monotonic(), mutation.file.startswith("csrc/")
    libraries = scratch.libraries() if native else {}
    original = (scratch.folder / mutation.file).read_text()
    scratch.change(mutation.file, mutation.old, mutation.new)
    try:
        if native:
            scratch.build()
        failed = scratch.first_failure(mutation.tests)
    finally:
        (scratch.folder / mutation.file).write_text(original)
        for path, content in libraries.items():
            path.write_bytes(content)
    sound = failed is None or "::" not in failed or scratch.first_failure((failed,)) is None
    return {
        "family": mutation.family,
        "mistake": mutation.mistake,
        "layer": layer(mutation),
        "file": mutation.file,
        "tests": " ".join(mutation.tests),
        "outcome": "survived" if failed is None else "caught" if sound else "fails without it, too",
        "test": failed,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    """Try the mutations that the result file has no row of; those of the native code come last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder of the copy, or of an earlier one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--device", default="cpu-avx2", help="second part of the result file's name")
    parser.add_argument("--only", default="", help="only those whose file has this in its name")
    arguments = parser.parse_args()
    path = arguments.out / f"mutations--{arguments.device}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    known = {(row["file"], row["mistake"]) for row in rows}
    scratch, built = Scratch(arguments.scratch), False
    for mutation in sorted(MUTATIONS, key=lambda mutation: mutation.file.startswith("csrc/")):
        if (mutation.file, mutation.mistake) in known or arguments.only not in mutation.file:
            continue
        if mutation.file.startswith("csrc/") and not built:
            # Later builds then compile the mutation alone.
            scratch.build()
            built = True
        row = attempt(scratch, mutation)
        print(f"{row['outcome']}: {row['layer']}, {row['family']}, {row['mistake']}: {row['test']}", flush=True)
        rows.append(row)
        write("mutations", arguments.device, arguments.out, {**metadata("cpu"), "command": COMMAND, "rows": rows})
    if any(row["outcome"] != "caught" for row in rows):
        raise SystemExit("not every mutation is caught")


if __name__ == "__main__":
    main()
