"""Updates as graphs: what is captured, what a replay reads again, and what runs eagerly instead.

A GPU is not needed to see most of it: a tape of the operators of a run stands in for its graph.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
import warnings

import pytest
import torch
from tape import TapeRecorder, look_at_no_classes
from torch import nn

from atop_fast import RT2, Defense, FinetuneConfig, build_classifier, build_purifier
from atop_fast._core.capture import WARM_UP
from atop_fast._core.waits import watched
from atop_fast.purifiers import SNPatchDiscriminator
from atop_fast.randomness import derive_seed, seeded
from atop_fast.training import ClassifierConfig, ClassifierStep, Feed, FinetuneStep, Step, TrainingConfig, fit

X = torch.rand(24, 1, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 4


def recorded(step):
    """The step with tapes instead of CUDA graphs; attack_loss checks classes only of CPU tensors."""
    step.replayed.recorder, step.replayed.missing = TapeRecorder(), None
    return step


@pytest.fixture(autouse=True)
def no_look_at_classes(monkeypatch):
    look_at_no_classes(monkeypatch)


def finetuning(network=None, device="cpu", **options):
    with seeded(0):
        channels = 1 if network is None else 3
        classifier = build_classifier("small_cnn", channels=channels, classes=4).eval().requires_grad_(False)
        network = network or build_purifier("unet", channels=1, width=4)
        discriminator = SNPatchDiscriminator(channels, 4, 2)
    for module in (classifier, network, discriminator):
        module.to(device)
    config = FinetuneConfig(**{"epochs": 2, "batch_size": 8, "eps": 0.1, "steps": 2, "lr": 1e-3, **options})
    step = FinetuneStep(Defense(RT2(4, sigma=0.1), network, classifier), discriminator, config, 0)
    for module in step.modules.values():
        module.train()
    return step


def weights(step):
    return torch.cat([p.detach().flatten() for module in step.modules.values() for p in module.parameters()])


def updates(step, count=8):
    """Updates whose images, epochs, shares and learning rates all change; the logs of each."""
    logs = []
    for i in range(count):
        rows = torch.arange(8) + 5 * (i % 3)
        step.set_rate(1e-3 / (1 + i))
        x, y, ids = (t.to(step.device) for t in (X[rows], Y[rows], rows))
        logs.append(step(x, y, ids, i // 2, 1.0 if i % 2 else 0.5))
    return logs


CASES = {
    "fgsm": {"attack": "fgsm", "attacked": "classifier", "target": "adversarial"},
    "fgsm-rs": {"attack": "fgsm-rs", "norm": "L2", "clip": 0.05},
    "pgd": {"attack": "pgd", "adversarial_share": 0.5, "eot_iter": 2, "accumulate": 3},
    "apgd": {"attack": "apgd", "precision": "bfloat16"},
    "apgd-l1": {"attack": "apgd", "norm": "L1", "eps": 5.0, "gan_weight": 0.0},
    "folded": {"attack": "pgd", "steps": 8, "gan_weight": 0.0},
    "float16": {"attack": "fgsm", "precision": "float16"},
}


# Variants of apgd and pgd, of which the first tier has others.
SECOND = ("apgd-l1", "folded")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SECOND else ()) for name in CASES]
)
def test_a_replay_is_what_an_eager_update_is(name):
    """Bit for bit, with new images, ids, epoch, share and learning rate: none may be baked into the graph."""
    eager, replayed = finetuning(**CASES[name]), recorded(finetuning(**CASES[name]))
    expected, found = updates(eager), updates(replayed)
    recorder = replayed.replayed.recorder
    assert (recorder.runs, recorder.records, recorder.replays) == (WARM_UP, 1, 8 - WARM_UP)
    assert replayed.replayed.path == "CUDA graph"
    assert eager.replayed.path == "eager (no GPU)"
    assert found == expected
    assert torch.equal(weights(replayed), weights(eager))
    assert len({float(logs["l1"]) for logs in found}) == 8


def test_the_classifier_is_trained_by_replays():
    def make():
        with seeded(0):
            network = build_classifier("small_cnn", channels=1, classes=4)
        return ClassifierStep(network.train(), ClassifierConfig(augment=True), 0)

    eager, replayed = make(), recorded(make())
    assert updates(replayed) == updates(eager)
    assert torch.equal(weights(replayed), weights(eager))
    assert replayed.replayed.recorder.replays == 5


def test_deepfill_is_recorded_too():
    """Its first replay is the recording itself: what is looked at here is that nothing is forbidden."""
    with seeded(0):
        step = recorded(finetuning(network=build_purifier("deepfill_v2", cnum=8)))
    recorder, images = step.replayed.recorder, torch.rand(1, 3, 64, 64)
    for work in (recorder.run, recorder.record):
        work(lambda: step._update(images, Y[:1], torch.arange(1)))
    assert recorder.records == 1


class Line(Step):
    """A number, pulled to the images' mean; `stage` from epoch 2 on is another."""

    def __init__(self, device="cpu", **options):
        super().__init__({"line": nn.Linear(1, 1, device=device)}, TrainingConfig(**options), (0.9, 0.999))
        self.calls = 0

    def prepare(self, epoch):
        return epoch >= 2

    def losses(self, x, y, ids, epoch):
        self.calls += 1
        loss = self.modules["line"](x.mean((1, 2, 3))[:, None]).square().mean()
        self.update(loss, "line")
        return {"loss": loss}


