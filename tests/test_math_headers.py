"""csrc/math and the SIMD of csrc/cpu, without torch: Random123, the eager specification and Python's integers."""

from __future__ import annotations

import importlib
import math
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_randomness import RANDOM123

from atop_fast.ops import _registry
from atop_fast.randomness import Tag, philox4x32

normal = importlib.import_module("atop_fast.ops.random_normal")
HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("c++")
MASK32 = 0xFFFFFFFF

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compiled(source, folder, *flags):
    """A program from one file, compiled as setup.py compiles the library."""
    binary = folder / "program"
    command = [*COMPILER.split(), "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    command += [f"-I{HERE.parent / 'csrc'}", *flags, str(HERE / source), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return binary


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Calls the compiled program: lines of words in, lines of numbers out."""
    binary = compiled("math_headers.cpp", tmp_path_factory.mktemp("math_headers"))

    def call(lines):
        text = "\n".join(" ".join(map(str, line)) for line in lines)
        output = subprocess.run([binary], input=text, capture_output=True, text=True, check=True).stdout
        return [line.split() for line in output.splitlines()]

    return call


def integers(rows):
    return [[int(word) for word in row] for row in rows]


def bits(t, dtype=torch.int32):
    return (t.view(dtype).long() & (MASK32 if dtype == torch.int32 else -1)).tolist()


def test_philox_known_answers(program):
    """The vectors that Random123 publishes."""
    lines = [("philox", *counter, key & MASK32, key >> 32 & MASK32) for counter, key, _ in RANDOM123]
    assert integers(program(lines)) == [list(expected) for *_, expected in RANDOM123]


def test_philox_equals_the_specification(program):
    numbers = random.Random(0)
    rows = [[numbers.getrandbits(32) for _ in range(6)] for _ in range(200)]
    expected = [list(philox4x32(row[:4], row[5] << 32 | row[4])) for row in rows]
    assert integers(program([("philox", *row) for row in rows])) == expected


def test_numbers_of_large_samples(program):
    """Elements up to the last that has a number of its own, 2**34 - 1."""
    around = [2**n + i for n in (31, 32, 33) for i in range(-5, 6)]
    keys = [(-5, 2**40 + 3, 2**32 - 1, int(Tag.NOISE)), (2**62 + 9, 2**48 - 1, 0, int(Tag.START))]
    cases = [(*key, index) for key in keys for index in (*range(9), *around, 2**34 - 1)]
    for (group, lane, found), (seed, i, draw, tag, index) in zip(
        integers(program([("normal", *case) for case in cases])), cases, strict=True
    ):
        assert (group, lane) == (index >> 2, index & 3)
        counter = (index >> 2, i & MASK32, draw, tag << 16 | i >> 32 & 0xFFFF)
        words = torch.tensor(philox4x32(counter, seed))[lane & 2 :]
        radius = normal._minus_2_log(words[:1]).double().sqrt().float()
        assert bits(radius * normal._cos_sin(words[1:2])[lane & 1]) == [found]


def test_radius_and_angle_of_words(program):
    """Equal to the eager specification in every bit, for the ends of each quarter of a turn and words in between."""
    edges = [(quarter * 2**29 + i) & MASK32 for quarter in range(9) for i in range(-3, 4)]
    numbers = random.Random(1)
    words = torch.tensor(edges + [numbers.getrandbits(numbers.randint(1, 32)) for _ in range(3000)])
    radius = normal._minus_2_log(words).double().sqrt().float()
    expected = [bits(t) for t in (radius, *normal._cos_sin(words))]
    found = integers(program([("word", w) for w in words.tolist()]))
    assert found == [list(row) for row in zip(*expected, strict=True)]


@pytest.mark.slow
def test_all_words(program):
    """No word of the 2**32 gives the square root of a negative number, infinity, or a point off the circle."""
    low, high, size, norm = (float(v) for v in program([("sweep",)])[0])
    assert low >= 0
    assert high == pytest.approx(2 * 32 * math.log(2), rel=1e-6)
    assert size <= 1 + 1e-6
    assert norm <= 1e-6


def test_bilinear_taps_of_huge_images(program):
    sizes = [
        (2**30, 2**31 + 3),
        (2**31 + 1, 2**30 - 1),
        (2**30 - 1, 7),
        (5, 2**30),
        (2**24 + 1, 2**29 + 3),
        (1, 2**28),
        (2**28, 1),
    ]
    cases = [(i, g, w) for g, w in sizes for i in sorted({0, 1, w // 3, w // 2, w - 2, w - 1}) if 0 <= i < w]
    rows = integers(program([("tap", *case) for case in cases]))
    for (first, second, narrow, wide), (i, given, wanted) in zip(rows, cases, strict=True):
        position = max(0, (2 * i + 1) * given - wanted)
        assert (first, second) == (position // (2 * wanted), min(position // (2 * wanted) + 1, given - 1))
        rest, whole = torch.tensor(position % (2 * wanted)), torch.tensor(2 * wanted)
        assert bits((rest.float() / whole.float())[None]) == [narrow]
        assert bits((rest.double() / whole.double())[None], torch.int64) == [wide]


def test_images_of_more_than_2_to_the_31_pixels(program):
    cases = [(2**17, 2**16, 2), (3, 2**31 + 1, 1), (2**20 + 4, 2**20 + 4, 4), (1, 1, 1), (5, 7, 1)]
    expected = [[h * w, (h // p) * (w // p), -(-h * w // 8)] for h, w, p in cases]
    assert integers(program([("images", *case) for case in cases])) == expected


def test_key_in_strides(program):
    """Seed -3, the third of ids that lie two apart, one draw for all, tag 9."""
    assert integers(program([("key",)])) == [[2**32 - 3, MASK32, 5, 4, 9 << 16 | 7]]


LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")


@pytest.fixture(scope="session")
def at_level(tmp_path_factory):
    """The words that a program prints whose SIMD believes that the machine has no more than a level."""
    binaries = {}

    def call(source, level):
        module = _registry.native_module()
        if module is None or LEVELS.index(level) > LEVELS.index(module.cpu_features()["level"]):
            pytest.skip(f"no native build, or a CPU without {level}")
        if source not in binaries:
            chosen = '-D__builtin_cpu_supports(name)=(std::strcmp(name, std::getenv("ATOP_TEST_LEVEL")) == 0)'
            binaries[source] = compiled(source, tmp_path_factory.mktemp("levels"), "-include", "cstdlib", chosen)
        environment = {**os.environ, "ATOP_TEST_LEVEL": level}
        done = subprocess.run([binaries[source]], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    return call


@pytest.mark.backend("cpp")
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_simd_returns_the_same_bits(at_level, level):
    """The library uses only the highest level of the machine; here each takes its turn."""
    assert at_level("simd_levels.cpp", level) == ["0"] * 4


@pytest.mark.slow
@pytest.mark.backend("cpp")
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_convolves(at_level, level):
    """The loops of Winograd's convolution on each level: as accurate as float32 lets them be."""
    lines = at_level("winograd_levels.cpp", level)
    assert len(lines) == 8
    assert all(0 < float(error) < 1e-5 for error in lines)
