"""Try out an installed atop_fast, from outside of the repository: python /path/to/tests/smoke.py

A user's first steps: the import, the report on the installation, an op, an attack on a defense and its verdict, a
training step, a model's file, and the command line. Needs nothing beyond the package and its dependencies.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import atop_fast as atop
from atop_fast import env

SOURCES = Path(__file__).resolve().parent.parent


def main() -> None:
    """Everything once; an assertion or an exception says what does not work."""
    package = Path(atop.__file__).resolve()
    assert not package.is_relative_to(SOURCES) or "site-packages" in package.parts, f"not installed: {package}"
    assert env.main() == 0

    images, labels = torch.rand(8, 1, 16, 16), torch.arange(8)
    moved = atop.ops.pgd_step_linf(images, torch.randn_like(images), images, alpha=0.1, eps=0.05)
    assert 0 < (moved - images).abs().max() <= 0.0501

    purifier = atop.build_purifier("unet", channels=1, width=4)
    defense = atop.Defense(atop.RT2(patch=4), purifier, atop.build_classifier("small_cnn", channels=1))
    history = atop.finetune(defense, images, labels, config=atop.FinetuneConfig(epochs=1), progress=False)
    assert history
    # The package carries its weights.
    for name in atop.list_defenses():
        assert atop.load_defense(name).metadata["classes"]
    assert atop.list_defenses()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "purifier.safetensors"
        atop.save_model(path, purifier)
        defense = atop.Defense(defense.transform, atop.load_model(path), defense.classifier)
        attack = atop.PGD(defense, eps=0.1, steps=2, eot_iter=2)
        run = Path(folder) / "run"
        report = atop.evaluate(defense, images, labels, attacks={"pgd": attack}, eps=0.1, out=run, progress=False)
        assert 0 <= report.robust.mean <= 1
        assert (run / "report.html").stat().st_size > 0

    program = Path(sys.executable).with_name("atop-fast")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    assert "evaluate" in done.stdout
    print(f"atop_fast {atop.__version__} at {package.parent} works")


if __name__ == "__main__":
    main()
