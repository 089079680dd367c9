"""A finished run as one archive, which `atop-fast evaluate` takes on a machine without the run.

defense.safetensors     the defense
held_out.safetensors    the images that were attacked, in their order
run.json, recipe.yaml   which run it was
repeat.sh, report.html, report.json, gallery.png
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from .._core.checks import message
from .._core.files import write_atomic, write_text
from ..checkpoints import list_defenses, read_header
from ..classifiers.kinds import PACKAGE, SHIPPED, ZOO, kind_of
from ..classifiers.programs import carried_programs
from ..classifiers.zoo import match_classes
from ..data import TORCHVISION, Dataset
from ..evaluation import PROTOCOLS
from .evaluation import QUICK, EvaluationConfig
from .images import save_images
from .options import DataConfig
from .schema import Recipe, load_recipe

DEFENSE, IMAGES, RUN, RECIPE = "defense.safetensors", "held_out.safetensors", "run.json", "recipe.yaml"
NEEDED = (DEFENSE, RUN, RECIPE, "repeat.sh", "report.html", "report.json")
# Options of a run's evaluation that a later one inherits, unless they are given.
KEPT = (
    *("protocol", "norm", "eps", "images", "draws", "selection_draws"),
    *("randomness", "interval", "curve"),
)
# Options that name what a command writes.
WRITTEN = ("--out", "--trace")
# Most bytes of an archive's member, and its highest compression ratio: weights hardly compress.
LARGEST, SHRUNK = 2**34, 200

REPEAT = """#!/bin/sh
# Repeats the run of this folder: sh repeat.sh [OUT], where OUT is a new folder, by default ./repeat.
# It was made with atop_fast {atop_fast}, torch {torch}; other versions and machines round otherwise.
# On another machine, variables say where the files are:{variables}
set -e
cd "$(dirname "$0")"
out="${{1:-repeat}}"
atop-fast train recipe.yaml --seed {seed}{options} --out "$out"
python3 - "$out/report.json" <<'END'
import json, sys
found, expected = (json.load(open(path))["systems"] for path in (sys.argv[1], "report.json"))
print("The verdicts are the same." if found == expected else "The verdicts differ from those of report.json.")
sys.exit(found != expected)
END
"""

REPEAT_EVALUATION = """#!/bin/sh
# Repeats the evaluation of this folder: sh repeat.sh [OUT], where OUT is a new folder, by default ./repeat.
# It was made with atop_fast {atop_fast}, torch {torch}; other versions and machines round otherwise.{budget}
set -e
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "${{1:-$here/repeat}}"
out="$(cd "${{1:-$here/repeat}}" && pwd)"
# Paths below are relative to this folder.
cd {folder}
python3 - <<'END'
import hashlib, sys
for path, digest in {digests!r}.items():
    if hashlib.sha256(open(path, "rb").read()).hexdigest() != digest:
        sys.exit(path + " is not the file that was evaluated.")
