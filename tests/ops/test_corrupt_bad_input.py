"""corrupt: every argument error, in the words of the project, from the function and from the op."""

from __future__ import annotations

import _harness as harness
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast import ops

NAMES = ("random_normal", "mask_blocks", "corrupt", "corrupt_live", "corrupt_bwd", "resample")
BAD = [
    ({"x": torch.rand(2, 3, 4, 4).int()}, TypeError, "x must be a uint8, float32, .* tensor, got torch.int32"),
    ({"x": torch.rand(3, 4, 4)}, ValueError, r"x must be images of shape \(B, C, H, W\), got \(3, 4, 4\)"),
    ({"x": torch.rand(2, 3, 0, 4), "size": (4, 4)}, ValueError, r"x must be images of at least one pixel, got \(2, 3"),
    ({"patch": 3}, ValueError, "x must be of a height and width divisible by patch=3, got 4 x 4"),
    ({"patch": 0}, ValueError, "patch must be|x must be of a height and width divisible by patch=0"),
    ({"copies": 0}, ValueError, r"copies must be an integer and in \[1, 255\], got 0"),
    ({"copies": 256}, ValueError, r"copies must be an integer and in \[1, 255\], got 256"),
    ({"sigma": torch.zeros(2).double()}, TypeError, "sigma must be a float32 tensor, got torch.float64"),
    ({"sigma": torch.zeros(3)}, ValueError, r"sigma must be of shape \(\) or \(2,\), got \(3,\)"),
    ({"size": (4, 0)}, ValueError, r"size must be .*>= 1, got"),
    ({"dtype": torch.float64}, TypeError, "dtype must be .* torch.float32 images, got torch.float64"),
    ({"dtype": torch.int32}, TypeError, "dtype must be .* torch.float32 images, got torch.int32"),
    ({"sample_ids": torch.arange(3)}, ValueError, r"sample_ids must be .*of shape \(2,\), got .*\(3,\)"),
    ({"draw": torch.zeros(3).long()}, ValueError, r"draw must be .*of shape \(\) or \(2,\), got .*\(3,\)"),
    ({"seed": torch.zeros(1).long()}, ValueError, r"seed must be .*of shape \(\), got .*\(1,\)"),
]


@cases(bad=range(len(BAD)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend, bad):
    change, error, words = BAD[bad]
    key = {"sigma": torch.zeros(2), "seed": torch.tensor(0), "sample_ids": torch.arange(2), "draw": torch.tensor(0)}
    arguments = {"x": torch.rand(2, 3, 4, 4), **key, "patch": 2, "copies": 1, "dtype": torch.float32, **change}
    with harness.owned_by(backend, NAMES):
        with pytest.raises(error, match=f"corrupt: ({words})"):
            ops.corrupt(**arguments)
        blocks = torch.zeros(2, 4, dtype=torch.uint8)
        arguments = {"blocks": blocks, "size": (4, 4), "save": False, **arguments}
        with pytest.raises(RuntimeError if backend == "cpp" else error, match=f"corrupt: ({words})"):
            torch.ops.atop_fast.corrupt(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [0.5]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"patch": 2.0}, TypeError, "patch must be an integer, got float"),
        ({"size": (4, 6), "patch": 4}, ValueError, "size must be of a height and width divisible by patch=4, got 4"),
        ({"size": 4}, (TypeError, ValueError), "size must be"),
        ({"size": (4, 4.0)}, TypeError, "size must be"),
        ({"sigma": -0.1}, ValueError, "sigma must be finite and >= 0, got -0.1"),
        ({"sigma": "big"}, TypeError, "sigma must be a number, got str"),
        ({"mask_ratio": 1.5}, ValueError, r"mask_ratio must be finite and in \[0, 1\], got 1.5"),
        ({"mask_ratio": torch.ones(2).long()}, TypeError, "mask_ratio must be a float32 tensor, got"),
        ({"mask_ratio": torch.ones(3)}, ValueError, r"mask_ratio must be of shape \(\) or \(2,\), got \(3,\)"),
        ({"copies": 1.0}, TypeError, "copies must be an integer, got float"),
        ({"dtype": "float32"}, TypeError, "dtype must be"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got float"),
        ({"sample_ids": torch.zeros(2)}, ValueError, r"sample_ids must be int64 of shape \(2,\), got torch.float32"),
        ({"draw": 2**32}, ValueError, "draw must be an integer and in"),
    ],
)
def test_bad_arguments(change, error, words):
    with pytest.raises(error, match=f"corrupt: {words}"):
        ops.corrupt(**{"x": torch.rand(2, 3, 4, 4), "patch": 2, **change})


BAD_BWD = [
    ({"dy": torch.zeros(2, 5, 4, 4).int()}, TypeError, "dy must be a float32, .* tensor, got torch.int32"),
    ({"dy": torch.zeros(3, 5, 4, 4)}, ValueError, "dy must be 2 images, got 3|blocks must be of 3 samples, got 2"),
    ({"dy": torch.zeros(2, 1, 4, 4)}, ValueError, r"dy must be of shape \(B \* copies, C \+ 2, H, W\), got \(2, 1,"),
    ({"live": torch.zeros(2, 3, 2)}, TypeError, "live must be a uint8 tensor, got torch.float32"),
    ({"live": torch.zeros(2, 3, 1).byte()}, ValueError, r"live must be of shape \(2, 3, 2\), got \(2, 3, 1\)"),
    ({"blocks": torch.zeros(2, 3).byte()}, ValueError, r"blocks must be of shape \(B, 4\), got \(2, 3\)"),
    ({"blocks": torch.zeros(2, 4)}, TypeError, "blocks must be a uint8 tensor, got torch.float32"),
    ({"dtype": torch.float64}, TypeError, "dtype must be a floating-point type that goes with torch.float32, got"),
]


@cases(bad=range(len(BAD_BWD)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_backward(backend, bad):
    change, error, words = BAD_BWD[bad]
    tensors = {"dy": torch.zeros(2, 5, 4, 4), "live": torch.zeros(2, 3, 2).byte(), "blocks": torch.zeros(2, 4).byte()}
    arguments = {**tensors, "patch": 2, "copies": 1, "dtype": torch.float32, **change}
    raised = RuntimeError if backend == "cpp" else error
    with harness.owned_by(backend, NAMES), pytest.raises(raised, match=f"corrupt_bwd: ({words})"):
        torch.ops.atop_fast.corrupt_bwd(**arguments)
