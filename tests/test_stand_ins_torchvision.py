"""Torchvision's families, small: what stands in for them under attack is the network."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_stand_ins import close, made, response, snapshot

from atop_fast.attacks import prepared
from atop_fast.attacks.network import Probe

models = pytest.importorskip("torchvision.models")
FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vit_b_16",
    "wide_resnet50_2",
]
COPIED = {
    "alexnet",
    "mnasnet0_5",
    "resnet18",
    "resnext50_32x4d",
    "vgg11",
    "vgg11_bn",
    "wide_resnet50_2",
}
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_b_16": 224}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_stands_in_for_a_family_is_the_network(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = made(lambda: getattr(models, name)(weights=None, num_classes=10, **options))
    x = torch.rand(2, 3, SIZES.get(name, 64), SIZES.get(name, 64), generator=torch.Generator().manual_seed(1))
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with prepared(model, probe=Probe(x, torch.arange(2))) as network:
            assert network is not model or name not in COPIED
            one, other = response(network, x), response(model, x)
            assert close(one[:1], other[:1], 1e-4)
            assert close(one[1:], other[1:], 1e-2)
    assert snapshot(model) == before
