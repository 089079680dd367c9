"""Transforms, attacks, options and files: whatever is given, a right result or a ValueError or TypeError."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import _harness as harness
import hypothesis
import pytest
import torch
from _strategies import FLOATS, INTEGERS, NUMBERS, integers, numbers, tensors
from hypothesis import strategies as st
from torch import nn

from atop_fast import attacks, build_purifier, image_folder, load_model, save_model
from atop_fast.ops import _registry
from atop_fast.recipes.options import DataConfig, TransformConfig
from atop_fast.recipes.schema import load_recipe
from atop_fast.training import ClassifierConfig, FinetuneConfig, PretrainConfig
from atop_fast.transforms import RT1, RT2, RT3, RandomResizePad

REFUSALS = (ValueError, TypeError)
small = st.integers(1, 9)
images = st.builds(
    lambda shape, x: dataclasses.replace(x, shape=shape),
    st.tuples(st.integers(0, 3), st.sampled_from((0, 1, 3)), st.integers(0, 17), st.integers(0, 17)),
    st.sampled_from((*FLOATS, torch.int32)).flatmap(lambda dtype: tensors((), dtype))
    | integers((), 0, 255, torch.uint8),
)


@st.composite
def transforms(draw):
    """A class and its options, mostly such as it takes."""
    kind = draw(st.sampled_from((RT1, RT2, RT3, RandomResizePad)))
    if kind is RandomResizePad:
        low = draw(st.integers(1, 12))
        return kind, {"min_size": low, "max_size": low + draw(st.sampled_from((-1, 0, 1, 9)))}
    options = {"patch": draw(st.sampled_from((1, 2, 3, 4, 0))), "shared_mask": draw(st.booleans())}
    options["size"] = draw(st.sampled_from((None, 4, 12, (6, 12), 0, (4,))))
    if kind is not RT1:
        options["sigma"] = draw(st.sampled_from((0.0, 0.25, 1e-40, 1e30, *NUMBERS)))
    if kind is RT3:
        return kind, {**options, "copies": draw(st.sampled_from((1, 2, 4, 255, *INTEGERS)))}
    return kind, {**options, "mask_ratio": draw(st.sampled_from((0.0, 0.5, 1.0)) | numbers)}


@functools.cache
def ops_of(backend):
    """The ops that have the backend."""
    return [name for name in _registry.OPS if backend in _registry.impls(name)]


def corrupted(kind, options, x, seed, draw, backend):
    """The transform's result and its gradient, by `backend`, or the refusal."""
    try:
        transform = kind(**options)
        image = x.make()
        with harness.owned_by(backend, ops_of(backend)):
            leaf = image.requires_grad_() if image.is_floating_point() else image
            y = transform(leaf, seed, None, draw)
            dy = torch.ones_like(y)
            return y.detach(), *(torch.autograd.grad(y, leaf, dy) if leaf.requires_grad else ())
    except REFUSALS as error:
        return error


@pytest.mark.backend("cpp")
def test_transforms_agree_with_the_specification(count):
    if "cpp" not in _registry.impls("corrupt"):
        pytest.skip("no native build")

    @hypothesis.given(transforms(), images, st.sampled_from(INTEGERS), st.sampled_from((0, 1, 2**32 - 1, 2**32, -1)))
    def property_of(transform, x, seed, draw):
        if not count():
            return
        expected, actual = (corrupted(*transform, x, seed, draw, backend) for backend in ("eager", "cpp"))
        if isinstance(expected, Exception) or isinstance(actual, Exception):
            assert str(actual) == str(expected)
            return
        for mine, wanted in zip(actual, expected, strict=True):
            harness.same_bits(mine, wanted)

    property_of()