def test_every_form_has_a_recording_of_its_own_and_a_stage_ends_those_before():
    step = recorded(Line())
    whole, rest = torch.arange(8), torch.arange(3)
    for ids in [whole, rest] * (WARM_UP + 2):
        step(X[ids], Y[ids], ids, 0)
    recorder = step.replayed.recorder
    assert (recorder.runs, recorder.records, recorder.replays) == (2 * WARM_UP, 2, 4)
    # The Python code of a captured update runs once.
    assert step.calls == 2 * (WARM_UP + 1)
    step(X[whole], Y[whole], whole, 2)
    assert recorder.runs == 2 * WARM_UP + 1
    assert len(step.replayed.graphs) == 1


def test_results_outlive_the_next_update_and_inputs_are_left_alone():
    step = recorded(Line())
    ids, before = torch.arange(8), X.clone()
    logs = [step(X[:8], Y[:8], ids, 0)["loss"] for _ in range(WARM_UP + 3)]
    assert len({float(loss) for loss in logs}) == len(logs)
    assert torch.equal(X, before)


def test_what_cannot_be_recorded_runs_eagerly_and_says_why_once(capsys):
    class Looking(Line):
        def losses(self, x, y, ids, epoch):
            if float(x.sum()) < 0:
                raise AssertionError
            return super().losses(x, y, ids, epoch)

    with seeded(0):
        step, plain = recorded(Looking(epochs=3, batch_size=8)), Line(epochs=3, batch_size=8)
    plain.modules["line"].load_state_dict(step.modules["line"].state_dict())
    feed = Feed("test", X, Y, step.device, workers=0)
    fit("test", step, feed, seed=0)
    said = [line for line in capsys.readouterr().err.splitlines() if "updates run as" in line]
    assert len(said) == 1
    assert "eager (not captured: aten._local_scalar_dense" in said[0]
    fit("test", plain, feed, seed=0)
    assert torch.equal(weights(step), weights(plain))
    said = [line for line in capsys.readouterr().err.splitlines() if "updates run as" in line]
    assert len(said) == 1
    assert said[0].endswith("test: updates run as eager (no GPU)")


def test_what_waits_for_the_gpu_is_not_recorded(monkeypatch):
    """torch's warnings of the last warm-up tell; the first cause is said, and every update is done once."""

    class Warned(TapeRecorder):
        def rehearse(self, work):
            return watched(lambda: self.run(work))

    class Looking(Line):
        def losses(self, x, y, ids, epoch):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("another matter", stacklevel=1)
            return super().losses(x, y, ids, epoch)

    def set_mode(mode):
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=2)

    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with seeded(0):
        step, plain = recorded(Looking()), Line()
    plain.modules["line"].load_state_dict(step.modules["line"].state_dict())
    recorder = step.replayed.recorder = Warned()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        updates(step)
    updates(plain)
    assert (recorder.runs, recorder.records) == (WARM_UP, 0)
    line = inspect.getsourcelines(Looking.losses)[1] + 1
    assert step.replayed.path == f"eager (not captured: test_capture.py:{line} waits for the GPU)"
    assert modes == ["warn", 0]
    assert [str(w.message) for w in said].count("another matter") == 8
    assert {str(w.message) for w in said} == {"another matter", "called a synchronizing CUDA operation"}
    assert torch.equal(weights(step), weights(plain))


