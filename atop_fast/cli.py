"""The command line: atop-fast demo | check | train | doctor | evaluate | judge | report | bench | env."""

from __future__ import annotations

import difflib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import jsonargparse
import torch

from . import env as environment
from ._core.checks import check_device, message, pick_device
from ._core.distributed import launched
from ._core.help import find_definition, options_of
from ._core.usage import answer_usage
from ._core.yaml import parse_yaml
from .bench.command import bench
from .check import check
from .classifiers.zoo import System, other_threat
from .data import Dataset, Files
from .defense import Defense
from .defenses.command import judge
from .doctor import conclude
from .doctor.command import doctor
from .evaluation.page import evaluation_answer
from .evaluation.report import format_table, versions
from .recipes.evaluation import EvaluationConfig
from .recipes.options import DataConfig, GivenTransform, TransformConfig
from .recipes.pack import evaluation_script, given_files, pack_run, read_report, system_of
from .recipes.run import run_recipe
from .recipes.schema import ClassifierSource, DiscriminatorSource, PurifierSource, Recipe, load_recipe, preset_names
from .training import FinetuneConfig, PretrainConfig


def demo(
    out: str = "runs/demo", budget: str | None = None, device: str = "auto", seed: int = 0, tensorboard: bool = False
) -> None:
    """AToP on real MNIST digits, from training to the report, in a few minutes on a CPU.

    The same as `atop-fast train demo`, which takes all options.

    Args:
        out: folder of the models, the report and the state from which a stopped run resumes.
        budget: time such as 45m or 2h that the run must fit into: with fewer updates and images, as reported.
        device: where to compute: auto (a GPU, if there is one), cpu, cuda, cuda:1, ...
        seed: key of all randomness.
        tensorboard: write logs for TensorBoard to `out`/tensorboard; needs the extra atop-fast[track].
    """
    options: dict[str, Any] = {"seed": seed, "budget": budget, "tensorboard": tensorboard}
    _show(run_recipe(load_recipe("demo"), out, device=_device("demo", device), **options), out)


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
    ablation: bool = False,
    notes: str = "",
    until: Literal["classifier", "pretrain", "finetune", "evaluate"] = "evaluate",
    budget: str | None = None,
    tensorboard: bool = False,
    trust: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """From images to a report by a preset; `atop-fast train PRESET [options]`, see docs/training.md.

    PRESET is cifar10-native-rt1, cifar10-native-rt2, cifar10-native-rt2-at, cifar10-native-rt3, cifar10-rt1,
    cifar10-rt2, cifar10-rt3, cifar100-rt2, imagenette-rt1, imagenette-rt2, imagenette-rt3 or demo, or the path of a
    YAML file; options replace what it says.

    Args:
        out: folder of the models, the report and the state from which a stopped run resumes.
        data: images and their split.
        transform: the random transform.
        classifier: the classifier to defend, given or to train.
        purifier: the purifier, given or to train.
        discriminator: the discriminator of both trainings of the purifier.
        pretrain: training of the purifier on clean images.
        finetune: training of the purifier on adversarial images.
        evaluation: how the classifier alone and the defenses are judged.
        ablation: also fine-tune on adversarial images of the classifier alone, as the public code does, and judge it.
        notes: text that the report quotes.
        until: the last stage; the same command with a later one continues.
        budget: time such as 45m or 2h that the run must fit into: with fewer updates and images, as reported.
        tensorboard: write logs for TensorBoard to `out`/tensorboard; needs the extra atop-fast[track].
        trust: run the program in a classifier's file, or the FILE.py that a preset file names.
        device: where to compute: auto (a GPU, if there is one), cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    networks = (classifier, purifier, discriminator)
    recipe = Recipe(data, transform, *networks, pretrain, finetune, evaluation, ablation, notes)
    options: dict[str, Any] = {"seed": seed, "budget": budget, "tensorboard": tensorboard, "until": until}
    options["trust"] = trust
    _show(run_recipe(recipe, out, device=_device("train", device), **options), out)


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
    normalize: str | None = None,
    trust: bool = False,
    trace: str | None = None,
    tensorboard: bool = False,
    budget: str | None = None,
    device: str = "auto",
    seed: int = 0,
    **evaluation: Any,
) -> None:
    """Attack a defense by a protocol, and judge it on fresh draws; writes report.html and report.json.

    `atop-fast evaluate RUN [options]` takes defense, images and protocol from the folder of a run, or from its archive
    (see report), and `atop-fast evaluate CLASSIFIER` a defense or a classifier, such as the file that check writes.

    Args:
        classifier: classifier.safetensors; or FILE.py:Class with `weights`; or a checkpoint of torch.save with
            `architecture`; or an archive of TorchScript or torch.export; or a model by name, such as
            torchvision:resnet50 with `weights`, or one of RobustBench in the folder models (docs/own-classifier.md).
        purifier: purifier.safetensors; without it the classifier alone is evaluated, or, if `transform` is given, that
            transform before it.
        defense: instead of both, defense.safetensors of the commands train or demo, or the name of a defense that the
            package ships.
        out: folder of the run and its report; the same command resumes a run that was stopped.
        data: images and their split; the held-out part is attacked.
        transform: the random transform, if no file states it.
        architecture: of a checkpoint of torch.save: resnet18, wrn_28_10, ...
        weights: file of the weights of FILE.py:Class or of a model of torchvision or timm.
        key: of a checkpoint that holds several networks: the dictionary, or the prefix of the names.
        normalize: mean and standard deviation by which the network expects its input to be normalized: imagenet,
            cifar10, cifar100, mnist, half or MEAN/STD, such as 0.5,0.5,0.5/0.2,0.2,0.2; by default those of its
            package, or none.
        trust: run the program in a file: an archive, or the source of a class.
        trace: file of JSON lines with loss, accuracy and passes after each step of every attack.
        tensorboard: write the same to `out`/tensorboard; needs the extra atop-fast[track].
        budget: time after which no further attack starts, such as 90s, 10m or 2h.
        device: where to compute: auto (a GPU, if there is one), cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    config = EvaluationConfig(**evaluation)
    chosen = _device("evaluate", device)
    system = System(classifier, purifier, defense, transform, architecture, weights, key, normalize, trust)
    part: Dataset | Files = config.part(system.sized("evaluate", data).load(_say)[1])
    model, part = system.load("evaluate", part)
    assert isinstance(part, Dataset)
    model, part = model.to(chosen), part.to(chosen)
    name = "defense" if isinstance(model, Defense) else "classifier"
    _say(f"Evaluating {_named(model)}")
    if other := other_threat(model, *config.threat):
        _say(other)
    logs = Path(out) / "tensorboard" if tensorboard else None
    options: dict[str, Any] = {"out": out, "budget": budget, "trace": trace, "tensorboard": logs, "title": name}
    if _GIVEN:
        files = given_files(_GIVEN)
        options["about"] = {"repeat": evaluation_script(_GIVEN, files, versions())}
        if files:
            options["about"]["files"] = ", ".join(f"{path} sha256:{digest[:16]}" for path, digest in files.items())
    report = config.run(model, part, seed=seed, **options).to_dict()
    if not _first():
        return
    columns = {name: report[name] for name in ("clean", "robust", "eight_bit")}
    print("\n".join(evaluation_answer(report)))
    print(format_table({name: {**columns, **report["attacks"]}}, report["chance"]))
    if findings := report["diagnostics"]:
        print(conclude({finding["name"]: finding["status"] for finding in findings})[1])
    for finding in findings:
        if finding["status"] != "pass":
            print(f"{finding['status']}  {finding['name']}: {finding['reason']}")
    if headline := report["headline"]:
        print(f"The protocol's source reports {headline}: {report['emulated'][headline]['accuracy']:.3f} (unsound)")
    print(f"Report: {Path(out) / 'report.html'}")


