"""The command `atop-fast bench`: its cases are sound, and what it measures is what it says."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch

from atop_fast.bench import attacks, command, evaluate, finetune, harness, ops, results, scaling
from atop_fast.bench.harness import Case, Options, Roofline, measure, time_in_turns, with_peak
from atop_fast.bench.models import defense
from atop_fast.bench.plot import comparisons, draw_ratios, draw_scaling
from atop_fast.cli import main
from atop_fast.ops import _registry

# The peers emit warnings of their own on import and in use.
pytestmark = pytest.mark.filterwarnings("ignore")


class FixedRoofline(Roofline):
    """1 GB/s and 1 GFLOP/s."""

    def copy(self, nbytes):
        return 1e9

    def matmul(self, dtype):
        return 1e9


def case_of(run, ours=("atop_fast",), **options):
    return Case("suite", "case", "1x1", "float32", run, list(ours), **options)


def test_a_row_says_what_was_measured(monkeypatch):
    """The test sets the clock: on a busy machine, 10 ms of sleep last longer."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    run = {"peer": takes(0.02), "atop_fast": takes(0.01)}
    case = case_of(run, nbytes=10**6, flops=2 * 10**6, images=5, rounds=3)
    peer, ours = measure(case, "cpu", 0.0, FixedRoofline("cpu"))
    results.check_document({**results.metadata("cpu"), "rows": [peer, ours]})
    assert (peer["ours"], ours["ours"], ours["samples"]) == (False, True, 3)
    assert peer["ratio"] == 1
    assert ours["ratio"] == pytest.approx(2, rel=1e-3)
    # The operations bound it, not the bytes: 2 ms of the 10.
    assert ours["roofline"] == pytest.approx(0.2, rel=1e-3)
    assert ours["images_per_s"] == pytest.approx(500, rel=1e-3)
    (pair,) = comparisons([peer, ours])
    assert pair.ratio == pytest.approx(ours["ratio"], rel=1e-2)


def test_a_missing_peer_is_left_out_and_a_broken_one_of_ours_is_an_error(capsys):
    def broken():
        raise ImportError("not installed")

    rows = measure(case_of({"peer": broken, "atop_fast": lambda: None}, rounds=1), "cpu", 0.0, FixedRoofline("cpu"))
    assert [row["variant"] for row in rows] == ["atop_fast"]
    assert "no peer: ImportError: not installed" in capsys.readouterr().out
    with pytest.raises(ImportError):
        measure(case_of({"peer": lambda: None, "atop_fast": broken}, rounds=1), "cpu", 0.0, FixedRoofline("cpu"))


def test_what_is_not_equal_is_not_timed():
    run = {"eager": lambda: torch.full((3,), 2.0), "cpp": lambda: torch.tensor([2.0, 2.0, 2.002])}
    judge = harness.same_as_baseline(["cpp"], 1e-2)
    rows = measure(case_of(run, ["cpp"], judge=judge), "cpu", 0.0, FixedRoofline("cpu"))
    assert [row["difference"] for row in rows] == [0, pytest.approx(1e-3, rel=1e-2)]
    judge = harness.same_as_baseline(["cpp"], 1e-4)
    with pytest.raises(AssertionError, match=r"cpp differs from the baseline by 0\.001"):
        measure(case_of(run, ["cpp"], judge=judge), "cpu", 0.0, FixedRoofline("cpu"))


def test_functions_run_in_turns():
    order = []
    time_in_turns({name: lambda name=name: order.append(name) for name in "ab"}, "cpu", 0.0, rounds=3)
    assert "".join(order) == "ababab"


def test_slow_starters_are_warmed_up():
    calls = []
    measure(case_of({"atop_fast": lambda: calls.append(1)}, rounds=4, warm_up=9), "cpu", 0.0, FixedRoofline("cpu"))
    assert len(calls) == 9 + 4


@pytest.mark.gpu
def test_replays_are_timed_and_fall_back_to_calls(capsys):
    x = torch.zeros(2**24, device="cuda")
    run = {"eager": lambda: x + 1, "triton": lambda: x * 2}
    slow, fast = (
        measure(case_of(run, ["triton"], replays=replays), "cuda", 0.05, FixedRoofline("cuda"))[1]["median_s"]
        for replays in (False, True)
    )
    assert 0 < fast < 1.2 * slow
    run = {"eager": lambda: x.sum().item(), "triton": lambda: x * 2}
    assert len(measure(case_of(run, ["triton"], replays=True), "cuda", 0.05, FixedRoofline("cuda"))) == 2
    assert "calls are timed, not replays: test_bench.py" in capsys.readouterr().out


