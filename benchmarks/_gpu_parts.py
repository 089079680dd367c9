"""The parts of benchmarks/gpu.py, each run in a separate process; a part writes its numbers to --numbers."""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _gpu_attacks

ROOT = Path(__file__).resolve().parent.parent
# Pure Python; the command line and recipes stand on them.
PACKAGES = ("jsonargparse", "docstring_parser", "typeshed_client")
PEERS = ("torchattacks", "pyautoattack", "foolbox", "art", "kornia", "mlxtend")
# Expected of the device: see docs/gpu.md.
ARCHITECTURE = "9.0"
# A training that ends in time leaves some of its seconds to the writing of files.
SLACK = 20


def sources() -> str:
    """A hash of what the native libraries are made of."""
    files = [ROOT / "setup.py", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def copy_package(name: str, site: Path) -> None:
    """Copy an installed package of pure Python, with its metadata."""
    for file in importlib.metadata.files(name) or ():
        source = Path(str(file.locate()))
        if ".." not in file.parts and source.suffix != ".pyc" and source.is_file():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, site / file)


def setup(options: argparse.Namespace) -> dict[str, Any]:
    """Packages, libraries and data; what is here and what is missing."""
    site = options.out / "site"
    site.mkdir(exist_ok=True)
    if options.kit:
        if (options.kit / "site").is_dir():
            shutil.copytree(options.kit / "site", site, dirs_exist_ok=True)
        for wheel in options.kit.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    # An installation finds the kernels; sources alone, as a GPU machine has them, need a link.
    if subprocess.run([sys.executable, "-c", "import atop_fast.kernels"], cwd=ROOT, check=False).returncode:
        (ROOT / "atop_fast" / "kernels").symlink_to(Path("..") / "kernels")
    built = "as it was" if options.tiny else libraries(options.kit)
    data = unpacked(options)
    subprocess.run([sys.executable, "-m", "atop_fast.env"], check=True, cwd=ROOT)
    # The folder was not there when this process began.
    sys.path_importer_cache.clear()
    missing = [name for name in (*PACKAGES, *PEERS, "torchvision") if importlib.util.find_spec(name) is None]
    lines = [f"native code: {built}", f"missing: {', '.join(missing) or 'nothing'}; what needs it is left out"]
    return {"missing": missing, "built": built, "data": str(data), "summary": [*lines, f"images: {data}"]}


def libraries(kit: Path | None) -> str:
    """Have native libraries that load: those of the kit, if they are of these sources, or built here."""
    why = "no prebuilt libraries"
    if kit and list(kit.glob("_ops_*.so")):
        why = "prebuilt libraries of other sources"
        if (kit / "sources").read_text().strip() == sources():
            for library in kit.glob("_ops_*.so"):
                shutil.copy(library, ROOT / "atop_fast")
            if not (why := absent()):
                return "prebuilt"
            for library in ROOT.glob("atop_fast/_ops_*.so"):
                library.unlink()
    print(f"building, as there are {why}", flush=True)
    environment = {"TORCH_CUDA_ARCH_LIST": ARCHITECTURE, **os.environ}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], check=True, cwd=ROOT, env=environment)
    if why := absent():
        raise RuntimeError(f"benchmarks/gpu.py: built, but {why}")
    return "built here"


