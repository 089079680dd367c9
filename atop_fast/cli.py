"""The command line: atop-fast demo | train | classifier | pretrain | finetune | doctor | evaluate | bench | env."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import torch

from . import env as environment
from ._core.checks import check_choice, check_device, check_integer, message
from ._core.distributed import launched
from ._core.files import claim_folder, describe
from ._core.yaml import parse_yaml
from .bench.command import bench
from .checkpoints import load_model, read_header, save_defense, save_model
from .classifiers import build_classifier
from .classifiers.zoo import System
from .data import Dataset, Files
from .defense import Defense
from .doctor.command import doctor
from .evaluation import PROTOCOLS, quick_attacks
from .evaluation import evaluate as run_evaluation
from .evaluation.report import format_table
from .purifiers import SNPatchDiscriminator, build_purifier
from .randomness import derive_seed, seeded
from .recipes.demo import DemoConfig, run_demo
from .recipes.options import DataConfig, GivenTransform, TransformConfig
from .recipes.run import run_recipe
from .recipes.schema import ClassifierSource, DiscriminatorSource, EvaluationConfig, PurifierSource, Recipe, load_recipe
from .training import ClassifierConfig, FinetuneConfig, PretrainConfig, train_classifier
from .training import finetune as run_finetune
from .training import pretrain as run_pretrain


def demo(out: str = "runs/demo", options: DemoConfig = DemoConfig()) -> None:
    """AToP on real MNIST digits, from training to the report, in a few minutes on a CPU.

    Args:
        out: folder for report.html, report.json, gallery.png and the trained models.
        options: sizes, threat model, transform and lengths.
    """
    run_demo(out, options)
    print(f"Report: {Path(out) / 'report.html'}")


def train(
    out: str = "runs/train",
    data: DataConfig = DataConfig(),
    transform: TransformConfig = TransformConfig(),
    classifier: ClassifierSource = ClassifierSource(),
    purifier: PurifierSource = PurifierSource(),
    discriminator: DiscriminatorSource = DiscriminatorSource(),
    pretrain: PretrainConfig = PretrainConfig(),
    finetune: FinetuneConfig = FinetuneConfig(),
    evaluation: EvaluationConfig = EvaluationConfig(),
    budget: str | None = None,
    tensorboard: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """From images to a report by a preset; `atop-fast train PRESET [options]`, see docs/training.md.

    PRESET is cifar10-native-rt1, cifar10-native-rt2, cifar10-native-rt2-at, cifar10-native-rt3, cifar10-rt1,
    cifar10-rt2, cifar10-rt3, cifar100-rt2, imagenette-rt1, imagenette-rt2 or imagenette-rt3, or the path of a YAML
    file; options replace what it says.

    Args:
        out: folder of the models, the report and what a stopped run goes on from.
        data: images and their split.
        transform: the random transform.
        classifier: the classifier to defend, given or to train.
        purifier: the purifier.
        discriminator: the discriminator of both trainings of the purifier.
        pretrain: training of the purifier on clean images.
        finetune: training of the purifier on adversarial images.
        evaluation: how the defence is judged after both.
        budget: time such as 45m or 2h in which a reduced form of it ends: with fewer updates and images, as reported.
        tensorboard: write logs for TensorBoard to `out`/tensorboard; needs the extra atop-fast[track].
        device: where to compute: cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    recipe = Recipe(data, transform, classifier, purifier, discriminator, pretrain, finetune, evaluation)
    place = _place("train", device)
    report = run_recipe(recipe, out, device=place, seed=seed, budget=budget, tensorboard=tensorboard)
    if _first():
        print(format_table(report["systems"]))
        print(f"Report: {Path(out) / 'report.html'}")