class Tiny(nn.Module):
    """Logits of three classes, some of them NaN where an image is bright."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.broken = broken
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 12, generator=generator))

    def forward(self, x):
        logits = x.flatten(1).float() @ self.weight[:, : x[0].numel()].T
        return torch.where(x.flatten(1).amax(1, keepdim=True) > 0.9, torch.nan, logits) if self.broken else logits


ATTACKS = ("PGD", "FGSM", "MIFGSM", "APGD", "APGDT", "FAB", "Square", "CW")


@st.composite
def attack_options(draw):
    name = draw(st.sampled_from(ATTACKS))
    options = {"norm": draw(st.sampled_from(("Linf", "L2", "L1", "Linf", "L2", "l3"))), "eps": draw(numbers)}
    options["n_queries" if name == "Square" else "steps"] = draw(st.sampled_from((1, 2, 3, 0)))
    if name == "FGSM":
        options.pop("steps")
    if name in ("PGD", "MIFGSM"):
        options["alpha"] = draw(st.none() | numbers)
    return name, options


def test_attacks_stay_in_their_ball(count):
    x = st.sampled_from([("unit",), ("unit", "unit", "unit", "mixed", "huge", "tiny", "zero", "equal")]).flatmap(
        lambda values: tensors((2, 3, 2, 2), torch.float32, values)
    )

    @hypothesis.given(attack_options(), x, integers((2,), 0, 3), st.booleans())
    def property_of(attack, x, y, broken):
        if not count():
            return
        name, options = attack
        image, labels = x.make().contiguous(), y.make()
        kept = image.clone()
        try:
            model = getattr(attacks, name)(Tiny(broken), **options)
            adversarial = model(image, labels)
        except REFUSALS:
            return
        assert torch.equal(image, kept)
        assert (adversarial.shape, adversarial.dtype) == (image.shape, image.dtype)
        assert ((adversarial >= 0) & (adversarial <= 1)).all()
        if name != "CW":
            order = {"Linf": torch.inf, "L2": 2, "L1": 1}[options["norm"]]
            distance = (adversarial - image).double().flatten(1).norm(order, dim=1)
            assert (distance <= options["eps"] * (1 + 1e-5) + 1e-6).all(), distance

    property_of()


CONFIGS = (DataConfig, TransformConfig, ClassifierConfig, PretrainConfig, FinetuneConfig)
anything = st.one_of(
    st.sampled_from(INTEGERS), numbers, st.booleans(), st.none(), st.sampled_from(("", "rt1", "x", "L2"))
)


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_take_or_refuse(config, count):
    names = [field.name for field in dataclasses.fields(config)]

    @hypothesis.given(st.dictionaries(st.sampled_from(names), anything, max_size=3))
    def property_of(options):
        if count():
            with contextlib.suppress(*REFUSALS):
                assert dataclasses.asdict(config(**options)).keys() >= options.keys()

    property_of()


@st.composite
def damaged(draw, content):
    """Bytes with a few changed, cut out, doubled, or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data))) if draw(st.booleans()) else draw(st.integers(0, min(len(data), 600)))
        some = draw(st.sampled_from((b"\0", b"\xff", b'"', b"{", b"[", b"9", b"-", b": ", b"\n", b"&a", b"*a", b"!!")))
        length = draw(st.sampled_from((0, 1, 1, 2, 8, 100)))
        data[at : at + length] = draw(st.sampled_from((some, some * 8, bytes(data[at : at + length]) * 2, b"")))
    return bytes(data)


def test_damaged_files_are_taken_or_refused(count, tmp_path):
    """Recipes, models and images: each loads or is refused by a ValueError with its name."""
    pil = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    save_model(
        tmp_path / "x.safetensors", build_purifier("unet", channels=1, width=2), "purifier", "unet", channels=1, width=2
    )
    (tmp_path / "a").mkdir()
    seeds = {"x.safetensors": (tmp_path / "x.safetensors").read_bytes()}
    seeds["x.yaml"] = b"base: cifar10-rt2\ndata: {source: x, holdout: 7}\npurifier: {name: unet, options: {width: 8}}\n"
    for name in ("x.png", "x.jpg", "x.bmp", "x.tif", "x.webp", "x.ppm"):
        pil.effect_noise((16, 12), 64).convert("RGB").save(tmp_path / name)
        seeds[f"a/{name}"] = (tmp_path / name).read_bytes()
    loaders = {"x.safetensors": lambda path: load_model(path, "purifier"), "x.yaml": load_recipe}

    @hypothesis.given(st.sampled_from(sorted(seeds)).flatmap(lambda n: st.tuples(st.just(n), damaged(seeds[n]))))
    def property_of(file):
        if not count():
            return
        name, content = file
        path = tmp_path / name
        path.write_bytes(content)
        try:
            loaders.get(name, lambda path: image_folder(path.parent.parent, size=4))(path)
        except ValueError as error:
            problem = str(error)
            hypothesis.note(problem)
            # That a base does not exist is said of the base.
            if str(path) not in problem and name != "x.yaml":
                raise AssertionError("a refusal without the file's name") from error
        path.unlink()

    property_of()