def report(run: str, pack: str | None = None) -> None:
    """Show the results of a finished run; `atop-fast report RUN [options]`.

    Args:
        run: folder of the commands train or demo, or of evaluate.
        pack: file, such as run.zip, for an archive of defense, attacked images, report and recipe, which `atop-fast
            evaluate` takes on another machine.
    """
    if pack is not None:
        pack_run(Path(run), Path(pack))
    _print(read_report(Path(run)))
    if pack is not None:
        print(f"Wrote {pack}; atop-fast evaluate {pack} attacks its defense on its images")


def env() -> None:
    """Print versions, which backend owns which op, and why anything is missing."""
    environment.main()


COMMANDS: dict[str, Any] = {f.__name__: f for f in (demo, check, train, doctor, evaluate, judge, report, bench, env)}

# The option that a command's first argument stands for if it is given without a name.
POSITIONAL = {"bench": "suite", "check": "classifier", "judge": "defense", "report": "run"}
# The doctor takes these options of a run; steps and draws are its own.
EXAMINED = ("classifier", "defense", "data", "norm", "eps", "seed")


# Arguments of the running command, for the script that repeats it.
_GIVEN: list[str] = []


class _Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse names an option as COMMAND.OPTION.
        text = re.sub(r"(arguments are required: )\w+\.", r"\1--", _typed(message))
        sys.exit(_fail(f"{text}{_meant(text)}"))


