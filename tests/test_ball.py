"""The ball of a threat model: lengths, nearest points and random points."""

from __future__ import annotations

import pytest
import torch

from atop_fast.attacks import NORMS, Ball

IDS = torch.tensor([7, 3, 2**40])
INNER = torch.full((3, 2, 5, 6), 0.5, dtype=torch.float64)


def sample(seed=0):
    torch.manual_seed(seed)
    return torch.rand(3, 2, 5, 6, dtype=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
def test_length_is_the_norm(norm):
    delta = sample() - 0.5
    order = {"Linf": float("inf"), "L2": 2, "L1": 1}[norm]
    expected = [torch.linalg.norm(one.flatten(), order) for one in delta]
    torch.testing.assert_close(Ball(norm, 1.0).length(delta), torch.stack(expected))


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_nearest_point(norm):
    """No point of the ball is nearer in the Euclidean distance; away from the range's ends, for L2, too."""
    ball, center = Ball(norm, 0.3), INNER if norm == "L2" else sample()
    x = center + torch.randn_like(center)
    nearest = ball.project(x, center)
    assert (ball.length(nearest - center) <= 0.3 + 1e-12).all()
    assert 0 <= nearest.min() <= nearest.max() <= 1
    torch.testing.assert_close(ball.project(nearest, center), nearest, rtol=0, atol=1e-12)
    for seed in range(50):
        other = ball.random_point(center, seed, IDS)
        assert (((x - nearest) * (other - nearest)).flatten(1).sum(dim=1) <= 1e-9).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["random_point", "surface_point"])
def test_random_points_belong_to_seed_and_id(norm, kind):
    images = sample()
    draw = getattr(Ball(norm, 0.4), kind)
    points = draw(images, 5, IDS)
    assert (Ball(norm, 0.4).length(points - images) <= 0.4 + 1e-12).all()
    assert 0 <= points.min() <= points.max() <= 1
    assert torch.equal(draw(images[1:2], 5, IDS[1:2])[0], points[1])
    assert not torch.equal(draw(images, 6, IDS), points)


@pytest.mark.parametrize("norm", NORMS)
def test_surface_points_lie_on_the_surface(norm):
    ball = Ball(norm, 0.1)
    torch.testing.assert_close(ball.length(ball.surface_point(INNER, 0, IDS) - INNER), torch.full((3,), 0.1).double())
    if norm != "L1":
        assert (ball.length(ball.random_point(INNER, 0, IDS) - INNER) < 0.1).all()


def test_random_points_are_uniform():
    """In n dimensions the share of points within half the radius is 2^-n."""
    images, ids = torch.full((20000, 1, 1, 2), 0.5, dtype=torch.float64), torch.arange(20000)
    for norm in ("Linf", "L2"):
        ball = Ball(norm, 0.2)
        near = (ball.length(ball.random_point(images, 1, ids) - images) < 0.1).double().mean()
        assert abs(float(near) - 0.25) < 5 * (0.25 * 0.75 / 20000) ** 0.5