def test_peak_memory_is_that_of_the_call():
    result, small = with_peak(lambda: torch.ones(1000), "cpu")
    if small is None:
        pytest.skip("this system does not reset the peak of a process")
    _, large = with_peak(lambda: torch.ones(20 * 2**20), "cpu")
    assert len(result) == 1000
    assert small < 20
    assert 79 < large < 100


def test_the_roofline_is_of_this_machine():
    roofline = Roofline("cpu", seconds=0.0)
    assert 1e8 < roofline.copy(10**6) < 1e12
    assert 1e9 < roofline.matmul("float32") < 1e14
    assert set(roofline.rates) == {"copy 1048576", "matmul float32"}


@pytest.fixture
def tiny(monkeypatch):
    """Small networks instead of a ResNet-18 and trained ones."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.Flatten(), torch.nn.LazyLinear(10))
    model(torch.rand(1, 3, 32, 32))
    gray = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10))
    for module in (model, gray):
        module.eval().requires_grad_(False)
    x = torch.rand(64, 1, 32, 32)
    monkeypatch.setattr(evaluate, "defense", lambda model, channels, width, device: defense(model, channels, 4, device))
    for suite in (attacks, evaluate):
        monkeypatch.setattr(suite, "resnet18", lambda device: model)
        monkeypatch.setattr(suite, "digits", lambda device: (gray, x, gray(x).argmax(dim=1)))


@pytest.mark.slow
@pytest.mark.parametrize("suite", [attacks, evaluate])
def test_attacks_of_all_libraries_do_the_same_work(tiny, suite):
    """Every peer that is installed runs, and what the variants leave is alike."""
    for case in suite.cases(Options(quick=True)):
        outputs = {name: function() for name, function in case.run.items()}
        quality = case.judge(outputs)
        accuracies = [quality[name]["accuracy"] for name in case.run]
        assert max(accuracies) - min(accuracies) <= 0.1, (case.name, quality)
        # Nearly linear networks: the same steps lead to the same images, but for signs of gradients near 0.
        if case.name.startswith("PGD-10"):
            for name, adversarial in outputs.items():
                same = (adversarial - outputs["plain"]).abs() < 1e-4
                assert same.float().mean() > (0.9 if "bfloat16" in name else 0.99), name


def test_plain_networks_are_ours():
    """The baselines compute what our networks do, from the same weights: their gradients are the same."""
    case = finetune.step_case("unet", (2, 32), Options(), ["plain", "atop_fast"])
    quality = case.judge({name: function() for name, function in case.run.items()})
    assert quality["atop_fast"]["difference"] < 1e-3
    # The purifier forward and backward, the discriminator twice, the classifier three times.
    assert case.flops > 3 * 2 * 2 * 0.5e9


def test_op_cases_of_a_quick_run_have_distinct_names_and_no_compile():
    cases = list(islice(ops.cases(Options(quick=True)), 2))
    assert len({case.name for case in cases}) == 2
    assert all("compile" not in case.run and case.ours for case in cases)


@pytest.mark.skipif("cpp" in _registry.MISSING, reason="no native build")
def test_a_variant_of_another_backend_is_timed_with_that_owner():
    seen = []
    function = lambda: seen.append(_registry.owner("gated", "cpu"))  # noqa: E731
    assert harness.by_backend("gated", "cpu", function) == {"cpp": function}
    with _registry.owned_by("eager", ["gated"], "cpu"):
        variants = harness.by_backend("gated", "cpu", function)
        assert list(variants) == ["cpp"]
        time_in_turns({"ours": function, **variants}, "cpu", 0.0, rounds=2)
        assert seen == ["eager", "cpp"] * 2
        variants["cpp"]()
    assert seen[-1] == "cpp"


def test_cases_of_a_gpu_have_no_kernel_of_the_cpu(monkeypatch):
    """C++ given memory of a GPU would end the process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in _registry.OPS:
        assert set(ops._impls(name, "cuda")) <= {"cuda", "triton"}
        assert set(harness.by_backend(name, "cuda", lambda: None)) <= {"cuda", "triton"}