def main(args: list[str] | None = None) -> None:
    """Entry point of `atop-fast`: bad input gives one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A console without UTF-8 gets replacements for the characters that it lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    answer_usage(sys.argv[1:] if args is None else args)
    jsonargparse.set_loader("yaml", _load_option, exceptions=(ValueError,))
    _GIVEN[:] = sys.argv[1:] if args is None else args
    try:
        with tempfile.TemporaryDirectory() as folder:
            args = _with_numbers(_with_positional([*_GIVEN], Path(folder)))
            jsonargparse.auto_cli(COMMANDS, args=args, as_positional=False, prog="atop-fast", parser_class=_Parser)
    except (ValueError, TypeError, ImportError) as error:
        sys.exit(_fail(error))
    except OSError as error:
        _fail(error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("atop-fast: stopped; the same command resumes from what was saved", file=sys.stderr)
        sys.exit(130)
    finally:
        _GIVEN.clear()


def _fail(error: Any) -> int:
    print(f"atop-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _typed(error: str) -> str:
    """An error of jsonargparse on a value's type in the words of this package; any other as it is."""
    found = re.fullmatch(r'Parser key "([\w.]+)":(.*)(?:Given value|Got value): (.*)', " ".join(error.split()))
    if found is None:
        return error
    kinds = {"float": "a number", "int": "an integer", "bool": "true or false", "str": "text"}
    types = re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", found[2].partition("Given value type")[0])
    names = [f"one of {choices}" if choices else kinds.get(kind, "") for kind, choices in types]
    if not (expected := " or ".join(dict.fromkeys(name for name in names if name))):
        return error
    return message(next(iter(_GIVEN), "atop-fast"), f"--{found[1]}", expected, found[3])


def _meant(error: str) -> str:
    """The option that an unknown one was perhaps meant to be."""
    unknown = re.match(r"unrecognized arguments: ([^ =]+)", error)
    command = next(iter(_GIVEN), "")
    if unknown is None or command not in COMMANDS:
        return ""
    found = find_definition(command, Path(__file__))
    known = [] if found is None else [f"--{option.name}" for option in options_of(*found)]
    close = difflib.get_close_matches(unknown[1], known, n=1)
    text = f"perhaps {close[0]}; " if close else ""
    return f" ({text}`atop-fast {command} --help` lists the options)"


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


def _written_out(command: str, args: list[str]) -> Iterator[str]:
    """Short forms of options in full: --data FOLDER, `train --classifier FILE`, and switches without a value."""
    switches = set(_switches(COMMANDS[command], "--")) if command in COMMANDS else set()
    short = {"--data": "source", **({"--classifier": "path"} if command == "train" else {})}
    for arg, value in zip(args, [*args[1:], ""], strict=False):
        option, equals, given = arg.partition("=")
        given = given if equals else value
        # A dictionary or a file of options stays what it is.
        if option in short and not given.startswith("{") and not given.endswith((".yaml", ".yml")):
            yield f"{option}.{short[option]}{equals}{given if equals else ''}"
        elif arg in switches and value.lower() not in ("true", "false", "null"):
            yield f"{arg}=true"
        else:
            yield arg


def _switches(parameters: Any, prefix: str) -> Iterator[str]:
    """The options of a command, or of a dataclass among its options, that are true or false."""
    for name, kind in get_type_hints(parameters).items():
        if is_dataclass(kind):
            yield from _switches(kind, f"{prefix}{name}.")
        elif kind in (bool, bool | None):
            yield prefix + name


def _with_positional(args: list[str], folder: Path) -> list[str]:
    """Turn the positional argument of a command into options; `folder` takes the contents of an archive.

    The PRESET of `train` and the RUN of `evaluate` and `doctor` are configurations, which later options change.
    """
    command, *rest = args or [""]
    named = ("-h", "--help", "--config", "--print_config")
    preset = bool(rest) and not rest[0].startswith("-")
    if command == "train" and not preset and not any(arg.split("=")[0] in named for arg in rest):
        expected = f"a YAML file or one of {', '.join(preset_names())}, as in `atop-fast train demo --out=runs/demo`"
        raise ValueError(message("train", "PRESET", f"{expected} (docs/training.md)", None))
    rest = list(_written_out(command, rest))
    if command not in (*POSITIONAL, "train", "evaluate", "doctor") or not rest or rest[0].startswith("-"):
        return [command, *rest] if args else args
    if command in POSITIONAL:
        return [command, f"--{POSITIONAL[command]}={rest[0]}", *rest[1:]]
    if command == "train":
        # A program may also run if the command line itself names it.
        trust = any(arg == "--trust=true" or arg.split("=")[0] == "--classifier.path" for arg in rest)
        return ["train", f"--config={json.dumps(asdict(load_recipe(rest[0], trust=trust)))}", *rest[1:]]
    options = system_of(Path(rest[0]), folder, rest)
    if command == "doctor":
        options = {name: options[name] for name in EXAMINED if name in options}
    return [command, f"--config={json.dumps(options)}", *rest[1:]]


def _show(report: dict[str, Any] | None, out: str) -> None:
    """Print the results of a run."""
    if not _first():
        return
    if report is None:
        print(f"Wrote {', '.join(sorted(path.name for path in Path(out).glob('*.safetensors')))} into {out}")
    else:
        _print(report)
        print(f"Report: {Path(out) / 'report.html'}")


def _print(report: dict[str, Any]) -> None:
    print("\n".join(report["answer"]))
    print(format_table({**report["systems"], **report.get("findings", {})}, report["chance"]))


def _say(text: str) -> None:
    if _first():
        print(text)


def _device(function: str, device: str) -> torch.device:
    """The device; under torchrun, every process has a GPU of its own."""
    device = pick_device(device)
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


if __name__ == "__main__":
    main()
