"""project_l1 and pgd_step_l1: the harness, and what is special to them."""

from __future__ import annotations

import importlib
import math

import _harness as harness
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast import ops
from atop_fast.ops import _registry

# The package exports the functions under the names of their modules.
project_module = importlib.import_module("atop_fast.ops.project_l1")
step_module = importlib.import_module("atop_fast.ops.pgd_step_l1")
NAMES = ("project_l1", "pgd_step_l1")
EPS = 1.5
SHAPES = ((0, 3), (1,), (5,), (2, 3, 0, 5), (3, 4097), (3, 7, 5), (2, 3, 9, 7))


def sample(shape, dtype=torch.float32, spread=0.3):
    x0 = torch.rand(shape, dtype=dtype, device=DEVICE)
    return x0 + spread * torch.randn(shape, dtype=dtype, device=DEVICE), x0


def lengths(t):
    return t.abs()[:, None].flatten(1).sum(dim=1)


def run(backend, call, *arguments):
    with harness.owned_by(backend, NAMES):
        return call(*arguments)


@pytest.mark.usefixtures("poisoned_memory")
@cases(op="project_l1", dtype=(torch.float32, torch.float64), shape=SHAPES)
def test_projection_matches_formula(backend, dtype, shape):
    x, x0 = sample(shape, dtype)
    for eps in (0.0, 0.1, EPS, 1e3, torch.rand(shape[0], dtype=dtype, device=DEVICE)):
        expected = project_module.formula(x.double(), x0.double(), eps).to(dtype)
        atol = 1e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(run(backend, ops.project_l1, x, x0, eps), expected, rtol=0, atol=atol)


@cases(op="project_l1", eps=(0.5, 3.0, 12.0))
def test_projection_matches_autoattack(backend, eps):
    autopgd = pytest.importorskip("pyautoattack.autopgd_base")
    x0 = torch.rand(6, 3, 16, 16)
    x = x0 + torch.randn(x0.shape) * torch.tensor([0.01, 0.03, 0.1, 0.3, 0.02, 0.05]).view(-1, 1, 1, 1)
    expected = x + autopgd.L1_projection(x0, x - x0, eps)
    actual = run(backend, ops.project_l1, x.to(DEVICE), x0.to(DEVICE), eps).cpu()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@cases(op="project_l1", eps=(0.0, 0.3, EPS))
def test_projection_is_the_nearest_point(backend, eps):
    """It lies in both sets, is its own projection, and no other point of them is nearer: (x - p) . (q - p) <= 0."""
    x, x0 = sample((8, 3, 6, 6), torch.float64)
    p = run(backend, ops.project_l1, x, x0, eps)
    assert (lengths(p - x0) <= eps * (1 + 1e-12) + 1e-12).all()
    assert 0 <= p.min() <= p.max() <= 1
    torch.testing.assert_close(run(backend, ops.project_l1, p, x0, eps), p, rtol=0, atol=1e-12)
    for _ in range(20):
        q = (x0 + torch.randn_like(x0) * (torch.rand_like(x0) < 0.1)).clamp(0, 1)
        q = x0 + (q - x0) * (eps / lengths(q - x0).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)
        assert (((x - p) * (q - p)).flatten(1).sum(dim=1) <= 1e-9).all()


@cases(op="project_l1", layout=harness.LAYOUTS, shape=((2, 3, 9, 7), (3, 7, 5)))
def test_layouts_and_draws(backend, layout, shape):
    x, x0 = (harness.in_layout(t, layout) for t in sample(shape))
    actual = run(backend, ops.project_l1, x, x0, EPS)
    torch.testing.assert_close(actual, project_module.formula(x, x0, EPS), rtol=0, atol=1e-6)
    assert actual.stride() == torch.empty_like(x).stride()
    k = torch.tensor([3, 10, 400][: shape[0]], device=DEVICE)
    for grad in (torch.randn(shape, device=DEVICE), torch.randn((3, *shape), device=DEVICE)):
        alpha = torch.rand(shape[0], device=DEVICE)
        actual = run(backend, ops.pgd_step_l1, x, grad, x0, alpha, EPS, k)
        assert actual.stride() == torch.empty_like(x).stride()
        torch.testing.assert_close(actual, step_module.formula(x, grad, x0, alpha, EPS, k), rtol=0, atol=1e-6)


@cases(op="project_l1", k=(1, 20, 10**6))
def test_step_matches_formula(backend, k):
    for shape in ((4, 3, 8, 8), (5,), (0, 3), (2, 0)):
        x, x0 = sample(shape, spread=0.02)
        grad = torch.randn(shape, device=DEVICE)
        actual = run(backend, ops.pgd_step_l1, x, grad, x0, 1.0, EPS, k)
        torch.testing.assert_close(actual, step_module.formula(x, grad, x0, 1.0, EPS, k), rtol=0, atol=1e-6)


@cases(op="project_l1")
def test_step_matches_autoattack(backend):
    """The L1 branch of APGDAttack.attack_single_run: its first steps on a linear model."""
    autopgd = pytest.importorskip("pyautoattack.autopgd_base")
    x0, weight = torch.rand(5, 3, 8, 8), torch.randn(10, 192)
    points = []

    def model(x):
        points.append(x.detach().clone())
        return x.flatten(1) @ weight.T

    labels = model(x0).argmax(dim=1)
    attack = autopgd.APGDAttack(model, n_iter=60, norm="L1", eps=3.0, seed=0, loss="ce", device="cpu")
    attack.init_hyperparam(x0)
    points.clear()
    attack.attack_single_run(x0, labels)
    # The share of the entries and the step size stay what they are until the first checkpoint, after 2 steps.
    k = 192 - int((1 - 0.2) * 192)
    for i in range(2):
        leaf = points[i].clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf.flatten(1) @ weight.T, labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, leaf)
        tensors = (t.to(DEVICE) for t in (points[i], grad, x0))
        moved = run(backend, ops.pgd_step_l1, *tensors, 3.0, 3.0, torch.full((5,), k, device=DEVICE))
        torch.testing.assert_close(moved.cpu(), points[i + 1], rtol=0, atol=1e-5)


