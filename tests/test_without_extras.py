"""Attacks, trainings, evaluation and benchmarks from Python need torch and little else."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys

BLOCKED = ("jsonargparse", "docstring_parser", "typeshed_client", "mlxtend", "torchattacks", "pyautoattack", "foolbox",
           "eagerpy", "art", "kornia", "robustbench", "torchvision", "timm", "tensorboard")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder())

from itertools import islice
import torch
from atop_fast import RT2, Defense, build_classifier, build_purifier, evaluate
from atop_fast.attacks import PGD
from atop_fast.bench import finetune as suite, ops
from atop_fast.bench.command import bench
from atop_fast.training import FinetuneConfig, PretrainConfig, finetune, pretrain, train_classifier, ClassifierConfig

x, y = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
classifier, purifier = build_classifier("small_cnn", channels=3, classes=4), build_purifier("unet", width=4)
one = {"epochs": 1, "batch_size": 8}
train_classifier(classifier, x, y, config=ClassifierConfig(**one), progress=False)
transform = RT2(4, sigma=0.1)
pretrain(purifier, transform, x, config=PretrainConfig(gan_weight=0.0, **one), progress=False)
defense = Defense(transform, purifier, classifier)
finetune(defense, x, y, config=FinetuneConfig(gan_weight=0.0, **one), progress=False)
assert PGD(defense, steps=2)(x, y).shape == x.shape
all_cases = ops.all_cases
ops.all_cases = lambda device, quick: islice(ops.pgd_cases(device, quick), 1)
bench("ops", quick=True)
assert len(list(suite.step_case("unet", (2, 32), suite.Options(quick=True), ["plain", "atop_fast"]).run)) == 2
evaluate(defense, x[:2], y[:2], protocol="quick", progress=False)
"""


def test_python_s_interface_works_without_the_packages_of_commands_and_peers():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "pgd_step_linf forward" in done.stdout