def absent() -> str:
    """Why native libraries do not serve, or the empty string."""
    code = (
        "from atop_fast.ops import _registry as r; print({k: v for k, v in r.MISSING.items() if k != 'triton'} or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or done.stderr.strip()[-300:]) if done.returncode else done.stdout.strip()


def unpacked(options: argparse.Namespace) -> Path | None:
    """The image folder: given, out of an archive, or, in a rehearsal, made."""
    target: Path = options.out / "data"
    if options.data is None and options.tiny and not target.exists():
        import numpy as np
        from PIL import Image

        for i in range(64):
            (target / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(target / f"class{i % 2}" / f"{i}.png")
    elif options.data is not None and options.data.is_file() and not target.exists():
        shutil.unpack_archive(options.data, target.with_suffix(".new"))
        target.with_suffix(".new").rename(target)
    if options.data is not None and options.data.is_dir():
        return Path(options.data)
    return target if target.exists() else None


def ceilings(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the highest rates of the device."""
    import torch

    from atop_fast._core.flags import holding
    from atop_fast._core.precision import full_precision, is_fast
    from atop_fast.bench.harness import Roofline

    device = options.device
    roofline, rounded = Roofline(device, 0.05), Roofline(device, 0.05)
    rates = {f"copy of {size >> 20} MiB, GB/s": roofline.copy(size) / 1e9 for size in options.copies}
    with full_precision(torch.device(device)):
        rates["float32, TFLOP/s"] = roofline.matmul("float32") / 1e12
    with holding([(torch.backends.cuda.matmul, "fp32_precision", "tf32")]):
        rates["tf32, TFLOP/s"] = rounded.matmul("float32") / 1e12
    if is_fast(torch.device(device), "bfloat16"):
        rates["bfloat16, TFLOP/s"] = roofline.matmul("bfloat16") / 1e12
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": name, "rates": rates, "summary": [name, *(f"{key}: {rate:.4g}" for key, rate in rates.items())]}


def smoke(options: argparse.Namespace) -> dict[str, Any]:
    """The tests without which nothing else is worth its time."""
    if options.tiny:
        return pytest(["tests/ops/test_random_normal.py"], "matches_reference and cpp", 0)
    chosen = "test_capture or test_cuda_graphs or (matches_formula and (cuda or triton))"
    files = ["tests/test_capture.py", "tests/test_replays.py", "tests/ops"]
    return pytest([*files, "--require-backends=eager,triton,cuda"], chosen, 8)


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """All tests of ops that say something about this device."""
    if options.tiny:
        return pytest(["tests/ops/test_random_normal.py"], "key_in_strides and cpp", 0)
    chosen = "(cuda or triton) and not opcheck and not compile and not matches_formula"
    return pytest(["tests/ops", "--require-backends=eager,triton,cuda"], chosen, 12)


def sanitize(options: argparse.Namespace) -> dict[str, Any]:
    """Ops in CUDA under two of compute-sanitizer's tools."""
    # torch's cache of memory would hide what is read beyond a tensor.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    codes = {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-v"]
        command += ["-p", "no:cacheprovider", "tests/ops", "-k", "cuda and fp32 and matches_formula"]
        codes[tool] = subprocess.run(command, cwd=ROOT, check=False, timeout=options.seconds / 2).returncode
    if any(codes.values()):
        raise RuntimeError(f"benchmarks/gpu.py: compute-sanitizer's exit codes are {codes}")
    return {"codes": codes, "summary": ["memcheck and racecheck found nothing"]}


def pytest(paths: list[str], chosen: str, workers: int) -> dict[str, Any]:
    """Run tests; their lines in the log are counted even if it breaks off."""
    command = [sys.executable, "-m", "pytest", *paths, "-k", chosen, "-v", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-n", str(workers)] if workers else []
    if (code := subprocess.run(command, cwd=ROOT, check=False).returncode) != 0:
        raise RuntimeError(f"benchmarks/gpu.py: pytest's exit code is {code}")
    return {}


def suite(options: argparse.Namespace, name: str, quick: bool = True) -> dict[str, Any]:
    """A suite of the command bench; all that it has measured is kept whatever comes after."""
    from atop_fast.bench import ops
    from atop_fast.bench.command import bench

    file = options.numbers.with_suffix(".rows")
    if options.tiny:
        # Most cases take longer to make on a CPU than a rehearsal may.
        ops.all_cases = lambda device, quick: itertools.islice(ops.pgd_cases(device, quick), 1)
    try:
        bench(name, options.device, str(file), quick=quick, commit=options.commit)  # type: ignore[arg-type]
    finally:
        document = json.loads(file.read_text()) if file.exists() else {"rows": [], "failures": []}
        ours = [row for row in document["rows"] if row["ours"]]
        best = sorted(ours, key=lambda row: row["roofline"] or row["ratio"])
        some = [
            f"{r['case']}, {r['shape']}: {r['variant']} {r['ratio']}x of the baseline" for r in best[:1] + best[-1:]
        ]
        heading = f"{len(document['rows'])} rows, {len(document['failures'])} failures; the worst and the best:"
        write(options, {"document": document, "summary": [heading, *some]})
    return {}


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """A step of PGD, eager and replayed, in two precisions; then the fine-tuning step."""
    import torch

    from atop_fast import RT1, Defense, build_classifier
    from atop_fast._core.flags import holding
    from atop_fast.attacks import PGD
    from atop_fast.attacks.folding import fold_batch_norm
    from atop_fast.bench.harness import CALLS, as_graph, time_in_turns
    from atop_fast.training.step import run_attack

    device, count = options.device, 5
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    name, batches = ("small_cnn", (8,)) if options.tiny else ("resnet18", (128, 256, 512, 1024))
    classifier = (
        build_classifier(name, channels=3).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    )
    rows: list[dict[str, Any]] = []
    for batch in batches:
        x, ids = torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device)
        for precision in ("float32", "bfloat16"):
            model = Defense(RT1(1, 0.0), None, fold_batch_norm(classifier))
            attack = PGD(model, steps=count, random_start=False, precision=precision)
            seed = torch.zeros((), dtype=torch.int64, device=device)

            def work(attack: PGD = attack, seed: Any = seed, x: Any = x, ids: Any = ids) -> Any:
                return run_attack(attack, seed, x, ids % 10, ids)

            row = {"batch": batch, "precision": "tf32" if precision == "float32" else precision}
            with holding((place, "fp32_precision", "tf32") for place in places):
                work()
                row["eager_ms"] = 1e3 * min(time_in_turns({"": work}, device, 0.3, 3)[""]) / count
                if device == "cuda":
                    # A step that cannot be captured must not cost the other rows.
                    try:
                        replay = as_graph(work)
                        row["replayed_ms"] = 1e3 * min(time_in_turns({"": replay}, device, 0.3, 3)[""]) / count / CALLS
                    except RuntimeError as error:
                        row["not replayed"] = str(error).partition("\n")[0]
            rows.append(row)
            write(options, {"pgd": rows, "summary": [f"PGD step: {row}" for row in rows[-2:]]})
    if not options.tiny:
        from atop_fast.bench.command import bench

        file = options.numbers.with_suffix(".rows")
        bench("finetune", device, str(file), quick=True, commit=options.commit)
        document = json.loads(file.read_text())
        some = [f"fine-tuning: {row['variant']} {1e3 * row['median_s']:.3g} ms" for row in document["rows"]]
        return {"pgd": rows, "finetune": document, "summary": [f"PGD step: {rows[0]}", *some]}
    return {}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """The native preset from images to verdict, within the part's time."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise RuntimeError(f"benchmarks/gpu.py: train needs {', '.join(missing)}: give a --kit that has them")
    data = json.loads((options.out / "parts" / "setup.json").read_text())["numbers"]["data"]
    if data == "None":
        raise RuntimeError("benchmarks/gpu.py: train needs --data, an image folder of CIFAR-10 or an archive of one")
    from atop_fast.recipes.run import run_recipe
    from atop_fast.recipes.schema import load_recipe

    recipe = load_recipe("cifar10-native-rt2")
    changes: dict[str, Any] = {"precision": "float32" if options.device == "cpu" else "bfloat16"}
    smoke = options.out / "parts" / "smoke.json"
    failed = json.loads(smoke.read_text()).get("tests", {}).get("names", []) if smoke.exists() else []
    if any("test_cuda_graphs_are" in name for name in failed):
        os.environ["ATOP_FAST_GRAPHS"] = "updates"
    if any("test_a_cuda_graph_is" in name for name in failed):
        # Without graphs, small batches wait for the host.
        changes |= {"graphs": False, "batch_size": 256}
    recipe = replace(
        recipe,
        data=replace(recipe.data, source=data, holdout=8 if options.tiny else recipe.data.holdout),
        classifier=replace(recipe.classifier, training=replace(recipe.classifier.training, **changes)),
        pretrain=replace(recipe.pretrain, **changes),
        finetune=replace(recipe.finetune, **changes),
        evaluation=replace(recipe.evaluation, images=4 if options.tiny else 500),
    )
    if options.tiny:
        purifier = replace(recipe.purifier, options={"width": 4, "blocks": 1})
        recipe = replace(recipe, classifier=replace(recipe.classifier, name="small_cnn"), purifier=purifier)
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, protocol="quick"))
    budget = max(5, options.seconds - SLACK) if not options.tiny else 8
    report = run_recipe(recipe, options.out / "train", device=options.device, budget=float(budget), progress=False)
    verdicts = report["systems"]["finetuned"]
    plan = {stage: {k: v for k, v in found.items() if k != "seconds"} for stage, found in report["budget"].items()}
    lines = [f"{name}: {verdicts[name]}" for name in ("clean", "robust")]
    lines += [f"precision and graphs: {changes}", f"plan: {plan}"]
    return {"systems": report["systems"], "protocol": report["protocol"], "budget": report["budget"], "summary": lines}


def write(options: argparse.Namespace, numbers: dict[str, Any]) -> None:
    """Write what is known so far."""
    temporary = options.numbers.with_suffix(".part")
    temporary.write_text(json.dumps(numbers, default=str))
    temporary.replace(options.numbers)


DO: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "setup": setup,
    "ceilings": ceilings,
    "smoke": smoke,
    "tests": tests,
    "ops": lambda options: suite(options, "ops"),
    "steps": steps,
    "train": train,
    "attacks": lambda options: {} if options.tiny else suite(options, "attacks"),
    "evaluate": lambda options: {} if options.tiny else suite(options, "evaluate"),
    "finetune": lambda options: {} if options.tiny else suite(options, "finetune", quick=False),
    "sanitize": sanitize,
    **{name: functools.partial(part, write=write) for name, part in _gpu_attacks.PARTS.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(DO))
    for name in ("out", "numbers", "kit", "data"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--commit")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.device = "cpu" if options.tiny else "cuda"
    options.copies = (2**20,) if options.tiny else (2**26, 2**28, 2**30, 2**32)
    if numbers := DO[options.part](options):
        write(options, numbers)


if __name__ == "__main__":
    main()
