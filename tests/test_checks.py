"""The argument checks and their one wording."""

from __future__ import annotations

import math

import pytest
import torch

from atop_fast._core import checks as _checks

IMAGES = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: _checks.check_tensor("f", "x", 3), TypeError, "f: x must be a torch.Tensor, got int"),
        (lambda: _checks.check_float_tensor("f", "x", torch.arange(3)), TypeError, "a floating-point tensor"),
        (lambda: _checks.check_images("f", "x", IMAGES[0]), ValueError, r"\(B, C, H, W\), got \(3, 4, 4\)"),
        (lambda: _checks.check_images("f", "x", IMAGES + 1), ValueError, r"in \[0, 1\], got values in"),
        (lambda: _checks.check_images("f", "x", IMAGES * math.nan), ValueError, "finite, got NaN or infinity"),
        (lambda: _checks.check_labels("f", "y", torch.zeros(2), IMAGES), TypeError, "an int64 tensor"),
        (lambda: _checks.check_labels("f", "y", torch.zeros(3).long(), IMAGES), ValueError, r"of shape \(2,\)"),
        (lambda: _checks.check_labels("f", "y", torch.tensor([0, -1]), IMAGES), ValueError, "class indices >= 0"),
        (lambda: _checks.check_number("f", "eps", "1"), TypeError, "f: eps must be a number, got str"),
        (lambda: _checks.check_number("f", "eps", True), TypeError, "a number, got bool"),
        (lambda: _checks.check_number("f", "eps", math.inf), ValueError, "f: eps must be finite, got inf"),
        (lambda: _checks.check_number("f", "eps", -1, low=0), ValueError, "finite and >= 0, got -1"),
        (lambda: _checks.check_number("f", "p", 2, low=0, high=1), ValueError, r"finite and in \[0, 1\], got 2"),
        (lambda: _checks.check_number("f", "p", 2, high=1), ValueError, "finite and <= 1, got 2"),
        (lambda: _checks.check_integer("f", "n", 1.0), TypeError, "f: n must be an integer, got float"),
        (lambda: _checks.check_integer("f", "n", 0, low=1), ValueError, "an integer and >= 1, got 0"),
        (lambda: _checks.check_choice("f", "mode", "z", ("a", "b")), ValueError, "one of 'a', 'b', got 'z'"),
    ],
)
def test_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_accepts():
    assert _checks.check_images("f", "x", IMAGES) is IMAGES
    assert _checks.check_images("f", "x", IMAGES[:0]).numel() == 0
    labels = torch.tensor([0, 9])
    assert _checks.check_labels("f", "y", labels, IMAGES) is labels
    assert _checks.check_number("f", "eps", 1) == 1.0
    assert _checks.check_integer("f", "n", 3, low=3) == 3
    assert _checks.check_choice("f", "mode", "a", ("a", "b")) == "a"


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch):
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert _checks.check_device("f", "device", "auto").type == kind
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _checks.pick_device("auto") == "cuda"
    if kind == "cpu":
        with pytest.raises(ValueError, match="f: device must be a device of this machine, got 'cuda'"):
            _checks.check_device("f", "device", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _checks.check_device("f", "device", "auto").type == "cpu"
    assert [_checks.pick_device(name) for name in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