def test_graphs_can_be_switched_off():
    step = recorded(Line(graphs=False))
    updates(step)
    assert step.replayed.path == "eager (graphs=False)"
    assert not step.replayed.recorder.records


def test_several_processes_run_eagerly_and_say_why(monkeypatch):
    alone = types.SimpleNamespace(size=2, rank=0, add_up=lambda tensors: None)
    monkeypatch.setattr("atop_fast.training.step.Group", lambda: alone)
    step = recorded(Line())
    updates(step)
    assert step.replayed.path == "eager (several processes, whose sums of gradients are not tested in CUDA graphs)"
    assert not step.replayed.recorder.records


def test_the_environment_can_switch_graphs_off(monkeypatch):
    monkeypatch.setenv("ATOP_FAST_GRAPHS", "0")
    step = recorded(Line())
    updates(step)
    assert step.replayed.path == "eager (ATOP_FAST_GRAPHS=0)"
    monkeypatch.setenv("ATOP_FAST_GRAPHS", "updates")
    updates(step)
    assert step.replayed.path == "CUDA graph"


def test_a_seed_in_a_tensor_derives_as_a_number():
    for seed in (0, -1, 2**63 - 1):
        assert derive_seed(torch.tensor(seed), "direction", 5) == derive_seed(seed, "direction", 5)


def test_tf32_is_float32_without_a_gpu():
    steps = [finetuning(precision=precision) for precision in ("float32", "tf32")]
    assert updates(steps[0], 2) == updates(steps[1], 2)
    assert torch.equal(*map(weights, steps))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_cuda_graph_is_what_eager_updates_are(name, monkeypatch):
    """To rounding: the order of some sums on a GPU is not fixed."""
    # Adam divides by the size of gradients: if they are small, rounding differences change a weight a lot.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    steps = []
    for graphs in (False, True):
        step = finetuning(device="cuda", graphs=graphs, **CASES[name])
        steps.append((updates(step), weights(step), step.replayed.path))
    (expected, before, _), (found, after, path) = steps
    assert path == "CUDA graph"
    for a, b in zip(expected, found, strict=True):
        assert {k: float(v) for k, v in b.items()} == pytest.approx({k: float(v) for k, v in a.items()}, rel=2e-2)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
def test_a_look_at_values_on_a_gpu_ends_in_eager_updates():
    class Looking(Line):
        def losses(self, x, y, ids, epoch):
            assert float(x.sum()) > 0
            return super().losses(x, y, ids, epoch)

    step = Looking(device="cuda")
    ids = torch.arange(8, device="cuda")
    for _ in range(WARM_UP + 2):
        step(X[:8].cuda(), Y[:8].cuda(), ids, 0)
    assert step.replayed.path.startswith("eager (not captured: ")


@pytest.mark.gpu
def test_random_numbers_outlive_a_network_that_cannot_be_recorded():
    """In a process of its own: a recording that was broken off would leave the GPU's generator unusable."""
    program = """
import torch
from torch import nn
from atop_fast.training import ClassifierConfig, ClassifierStep

class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.line = nn.Dropout(0.5), nn.Linear(256, 4)

    def forward(self, x):
        x = self.drop(x.flatten(1))
        assert x.sum().item() > -1
        return self.line(x)

step = ClassifierStep(Looking().cuda().train(), ClassifierConfig(), 0)
x, y = torch.rand(8, 1, 16, 16, device="cuda"), torch.arange(8, device="cuda") % 4
for _ in range(5):
    step(x, y, torch.arange(8, device="cuda"), 0)
torch.rand(8, device="cuda")
print(step.replayed.path)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "waits for the GPU" in done.stdout