END
{command} --out "$out"
python3 - "$out/report.json" "$here/report.json" <<'END'
import json, sys
keys = ("clean", "attacks", "robust", "eight_bit")
found, expected = ([json.load(open(path))[key] for key in keys] for path in sys.argv[1:])
print("The verdicts are the same." if found == expected else "The verdicts differ from those of report.json.")
sys.exit(found != expected)
END
"""
CLOCK = "\n# --budget ends it by the clock: attacks may reach more or fewer images, which gives other verdicts."


def given_files(given: Sequence[str]) -> dict[str, str]:
    """The files that arguments of a command name -> their SHA-256; of the folder of a run, its defense."""
    values = [argument.partition("=")[2] if argument.startswith("--") else argument for argument in _inputs(given)]
    # Path.is_file raises for texts that are too long for a name.
    paths = [Path(value) for value in values if os.path.exists(value)]
    paths = [path / DEFENSE if (path / DEFENSE).is_file() else path for path in paths]
    return {str(path): _sha256(path) for path in paths if path.is_file()}


def _inputs(given: Sequence[str]) -> list[str]:
    """The arguments without the options that name what a command writes."""
    kept, skip = [], False
    for argument in given:
        if not skip and argument.partition("=")[0] not in WRITTEN:
            kept.append(argument)
        skip = argument in WRITTEN
    return kept


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def evaluation_script(given: Sequence[str], files: Mapping[str, str], versions: Mapping[str, str]) -> str:
    """A script that repeats `atop-fast evaluate ...` in the folder in which it was called.

    Args:
        given: arguments of atop-fast, the command first; `files` are theirs, see given_files.
    """
    budget = CLOCK if _value(given, "--budget") is not None else ""
    folder, command = shlex.quote(str(Path.cwd())), shlex.join(["atop-fast", *_inputs(given)])
    return REPEAT_EVALUATION.format(**versions, budget=budget, folder=folder, digests=dict(files), command=command)


def write_repeat(out: Path, recipe: Recipe, seed: int, versions: dict[str, str]) -> str:
    """Write recipe.yaml and repeat.sh, which repeat a run; the text of the latter."""
    write_text(out / "recipe.yaml", yaml.safe_dump(json.loads(json.dumps(asdict(recipe))), sort_keys=False))
    options, variables = "", ""
    for option, value in _paths(recipe).items():
        name = option.replace(".", "_").upper()
        options += f' --{option} "${{{name}:-{_quoted(value)}}}"'
        # A comment ends with its line, and the rest of a path would be a command.
        variables += "\n#   " + f"{name}={shlex.quote(value)}".replace("\n", "\n#   ")
    if any(carried_programs(read_header(out / "classifier.safetensors"))):
        options += " --trust"
    text = REPEAT.format(**versions, seed=seed, options=options, variables=variables or " none is needed.")
    write_text(out / "repeat.sh", text)
    return text


def _paths(recipe: Recipe) -> dict[str, str]:
    """Options that are paths -> the paths, absolute: a script runs in another folder."""
    data = recipe.data
    named = [*TORCHVISION, "mnist5k"]
    given = {f"data.{key}": value for key in ("source", "test") if (value := getattr(data, key)) not in (None, *named)}
    if {data.source, data.test} & set(TORCHVISION):
        given["data.root"] = data.root
    for kind in ("classifier", "purifier", "discriminator"):
        if (path := getattr(recipe, kind).path) is not None and kind_of(path) not in (PACKAGE, SHIPPED, ZOO):
            given[f"{kind}.path"] = path
    if recipe.classifier.weights is not None:
        given["classifier.weights"] = recipe.classifier.weights
    return {option: str(Path(path).absolute()) for option, path in given.items()}


def _quoted(text: str) -> str:
    """A path inside double quotes of a shell."""
    return "".join(f"\\{c}" if c in '"\\$`}' else c for c in text)


def pack_run(run: Path, archive: Path) -> None:
    """Write the archive of a finished run.

    Raises:
        ValueError: `run` is not the folder of a finished run, or the images that it names have changed.
    """
    if missing := [name for name in NEEDED if not (run / name).exists()]:
        raise ValueError(message("report", "run", f"the folder of a finished run, with {missing[0]}", run))
    header = read_run(run)
    held_out: Any = DataConfig(**header["data"]).load()[1]
    if header["classifier"]["path"] is not None:
        held_out = match_classes("report", run / "classifier.safetensors", held_out)
    assert isinstance(held_out, Dataset)
    if not header["images"].endswith(held_out.description()):
        raise ValueError(message("report", "run", "one whose images are as they were", f"{run} with other images"))
    evaluated = EvaluationConfig(**header["evaluation"]).part(held_out)

    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / IMAGES
        save_images(images, evaluated)
        files = {name: run / name for name in (*NEEDED, "gallery.png")} | {IMAGES: images}

        def write(path: Path) -> None:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                for name, source in files.items():
                    if source.exists():
                        file.write(source, name)

        write_atomic(archive, write)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the defense, the images, run.json and recipe.yaml of an archive into a folder, and nothing else.

    Raises:
        ValueError: it is no archive of pack_run, or states sizes above the limits of one.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            for name in (DEFENSE, IMAGES, RUN, RECIPE):
                info = file.getinfo(name)
                if info.file_size > min(LARGEST, 2**20 + SHRUNK * info.compress_size):
                    raise ValueError(f"{name} would take {info.file_size:,} bytes")
                file.extract(info, folder)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            message("evaluate", "RUN", "an archive of `atop-fast report`", f"{archive} ({reason})")
        ) from error


def read_report(run: Path) -> dict[str, Any]:
    """report.json of a finished run or evaluation."""
    try:
        data = json.loads((run / "report.json").read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not {"answer", "systems", "chance"} <= data.keys():
            raise ValueError("report.json is not that of atop-fast")
    except (OSError, ValueError, RecursionError) as error:
        reason = _missing(run, "report.json") or str(error)
        expected = "the folder of a finished run of demo, train or evaluate"
        raise ValueError(message("report", "run", expected, f"{run} ({reason})")) from error
    return data


def _missing(run: Path, name: str) -> str:
    """Say why a folder is no run with the file `name`; empty if the file is there."""
    if not run.is_dir():
        return "a file, and no folder" if run.exists() else "there is no such folder"
    if (run / name).exists():
        return ""
    unfinished = (run / RUN).exists()
    return f"it has no {name}{': the command that began it goes on' if unfinished else ''}"


def read_run(run: Path, function: str = "report", argument: str = "run") -> dict[str, Any]:
    """run.json of a folder of run_recipe."""
    try:
        header = json.loads((run / RUN).read_text(encoding="utf-8"))
        if not isinstance(header, dict) or not {"data", "evaluation", "classifier", "images"} <= header.keys():
            raise ValueError(f"its {RUN} is not that of `atop-fast train`")
    except (OSError, ValueError, RecursionError) as error:
        reason = _missing(run, RUN) or str(error)
        expected = "the folder of a run of demo or train"
        raise ValueError(message(function, argument, expected, f"{run} ({reason})")) from error
    return header


def _value(given: Sequence[str], option: str) -> str | None:
    """The value of an option among the arguments of a command; None if it is not there."""
    for argument, following in zip(given, (*given[1:], ""), strict=True):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else following
    return None


def system_of(path: Path, folder: Path, given: Sequence[str] = ()) -> dict[str, Any]:
    """Options of the command evaluate for a run, an archive of one (unpacked into `folder`), or a model's file or name.

    The options of the protocol quick are inherited, too, unless a protocol is among the `given` arguments; norm and eps
    are inherited unless that protocol, or a given norm, is another one, in which the run's radius has no meaning.
    """
    if path.suffix == ".zip":
        unpack(path, folder)
        header = read_run(folder, "evaluate", "RUN")
        data: dict[str, Any] = {"source": str(folder / IMAGES)}
        path = folder
    elif path.is_dir():
        header = read_run(path, "evaluate", "RUN")
        data = header["data"]
    elif path.suffix != ".safetensors":
        shipped = not path.exists() and str(path) in list_defenses()
        return {"defense" if shipped else "classifier": str(path)}
    else:
        kind = "defense" if read_header(path).get("kind") == "defense" else "classifier"
        return {kind: str(path)}
    # Under a budget, the evaluation was not that of run.json. Nothing else of the recipe is taken: no program runs.
    recipe = path / RECIPE
    done = asdict(load_recipe(recipe, trust=True).evaluation) if recipe.exists() else header["evaluation"]
    names: tuple[str, ...] = (*KEPT, *QUICK)
    norm = done["norm"] or PROTOCOLS[done["protocol"]].norm
    if (protocol := _value(given, "--protocol")) is not None:
        other = protocol in PROTOCOLS and PROTOCOLS[protocol].norm != norm
        names = tuple(name for name in KEPT if not (other and name in ("norm", "eps")))
    if _value(given, "--norm") not in (None, norm):
        names = tuple(name for name in names if name != "eps")
    kept = {key: value for key in names if (value := done.get(key)) is not None}
    return {"defense": str(path / DEFENSE), "data": data, "seed": header.get("seed", 0), **kept}
