"""The argument checks and their one wording."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from atop_fast._core import checks as _checks
from atop_fast.defense import check_model

IMAGES = torch.linspace(0, 1, 96).view(2, 3, 4, 4)


def fitted(images, device="cpu"):
    model = torch.nn.Conv2d(3, 3, 1, device=device)
    with _checks.check_fits("f", "x", images, model):
        if device != "cpu":
            # The message of torch for images on another device than a GPU's model.
            raise RuntimeError("Expected all tensors to be on the same device")
        model(images)


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
        (lambda: _checks.check_images("f", "x", IMAGES.numpy()), TypeError, r"ndarray; give torch.as_tensor\(x\)$"),
        (lambda: _checks.check_images("f", "x", [*IMAGES]), TypeError, r"list of tensors; give torch.stack\(x\)$"),
        (lambda: _checks.check_images("f", "x", IMAGES.byte()), TypeError, r"uint8; give x.float\(\) / 255$"),
        (lambda: _checks.check_images("f", "x", IMAGES[0]), ValueError, r"; a single image is x\[None\]$"),
        (lambda: _checks.check_images("f", "x", 255 * IMAGES), ValueError, "looks like 0..255: divide by 255$"),
        (lambda: _checks.check_images("f", "x", 2 * IMAGES - 1), ValueError, r"\[-1, 1\]: give \(x \+ 1\) / 2$"),
        (
            lambda: _checks.check_images("f", "x", 4 * IMAGES - 2),
            ValueError,
            "a normalization: give the images",
        ),
        (lambda: _checks.check_images("f", "x", 1.1 * IMAGES - 0.05), ValueError, r"values in \[-?[\d.]+, [\d.]+\]$"),
        (lambda: _checks.check_labels("f", "y", [0, 1], IMAGES), TypeError, r"got list; give torch.as_tensor\(y\)$"),
        (lambda: _checks.check_labels("f", "y", None, IMAGES), TypeError, "a torch.Tensor, got NoneType$"),
        (lambda: _checks.check_labels("f", "y", torch.zeros(2).int(), IMAGES), TypeError, r"int32; give y.long\(\)$"),
        (
            lambda: _checks.check_labels("f", "y", torch.eye(2), IMAGES),
            TypeError,
            r"one-hot labels give y.argmax",
        ),
        (lambda: _checks.check_labels("f", "y", torch.eye(2).long(), IMAGES), ValueError, r"give y.argmax\(1\)$"),
        (lambda: _checks.check_labels("f", "y", torch.eye(2)[:, :1].long(), IMAGES), ValueError, r"y.flatten\(\)$"),
        (lambda: _checks.check_logits("f", None, 2), TypeError, "got NoneType; does its forward end with `return`"),
        (lambda: _checks.check_logits("f", {"out": 0, "aux": 1}, 2), TypeError, r"with \['aux', 'out'\].*\['out'\]$"),
        (lambda: _checks.check_logits("f", {"x": 0, "logits": 1}, 2), TypeError, r"model\(x\)\['logits'\]$"),
        (lambda: _checks.check_logits("f", IMAGES.numpy(), 2), TypeError, r"ndarray; .*torch.from_numpy\(model\(x\)\)"),
        (lambda: _checks.check_logits("f", SimpleNamespace(logits=0), 2), TypeError, r"model\(x\).logits$"),
        (lambda: _checks.check_logits("f", "cat", 2), TypeError, "got str; wrap it in a function"),
        (
            lambda: _checks.check_logits("f", torch.arange(2), 2),
            ValueError,
            r"not the classes \(argmax\) .* \(2,\)",
        ),
        (lambda: _checks.check_logits("f", torch.eye(2) > 0, 2), TypeError, "real numbers, got torch.bool$"),
        (lambda: check_model("f", "model.pt"), TypeError, "got str; atop_fast.load_classifier and load_defense"),
        (lambda: check_model("f", {"weight": IMAGES}), TypeError, "got dict; a state dict belongs into its network"),
        (
            lambda: fitted(IMAGES.permute(0, 2, 3, 1)),
            ValueError,
            r"got \(4, 4, 3\) .*; batch of 2\); .*permute\(0, 3, 1, 2\)$",
        ),
        (lambda: fitted(IMAGES, "meta"), ValueError, "f: x must be on the device of the model, meta, got cpu$"),
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
