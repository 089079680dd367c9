"""Placeholder until the step ops land (replaced at merge)."""

import torch


def _c(v):
    return v[:, None, None, None] if isinstance(v, torch.Tensor) and v.dim() == 1 else v


def apgd_step_linf(x, xp, g, x0, alpha, eps, momentum):
    a, m = _c(alpha), _c(momentum)
    lo, hi = x0 - _c(eps), x0 + _c(eps)
    z = (x + a * g.sign()).clamp(lo, hi).clamp(0, 1)
    return (x + (z - x) * m + (x - xp) * (1 - m)).clamp(lo, hi).clamp(0, 1)


def _n(t):
    return t.flatten(1).norm(dim=1)[:, None, None, None]


def apgd_step_l2(x, xp, g, x0, alpha, eps, momentum):
    a, m = _c(alpha), _c(momentum)

    def P(v):
        d = v - x0
        n = _n(d)
        return (x0 + d / (n + 1e-12) * n.clamp(max=eps)).clamp(0, 1)

    z = P(x + a * g / (_n(g) + 1e-12))
    return P(x + (z - x) * m + (x - xp) * (1 - m))


def project_l1(x, x0, eps):
    raise NotImplementedError


def pgd_step_l1(*a):
    raise NotImplementedError
