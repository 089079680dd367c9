"""Adversarial training on purification (AToP, ICLR 2024), and sound robust evaluation of random defenses."""

from importlib.metadata import PackageNotFoundError, version

from ._core.threads import is_command, is_program, wait_asleep
from ._core.usage import answer_usage

# This must precede the first import of torch; programs of users keep their own policy.
if is_program():
    answer_usage()
if is_command():
    wait_asleep()

# isort: split

from . import attacks, defenses, doctor, evaluation, ops, purifiers, training, transforms
from .attacks import APGD, APGDT, BPDA, CW, FAB, FGSM, MIFGSM, PGD, PMA, AutoAttack, Square, StAdv
from .checkpoints import list_defenses, load_defense, load_model, save_defense, save_model
from .classifiers import build_classifier
from .classifiers.zoo import load_classifier
from .data import Dataset, image_folder, load_data, mnist5k
from .defense import Defense
from .defenses.judge import judge
from .evaluation import Report, Verdict, evaluate
from .purifiers import build_purifier
from .recipes.run import run_recipe
from .recipes.schema import load_recipe, preset_names
from .training import ClassifierConfig, FinetuneConfig, PretrainConfig, finetune, pretrain, train_classifier
from .transforms import RT1, RT2, RT3, RandomResizePad

try:
    __version__ = version("atop-fast")
except PackageNotFoundError:
    # A checkout that was never installed.
    __version__ = "0+unknown"

__all__ = [
    "APGD",
    "APGDT",
    "BPDA",
    "CW",
    "FAB",
    "FGSM",
    "MIFGSM",
    "PGD",
    "PMA",
    "RT1",
    "RT2",
    "RT3",
    "AutoAttack",
    "ClassifierConfig",
    "Dataset",
    "Defense",
    "FinetuneConfig",
    "PretrainConfig",
    "RandomResizePad",
    "Report",
    "Square",
    "StAdv",
    "Verdict",
    "attacks",
    "build_classifier",
    "build_purifier",
    "defenses",
    "doctor",
    "evaluate",
    "evaluation",
    "finetune",
    "image_folder",
    "judge",
    "list_defenses",
    "load_classifier",
    "load_data",
    "load_defense",
    "load_model",
    "load_recipe",
    "mnist5k",
    "ops",
    "preset_names",
    "pretrain",
    "purifiers",
    "run_recipe",
    "save_defense",
    "save_model",
    "train_classifier",
    "training",
    "transforms",
]
