"""benchmarks/gpu.py without a GPU: its order, limits of time and exit codes; and a rehearsal on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
# Imports as on a machine that has torch and little else; packages that were brought are found in the folder BROUGHT.
BLOCKED = """
import os, sys
from importlib.machinery import PathFinder

BROUGHT = ("jsonargparse", "docstring_parser", "typeshed_client")
MISSING = ("mlxtend", "torchattacks", "pyautoattack", "foolbox", "eagerpy", "art", "kornia", "robustbench")

class Blocked(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in MISSING:
            return None
        return PathFinder.find_spec(name, [os.environ["BROUGHT"]] if name in BROUGHT else path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Blocked
"""


@pytest.fixture(scope="module")
def gpu():
    """The driver as a module."""
    spec = importlib.util.spec_from_file_location("gpu_driver", ROOT / "benchmarks" / "gpu.py")
    module = sys.modules["gpu_driver"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def driver(gpu, monkeypatch, tmp_path):
    """Calls of the driver whose parts are stand-ins: what each ends with, and how long it takes on its own clock."""
    now, begun = [0.0], []
    monkeypatch.setattr(gpu, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu, "sees_gpu", lambda: True)

    def call(*options, ends=None, takes=None):
        begun.clear()

        def limited(command, seconds, log, environment):
            name = command[2]
            needed = (takes or {}).get(name, 1)
            begun.append((name, seconds))
            now[0] += min(needed, seconds)
            numbers = Path(next(w for w in command if w.startswith("--numbers=")).partition("=")[2])
            numbers.write_text('{"summary": ["!"]}')
            if name == "ops":
                numbers.with_suffix(".rows").write_text("measured")
            return None if needed > seconds else (ends or {}).get(name, 0)

        monkeypatch.setattr(gpu, "limited", limited)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "run", f"--out={tmp_path / 'out'}", *options])
        return gpu.main(), begun.copy()

    return call


def test_parts_run_in_order_and_once(gpu, driver, tmp_path):
    code, begun = driver("--commit=abc", f"--pack={tmp_path / 'pack'}")
    assert code == 0
    assert [name for name, _ in begun] == [part.name for part in gpu.PARTS]
    assert all(5 <= seconds <= part.limit for part, (_, seconds) in zip(gpu.PARTS, begun, strict=True))
    found = json.loads((tmp_path / "out" / "parts" / "ops.json").read_text())
    assert (found["status"], found["commit"], found["numbers"]) == ("ok", "abc", {"summary": ["!"]})
    lines = (tmp_path / "pack" / "summary.txt").read_text().splitlines()
    assert len(lines) <= gpu.SUMMARY_LINES
    assert sum(" ok, 1" in line for line in lines) == len(gpu.PARTS)
    with tarfile.open(tmp_path / "pack" / "results.tar.gz") as archive:
        assert archive.extractfile("results/ops--cuda.json").read() == b"measured"
        assert {f"parts/{part.name}.json" for part in gpu.PARTS} < set(archive.getnames())
    assert driver() == (0, [])


def test_what_failed_or_is_missing_runs_again(gpu, driver, tmp_path):
    code, begun = driver("--seconds=500", ends={"smoke": 1}, takes={"ops": 10**6, "train": 10**6})
    assert code == 1
    assert [name for name, _ in begun] == [part.name for part in gpu.PARTS]
    statuses = [json.loads((tmp_path / "out" / "parts" / f"{name}.json").read_text())["status"] for name, _ in begun]
    assert statuses == ["ok", "ok", "failed", "ok", "timeout", "ok", "timeout", *(len(gpu.PARTS) - 7) * ["ok"]]
    code, begun = driver("--parts=smoke,tests,ops,train")
    assert code == 0
    assert [name for name, _ in begun] == ["smoke", "ops", "train"]


def test_the_training_keeps_its_time(gpu, driver, tmp_path):
    """Parts before it may not take what it needs, and a part that has no time left is missing, not failed."""
    limits = {part.name: part.limit for part in gpu.PARTS}
    code, begun = driver("--seconds=500", takes={"tests": 10**6, "smoke": 90, "train": 300})
    assert dict(begun)["train"] == limits["train"]
    assert dict(begun)["tests"] == 500 - 92 - limits["train"]
    assert code == 1
    assert "ops" not in dict(begun)
    assert driver("--seconds=3", "--parts=evaluate", f"--out={tmp_path / 'other'}") == (gpu.TIME_OVER, [])


def test_nothing_goes_on_without_libraries(driver):
    code, begun = driver(ends={"setup": 1})
    assert (code, [name for name, _ in begun]) == (1, ["setup"])


def test_no_gpu_and_wrong_arguments(gpu, driver, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        driver("--parts=all")
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        driver("--kit=/nowhere")
    assert stopped.value.code == 2
    monkeypatch.setattr(gpu, "sees_gpu", lambda: False)
    assert driver() == (gpu.NO_GPU, [])


def test_a_log_that_was_cut_off_is_counted(gpu):
    log = "\n".join((
        "tests/a.py::test_one[x y] PASSED                         [ 10%]",
        "tests/a.py::test_two SKIPPED (no GPU)                     [ 20%]",
        "[gw3] [ 30%] PASSED tests/a.py::test_three ",
        "[gw3] [ 40%] FAILED tests/a.py::test_four[cuda-fp32] ",
        "FAILED tests/a.py::test_four[cuda-fp32] - AssertionError",
        "tests/a.py::test_five ",
    ))  # fmt: skip
    names = ["tests/a.py::test_four[cuda-fp32]"]
    assert gpu.tests_in(log) == {"passed": 2, "skipped": 1, "failed": 1, "names": names}
    assert gpu.tests_in("no tests") == {}


@pytest.mark.slow
def test_a_part_is_ended_with_its_children(gpu, tmp_path):
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    with open(tmp_path / "log", "w") as log:
        assert gpu.limited([sys.executable, "-c", code], 1.0, log, dict(os.environ)) is None
        assert gpu.limited([sys.executable, "-c", "raise SystemExit(7)"], 60.0, log, dict(os.environ)) == 7
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """All parts on the CPU with what `prepare` brings, and the packages missing that a GPU machine may lack."""
    driver, kit, out, pack = ROOT / "benchmarks" / "gpu.py", tmp_path / "kit", tmp_path / "out", tmp_path / "pack"
    images = pytest.importorskip("PIL.Image")
    linked = (ROOT / "atop_fast" / "kernels").exists()
    for i in range(64):
        folder = tmp_path / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        images.fromarray(pixels).save(folder / f"{i}.jpg")
    subprocess.run([sys.executable, driver, "prepare", kit, "--as-built", f"--data={tmp_path / 'images'}"], check=True)
    assert (kit / "images.tar.xz").stat().st_size < 0.7 * sum(p.stat().st_size for p in folder.parent.rglob("*.jpg"))
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(BLOCKED)
    paths = f"{tmp_path / 'path'}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths, "BROUGHT": str(out / "site")}
    command = [sys.executable, driver, "run", "--rehearse", "--seconds=5000"]
    command += [f"--kit={kit}", f"--out={out}", f"--pack={pack}"]
    done = subprocess.run([*command, "--commit=abc"], env=environment, capture_output=True, text=True, check=False)
    logs = {path.stem: path.read_text()[-2000:] for path in (out / "parts").glob("*.log")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    found = {path.stem: json.loads(path.read_text()) for path in (out / "parts").glob("*.json")}
    assert {name: part["status"] for name, part in found.items()} == dict.fromkeys(found, "ok")
    assert found["setup"]["numbers"]["missing"] == [
        "torchattacks",
        "pyautoattack",
        "foolbox",
        "art",
        "kornia",
        "mlxtend",
    ]
    assert min(found["ceilings"]["numbers"]["rates"].values()) > 0
    for part in ("smoke", "tests"):
        assert found[part]["tests"]["passed"] > 0
        assert found[part]["tests"]["failed"] == 0
    assert {row["case"] for row in found["ops"]["numbers"]["document"]["rows"]} == {"pgd_step_linf forward"}
    assert found["steps"]["numbers"]["pgd"][0]["eager_ms"] > 0
    assert found["setup"]["numbers"]["data"] == str(out / "data")
    assert all(row["eager_ms"] > 0 for row in found["replays"]["numbers"]["steps"])
    assert found["eot"]["numbers"]["eot"][0]["seconds of all steps"] > 0
    assert found["autoattack"]["numbers"]["autoattack"]["standard"]["accuracy"]["square"] >= 0
    assert len(found["deepfill"]["numbers"]["deepfill"]) == 2
    assert (ROOT / "atop_fast" / "kernels").exists() == linked, "installed, so no link is needed; mypy would follow it"
    assert 0 <= found["train"]["numbers"]["systems"]["finetuned"]["robust"]["mean"] <= 1
    assert len(done.stdout.split("commit abc")[1].splitlines()) <= 40
    assert {path.name for path in pack.iterdir()} == {
        "summary.txt", "results.tar.gz", "defense.safetensors", "report.html", "report.json",
    }  # fmt: skip
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (again.returncode, "==>" in again.stdout) == (0, False)