def test_a_quick_run_on_a_gpu_has_large_cases_and_replays(monkeypatch):
    sizes = [("a", 10), ("a", 40), ("a", 160), ("b", 99), ("a", 300), ("b", 100)]

    def all_cases(device, quick):
        for name, nbytes in sizes:
            case = Case("ops", name, str(nbytes), "float32", {"eager": int, "triton": int}, ["triton"], nbytes)
            yield from (case, replace(case, dtype="bfloat16"))

    monkeypatch.setattr(ops, "all_cases", all_cases)
    for device, expected in (("cuda", ["10", "160", "99"]), ("cpu", ["10", "99"])):
        found = list(ops.cases(Options(device, quick=True)))
        assert [case.shape for case in found] == expected
        assert all(case.replays and case.dtype == "float32" for case in found)


def test_command_writes_results_and_pictures(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops, "all_cases", lambda device, quick: islice(ops.pgd_cases(device, quick), 1))
    path, picture = tmp_path / "new" / "found.json", tmp_path / "found.png"
    main(["bench", "ops", "--quick=true", f"--json={path}", f"--plot={picture}"])
    document = results.read(path)
    assert {row["case"] for row in document["rows"]} == {"pgd_step_linf forward"}
    assert [row["difference"] for row in document["rows"]] == [0, 0]
    assert document["roofline"]
    assert picture.read_bytes()[1:4] == b"PNG"
    assert "pgd_step_linf forward" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "everything"])
    assert stopped.value.code == 2


def test_a_failure_costs_no_other_case(monkeypatch, tmp_path):
    """Results are written immediately, and float32 is computed without TF32, also while cases are constructed."""
    written, precisions = [], []

    def compute():
        precisions.append(torch.backends.cudnn.conv.fp32_precision)
        return torch.ones(2)

    def wrong(outputs):
        raise AssertionError("cpp differs")

    def cases(options):
        compute()
        good = case_of({"eager": compute, "cpp": compute}, ["cpp"], rounds=1)
        yield replace(good, name="first")
        yield replace(good, name="second", judge=wrong)
        assert written[-1] == 2
        yield replace(good, name="third")
        raise ImportError("no peer")

    write = results.write
    monkeypatch.setattr(results, "write", lambda path, found: (write(path, found), written.append(len(found["rows"]))))
    monkeypatch.setattr(ops, "cases", cases)
    path = tmp_path / "found.json"
    said = "bench: not measured: second, 1x1: AssertionError: cpp differs; ops: ImportError: no peer"
    with pytest.raises(RuntimeError, match=re.escape(said)):
        command.bench("ops", json=str(path))
    document = results.read(path)
    assert [row["case"] for row in document["rows"]] == ["first", "first", "third", "third"]
    assert len(document["failures"]) == 2
    assert written == [2, 2, 4, 4]
    assert set(precisions) == {"ieee"}


def test_pictures_show_every_line(tmp_path):
    row = dict.fromkeys(results.ROW) | {"suite": "ops", "case": "a b", "shape": "1", "dtype": "float32", "ratio": 1.0}
    rows = [
        {**row, "variant": variant, "ours": ours, "median_s": 1.0}
        for variant, ours in (("eager", False), ("cpp", True))
    ]
    scaled = [
        {**row, "suite": "scaling", "case": "PGD x EOT by draws", "shape": f"{n} draws", "variant": "atop_fast",
         "ours": True, "median_s": n / 10, "peak_mib": 5.0 * n}
        for n in (1, 2, 4)
    ]  # fmt: skip
    document = {**results.metadata("cpu"), "rows": rows + scaled}
    for draw, name in ((draw_ratios, "ratios.svg"), (draw_scaling, "scaling.svg")):
        draw(document, tmp_path / name)
    assert "a b" in (tmp_path / "ratios.svg").read_text() or (tmp_path / "ratios.svg").stat().st_size > 5000
    assert (tmp_path / "scaling.svg").stat().st_size > 5000


def test_axes_of_scaling_vary_one_quantity():
    cases = list(scaling.cases(Options(quick=True)))
    names = [case.name for case in cases]
    assert names == [f"PGD x EOT by {axis}" for axis in scaling.AXES for _ in range(2)] + ["evaluation by processes"]
    assert cases[-1].own_clock


def test_metadata_names_peers_and_commit():
    found = results.metadata("cpu", "abc")
    assert found["commit"] == "abc"
    assert json.dumps(found)
    assert found["versions"]["torch"] == torch.__version__
    assert command.SUITES == ("ops", "attacks", "evaluate", "finetune", "scaling")