@cases(op="project_l1")
def test_only_the_largest_entries_move(backend):
    x0 = torch.full((2, 30), 0.5, device=DEVICE)
    grad = torch.randperm(60, device=DEVICE).view(2, 30).float() - 29.5
    moved = run(backend, ops.pgd_step_l1, x0, grad, x0, 0.4, 1.0, torch.tensor([4, 1], device=DEVICE))
    for i, k in enumerate((4, 1)):
        expected = torch.zeros(30, device=DEVICE)
        top = grad[i].abs().topk(k).indices
        ties = grad[i].abs() >= grad[i].abs()[top].min()
        expected[ties] = grad[i].sign()[ties] * 0.4 / ties.sum()
        torch.testing.assert_close(moved[i] - x0[i], expected)


@cases(op="project_l1")
def test_zero_gradient_and_odd_values(backend):
    x, x0 = sample((3, 3, 5, 5), spread=0.01)
    x = x.clamp(0, 1)
    grad = torch.randn_like(x)
    inside = run(backend, ops.pgd_step_l1, x, torch.zeros_like(grad), x0, 1.0, 10.0, 5)
    assert torch.equal(inside, x)
    grad[1, 0, 0, :2] = torch.tensor([math.nan, math.inf], device=DEVICE)
    actual = run(backend, ops.pgd_step_l1, x, grad, x0, 1.0, EPS, 5)
    torch.testing.assert_close(actual, step_module.formula(x, grad, x0, 1.0, EPS, 5), rtol=0, atol=1e-6)
    x[1, 0, 0, 0], x[2, 0, 0, 0] = math.nan, math.inf
    projected = run(backend, ops.project_l1, x, x0, EPS)
    assert projected[1].isnan().all()
    assert projected[::2].isfinite().all()
    torch.testing.assert_close(projected, project_module.formula(x, x0, EPS), rtol=0, atol=1e-6, equal_nan=True)


@cases(op="project_l1", traced={})
def test_opcheck(backend, parts):
    x, x0 = sample((2, 3, 4))
    values, k = torch.rand(2, device=DEVICE), torch.tensor(3, device=DEVICE)
    with harness.owned_by(backend, NAMES):
        harness.opcheck(project_module.STEP.op, (x, x0, 0.0, values), parts)
        harness.opcheck(step_module.STEP.op, (x, x, x0, 0.0, 0.0, 1, values, values, k), parts)


def test_compiles_once_for_all_numbers():
    torch._dynamo.reset()
    compiled = torch.compile(ops.pgd_step_l1, fullgraph=True, backend="aot_eager")
    x, x0 = sample((3, 3, 4))
    for i, backend in enumerate(2 * harness.backends("pgd_step_l1")):
        numbers = (*torch.rand(2, 3, device=DEVICE), torch.randint(1, 9, (3,), device=DEVICE))
        stance = torch.compiler.set_stance("fail_on_recompile" if i else "default")
        with harness.owned_by(backend, NAMES), stance:
            assert torch.equal(compiled(x, x, x0, *numbers), ops.pgd_step_l1(x, x, x0, *numbers)), backend


def test_refuses_gradients():
    x, x0 = sample((2, 3))
    with pytest.raises(ValueError, match="project_l1: x must be a tensor that does not require grad"):
        ops.project_l1(x.requires_grad_(), x0, EPS)
    with pytest.raises(ValueError, match="pgd_step_l1: x must be a tensor that does not require grad"):
        ops.pgd_step_l1(x, x0, x0, 1.0, EPS, 3)


@cases(op="project_l1")
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend):
    valid = {"x": torch.rand(2, 3), "grad": torch.rand(2, 3), "x0": torch.rand(2, 3), "alpha": 1.0, "eps": 1.0, "k": 3}
    for change, error, words in (
        ({"x0": torch.rand(3, 2)}, ValueError, r"x0 must be of the shape of x \(2, 3\), got \(3, 2\)"),
        ({"eps": -1.0}, ValueError, "eps must be finite and >= 0, got -1"),
        ({"k": 0}, ValueError, "k must be an integer and >= 1, got 0"),
        ({"k": torch.ones(2)}, TypeError, "k must be an int64 tensor, got torch.float32"),
        ({"k": torch.ones(3).long()}, ValueError, r"k must be of shape \(\) or \(2,\), got \(3,\)"),
    ):
        arguments = {**valid, **change}
        with pytest.raises(error, match=f"pgd_step_l1: {words}"):
            ops.pgd_step_l1(**arguments)
        ks = arguments["k"] if isinstance(arguments["k"], torch.Tensor) else None
        plain = {**arguments, "k": arguments["k"] if ks is None else 1}
        with harness.owned_by(backend, NAMES), pytest.raises((error, RuntimeError), match=words):
            _registry.OPS["pgd_step_l1"].overload(**plain, ks=ks)
    with pytest.raises(ValueError, match=r"project_l1: eps must be of shape \(\) or \(2,\), got \(3,\)"):
        ops.project_l1(valid["x"], valid["x0"], torch.rand(3))
    with pytest.raises(ValueError, match=r"project_l1: x must be of shape \(B, ...\), got a scalar"):
        ops.project_l1(torch.rand(()), torch.rand(()), 1.0)