def classifier(
    out: str = "runs/classifier",
    data: DataConfig = DataConfig(),
    training: ClassifierConfig = ClassifierConfig(lr=4e-3),
    width: int = 16,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Train a small classifier on clean images.

    Args:
        out: folder for classifier.safetensors.
        data: images and their split.
        training: length, learning rate, precision and augmentation.
        width: channels of its first layer.
        device: where to compute: cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    place = check_device("classifier", "device", device)
    train, held_out = (part.to(place) for part in data.load(_say))
    folder = _claim("classifier", out, train, seed, data=data, training=training, width=width)
    shape: dict[str, Any] = {"channels": train.shape[0], "classes": len(train.classes), "width": width}
    with seeded(derive_seed(seed, "classifier")):
        model = build_classifier("small_cnn", **shape).to(place)
    checkpoint = folder / "classifier.pt"
    train_classifier(model, *train.training(), config=training, seed=seed, checkpoint=checkpoint)
    metadata = _about(train)
    save_model(folder / "classifier.safetensors", model, "classifier", "small_cnn", metadata=metadata, **shape)
    checkpoint.unlink(missing_ok=True)
    with torch.no_grad():
        right = torch.cat([model(part).argmax(dim=1) for part in held_out.images.split(256)]) == held_out.labels
    print(f"Held-out accuracy {right.float().mean():.3f}; wrote {folder / 'classifier.safetensors'}")


def pretrain(
    out: str = "runs/pretrain",
    data: DataConfig = DataConfig(),
    transform: TransformConfig = TransformConfig(),
    training: PretrainConfig = PretrainConfig(),
    width: int = 12,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Train a U-Net purifier to restore clean images.

    Args:
        out: folder for purifier.safetensors; an interrupted run in it goes on.
        data: images and their split.
        transform: the random transform.
        training: length, learning rate and GAN weight.
        width: channels of the purifier's first layer.
        device: where to compute: cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    place = check_device("pretrain", "device", device)
    train = data.load(_say)[0].to(place)
    folder = _claim("pretrain", out, train, seed, data=data, transform=transform, training=training, width=width)
    channels = train.shape[0]
    with seeded(derive_seed(seed, "networks")):
        purifier = build_purifier("unet", channels=channels, width=width).to(place)
        discriminator = SNPatchDiscriminator(**_patches(channels)).to(place)
    checkpoint = folder / "pretrain.pt"
    run_pretrain(
        purifier,
        transform.build(),
        train.training()[0],
        discriminator=discriminator,
        config=training,
        seed=seed,
        checkpoint=checkpoint,
    )
    save_model(folder / "purifier.safetensors", purifier, "purifier", "unet", channels=channels, width=width)
    save_model(folder / "discriminator.safetensors", discriminator, "discriminator", "sn_patch", **_patches(channels))
    checkpoint.unlink(missing_ok=True)
    print(f"Wrote {folder / 'purifier.safetensors'}")


def finetune(
    classifier: str,
    purifier: str,
    discriminator: str | None = None,
    architecture: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    out: str = "runs/finetune",
    data: DataConfig = DataConfig(),
    transform: GivenTransform = GivenTransform(),
    training: FinetuneConfig = FinetuneConfig(),
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Fine-tune a purifier on adversarial images, in front of a frozen classifier.

    Args:
        classifier: classifier.safetensors of the commands classifier or demo; or a checkpoint of torch.save with
            `architecture`; or a model by name, such as torchvision:resnet50 with `weights`, or one of RobustBench in
            the folder models (see load_classifier).
        purifier: purifier.safetensors of the command pretrain, or pretrained.safetensors of demo.
        discriminator: discriminator.safetensors of the command pretrain; without it a new one starts.
        architecture: of a checkpoint of torch.save: resnet18, wrn_28_10, ...
        weights: file of the weights of a model of torchvision or timm.
        key: of a checkpoint that holds several networks: the dictionary, or what stands before the names.
        out: folder for purifier.safetensors, and for defense.safetensors, which has both networks and the transform; an
            interrupted run in it goes on.
        data: images and their split.
        transform: the random transform, where purifier.safetensors does not say under which it was trained.
        training: losses, training attack and length.
        device: where to compute: cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    place = check_device("finetune", "device", device)
    system = System(classifier, purifier, None, transform, architecture, weights, key)
    model, train = system.load("finetune", data.load(_say)[0])
    defense, train = model.to(place), train.to(place)
    assert isinstance(defense, Defense)
    networks = {"classifier": classifier, "purifier": purifier, "discriminator": discriminator}
    weights_of = describe(*defense.state_dict().values())
    options: dict[str, Any] = {**networks, "weights": weights_of, "transform": repr(defense.transform)}
    folder = _claim("finetune", out, train, seed, data=data, training=training, **options)
    if discriminator is None:
        with seeded(derive_seed(seed, "networks")):
            judge: torch.nn.Module = SNPatchDiscriminator(**_patches(train.shape[0]))
    else:
        judge = load_model(discriminator, "discriminator")
    checkpoint = folder / "finetune.pt"
    run_finetune(
        defense,
        *train.training(),
        discriminator=judge.to(place),
        config=training,
        seed=seed,
        checkpoint=checkpoint,
    )
    header = read_header(purifier)
    save_model(folder / "purifier.safetensors", defense.purifier, "purifier", header["name"], **header["options"])
    about = {**_about(train), "norm": training.norm, "eps": training.eps, "training": asdict(training)}
    save_defense(folder / "defense.safetensors", defense, **about)
    checkpoint.unlink(missing_ok=True)
    print(f"Wrote {folder / 'purifier.safetensors'} and defense.safetensors, with {defense.transform}")


def evaluate(
    classifier: str | None = None,
    purifier: str | None = None,
    defense: str | None = None,
    out: str = "runs/evaluate",
    data: DataConfig = DataConfig(),
    transform: GivenTransform = GivenTransform(),
    architecture: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    protocol: str = "quick",
    norm: Literal["Linf", "L2", "L1"] | None = None,
    eps: float | None = None,
    steps: int | None = None,
    eot_iter: int | None = None,
    gradient: Literal["exact", "bpda", "blind"] | None = None,
    draws: int | None = None,
    selection_draws: int = 20,
    randomness: Literal["fresh", "fixed"] = "fresh",
    interval: Literal["wilson", "bootstrap"] = "wilson",
    curve: tuple[float, ...] = (),
    diagnostics: bool = True,
    trace: str | None = None,
    tensorboard: bool = False,
    budget: str | None = None,
    batch_size: int = 100,
    images: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Attack a defence by a protocol, and judge it on fresh draws; writes report.html and report.json.

    Args:
        classifier: classifier.safetensors; or a checkpoint of torch.save with `architecture`; or a model by name, such
            as torchvision:resnet50 with `weights`, or one of RobustBench in the folder models (see load_classifier).
        purifier: purifier.safetensors; without it the classifier alone is evaluated, or, if `transform` is given, that
            transform before it.
        defense: instead of both, defense.safetensors of the commands train, finetune or demo, or the name of a defence
            that the package carries.
        out: folder of the run and its report; the same command goes on with a run that was stopped.
        data: images and their split; the held-out part is attacked.
        transform: the random transform, where no file says it.
        architecture: of a checkpoint of torch.save: resnet18, wrn_28_10, ...
        weights: file of the weights of a model of torchvision or timm.
        key: of a checkpoint that holds several networks: the dictionary, or what stands before the names.
        protocol: quick, pgd-eot, autoattack-rand, autoattack-fixed, bpda-eot, paper, unseen, eot-fast or fast
            (docs/evaluation.md).
        norm: norm of the threat model; default the protocol's.
        eps: its radius, in units of [0, 1] pixels; default the protocol's.
        steps: PGD steps of the protocol quick; default 80 for random models and 20 for others.
        eot_iter: draws in each gradient of PGD in the protocol quick; default 1.
        gradient: of the protocol quick: exact (default), bpda (identity through transform and purifier) or blind.
        draws: K, fresh draws of the verdict; default the protocol's.
        selection_draws: draws of the choice among an image's candidates.
        randomness: fresh, or fixed: mask and noise are fixed for each image and known to the attacker.
        interval: of the means: wilson or bootstrap.
        curve: radii of a curve of accuracy against eps, such as [0, 0.05, 0.1].
        diagnostics: examine the model as the command doctor does, for the report.
        trace: file of JSON lines with loss, accuracy and passes after each step of every attack.
        tensorboard: write the same to `out`/tensorboard; needs the extra atop-fast[track].
        budget: time after which no further attack starts, such as 90s, 10m or 2h.
        batch_size: images attacked together.
        images: how many held-out images; default as many as the protocol names, or all.
        device: where to compute: cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    place = _place("evaluate", device)
    plan = PROTOCOLS[check_choice("evaluate", "protocol", protocol, list(PROTOCOLS))]
    flags: dict[str, Any] = {"steps": steps, "eot_iter": eot_iter, "gradient": gradient}
    options = {name: value for name, value in flags.items() if value is not None}
    if options and protocol != "quick":
        raise ValueError(message("evaluate", next(iter(options)), "left out for protocols other than quick", protocol))
    if images is not None:
        check_integer("evaluate", "images", images, low=1)
    part: Dataset | Files = data.load(_say)[1].take(slice(0, plan.images if images is None else images))
    model, part = System(classifier, purifier, defense, transform, architecture, weights, key).load("evaluate", part)
    assert isinstance(part, Dataset)
    model, part = model.to(place), part.to(place)
    name = "defense" if isinstance(model, Defense) else "classifier"
    _say(f"Evaluating {_named(model)}")
    threat = (plan.norm if norm is None else norm, plan.eps if eps is None else eps)
    report = run_evaluation(
        model,
        part.images,
        part.labels,
        protocol=protocol,
        norm=threat[0],
        eps=threat[1],
        seed=seed,
        attacks=(lambda attacked: quick_attacks(attacked, *threat, seed, **options)) if options else None,
        draws=draws,
        selection_draws=selection_draws,
        batch_size=batch_size,
        out=out,
        budget=budget,
        randomness=randomness,
        interval=interval,
        curve=curve,
        diagnostics=None if diagnostics else (),
        trace=trace,
        tensorboard=Path(out) / "tensorboard" if tensorboard else None,
        title=name,
    ).to_dict()
    if not _first():
        return
    columns = {name: report[name] for name in ("clean", "robust", "eight_bit")}
    print(format_table({name: {**columns, **report["attacks"]}}))
    if not report["complete"]:
        print("The budget ended before every attack had got to every image: the robust accuracy is an upper bound.")
    if headline := report["headline"]:
        print(f"The protocol's source reports {headline}: {report['emulated'][headline]['accuracy']:.3f} (unsound)")
    print(f"Report: {Path(out) / 'report.html'}")


def env() -> None:
    """Print versions, which backend owns which op, and why anything is missing."""
    environment.main()


COMMANDS: dict[str, Any] = {
    f.__name__: f for f in (demo, train, classifier, pretrain, finetune, doctor, evaluate, bench, env)
}


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.exit(_fail(message))


def main(args: list[str] | None = None) -> None:
    """Entry point of `atop-fast`: bad input gives one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A console without UTF-8 gets replacements for the characters that it lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    jsonargparse.set_loader("yaml", _load_option, exceptions=(ValueError,))
    try:
        args = _with_numbers(_with_positional(sys.argv[1:] if args is None else args))
        jsonargparse.auto_cli(COMMANDS, args=args, as_positional=False, prog="atop-fast", parser_class=_Parser)
    except (ValueError, TypeError, ImportError) as error:
        sys.exit(_fail(error))
    except OSError as error:
        _fail(error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("atop-fast: stopped; the same command takes up what was saved", file=sys.stderr)
        sys.exit(130)


def _fail(error: Any) -> int:
    print(f"atop-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _load_option(text: str) -> Any:
    """A value of the command line or a file of options, which parse_yaml reads; {a, b} and `a:` stay text."""
    value = parse_yaml(text, dates=False)
    if isinstance(value, dict) and value and all(v is None for v in value.values()):
        return text
    return value


def _with_numbers(args: list[str]) -> list[str]:
    """Fractions as numbers, in options that are radii or steps: --eps 8/255, --training.alpha=2/255."""
    numbers = []
    for before, arg in zip(["", *args], args, strict=False):
        option, equals, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
        fraction = re.fullmatch(r"([0-9.]+)/([0-9.]+)", value)
        if fraction and re.fullmatch(r"--([\w.]+\.)?(eps|alpha)", option):
            try:
                number = parse_yaml(value)
            except ValueError as error:
                raise ValueError(message("atop-fast", option, "a number", value)) from error
            numbers.append(f"{option}={number!r}" if equals else repr(number))
        else:
            numbers.append(arg)
    return numbers


def _with_positional(args: list[str]) -> list[str]:
    """The PRESET of `train` as the configuration that later options change, and the SUITE of `bench` as an option."""
    if args[:1] not in (["train"], ["bench"]) or len(args) == 1 or args[1].startswith("-"):
        return args
    if args[0] == "bench":
        return ["bench", f"--suite={args[1]}", *args[2:]]
    return ["train", f"--config={json.dumps(asdict(load_recipe(args[1])))}", *args[2:]]


def _claim(function: str, out: str, train: Dataset | Files, seed: int, **options: Any) -> Path:
    """The folder of this run of a training, and of no other."""
    folder = Path(out)
    if _first():
        header: dict[str, Any] = {}
        for key, value in options.items():
            header[key] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        claim_folder(function, folder, {"command": function, **header, "seed": seed, "images": train.description()})
    return folder


def _say(text: str) -> None:
    if _first():
        print(text)


def _place(function: str, device: str) -> torch.device:
    """The device; under torchrun, every process has a GPU of its own."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and launched() else device
    return check_device(function, "device", own)


def _first() -> bool:
    """Whether this process prints: under torchrun, the one of rank 0."""
    return not launched() or os.environ["RANK"] == "0"


def _named(model: torch.nn.Module) -> str:
    if not isinstance(model, Defense):
        return "the classifier alone"
    purifier = "no purifier" if model.purifier is None else type(model.purifier).__name__
    return f"{model.transform}, {purifier} and the classifier"


def _about(data: Dataset | Files) -> dict[str, Any]:
    """The metadata of a file on the images that its network was trained on."""
    return {"classes": data.classes, "shape": data.shape, "images": data.description()}


def _patches(channels: int) -> dict[str, Any]:
    """A discriminator for images of some 32 pixels: three layers leave a 4x4 grid of patches."""
    return {"channels": channels, "width": 16, "depth": 3}


if __name__ == "__main__":
    main()
