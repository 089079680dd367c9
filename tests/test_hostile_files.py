"""Files from strangers: each gives the right result or a ValueError that names the file; nothing in it runs."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save, save_file

from atop_fast import build_classifier, build_purifier, image_folder, load_model, save_model
from atop_fast.classifiers.zoo import load_classifier
from atop_fast.evaluation import evaluate
from atop_fast.purifiers import DeepFillV2, load_deepfill, save_public
from atop_fast.recipes.options import DataConfig, TransformConfig
from atop_fast.recipes.schema import load_recipe

SHAPE = {"channels": 1, "width": 4}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a purifier's file."""
    path = tmp_path_factory.mktemp("model") / "purifier.safetensors"
    save_model(path, build_purifier("unet", **SHAPE), "purifier", "unet", **SHAPE)
    return path.read_bytes()


def header_and_data(content):
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def described(**changes):
    """A change of what the file says to be."""

    def change(content):
        header, data = header_and_data(content)
        ours = json.loads(header["__metadata__"]["atop_fast"]) | changes
        header["__metadata__"]["atop_fast"] = json.dumps(ours)
        return joined(header, data)

    return change


def text(value):
    """The same, as a text that is not of json.dumps."""

    def change(content):
        header, data = header_and_data(content)
        header["__metadata__"]["atop_fast"] = value
        return joined(header, data)

    return change


def with_tensors(change):
    def changed(content):
        header, _ = header_and_data(content)
        state = load(content)
        change(state)
        return save(state, header["__metadata__"])

    return changed


def first(state):
    return min(name for name, tensor in state.items() if tensor.dim() == 4)


def twice(content):
    """The second tensor under the name of the first as well."""
    header, data = header_and_data(content)
    one, two = [name for name in header if name != "__metadata__"][:2]
    other = json.dumps(header.pop(two))
    return joined(f'{json.dumps(header)[:-1]}, "{one}": {other}}}'.encode(), data)


class Payload:
    """An object whose unpickling runs code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


MODELS = {
    "empty": lambda content: b"",
    "header length": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "header beyond the end": lambda content: content[:200],
    "data cut": lambda content: content[:-1],
    "data longer": lambda content: content + b"\0",
    "no JSON": lambda content: joined(b"{" * 100, b""),
    "nested JSON": lambda content: joined(b"[" * 100_000, b""),
    "two tensors of one name": twice,
    "no description": lambda content: save(load(content)),
    "description is a list": text("[]"),
    "description nested": text("[" * 100_000),
    "description with a long number": text("9" * 5000),
    "unknown kind": described(kind="../purifier"),
    "name is a list": described(name=[]),
    "name of another": described(name="os.system"),
    "options are a list": described(options=[1]),
    "option unknown": described(options={**SHAPE, "__class__": 1}),
    "width of a text": described(options={"width": "4"}),
    "width of 10^9": described(options={**SHAPE, "width": 10**9}),
    "width of infinity": described(options={**SHAPE, "width": 1e999}),
    "constants of 10^14": described(name="mae", options={"image_size": 200, "patch_size": 1}),
    "other shape": with_tensors(lambda s: s.update({first(s): s[first(s)][:1]})),
    "other name": with_tensors(lambda s: s.update({"../../etc/passwd": s.pop(first(s))})),
    "one missing": with_tensors(lambda s: s.pop(first(s))),
    "integers": with_tensors(lambda s: s.update({first(s): s[first(s)].to(torch.int8)})),
    "NaN": with_tensors(lambda s: s[first(s)].view(-1)[:1].fill_(torch.nan)),
    "infinity": with_tensors(lambda s: s[first(s)].view(-1)[-1:].fill_(torch.inf)),
}


@pytest.mark.parametrize("fault", MODELS)
def test_damaged_models_are_refused(fault, content, tmp_path):
    path = tmp_path / "purifier.safetensors"
    path.write_bytes(MODELS[fault](content))
    with pytest.raises(ValueError, match=f"load_model: path must be .*{path}"):
        load_model(path, "purifier")


def test_options_larger_than_memory_are_refused_before_they_are_built(content, tmp_path):
    """The weights of 10^9 channels are not of this size, whatever the file says."""
    path = tmp_path / "purifier.safetensors"
    for options, words in (({"width": 10**9}, "no option of so few"), ({"width": 96}, "size mismatch")):
        path.write_bytes(described(options=SHAPE | options)(content))
        with pytest.raises(ValueError, match=words):
            load_model(path, "purifier")


def test_weights_of_16_bits_become_float32(content, tmp_path):
    path = tmp_path / "purifier.safetensors"
    path.write_bytes(with_tensors(lambda s: s.update({first(s): s[first(s)].half()}))(content))
    module = load_model(path, "purifier")
    name = first(load(content))
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert torch.equal(module.state_dict()[name], load(content)[name].half().float())


def test_pickled_code_does_not_run(tmp_path):
    trace = tmp_path / "it-ran"
    for name, write in (
        ("x.pth", lambda f: torch.save({"state_dict": {"w": Payload(trace)}}, f)),
        ("y.pth", lambda f: torch.save({"w": Payload(trace)}, f, _use_new_zipfile_serialization=False)),
        ("z.safetensors", lambda f: f.write(pickle.dumps(Payload(trace)))),
    ):
        with open(tmp_path / name, "wb") as file:
            write(file)
        for read in (lambda p: load_classifier(p, "small_cnn"), load_deepfill, lambda p: load_model(p, "classifier")):
            with pytest.raises(ValueError, match=name):
                read(tmp_path / name)
    assert not trace.exists()


def test_classifiers_of_torch_save_are_refused(tmp_path):
    model = build_classifier("small_cnn", channels=1, classes=3, width=4)
    state = model.state_dict()
    name = next(iter(state))
    faults = {
        "NaN or infinity": {name: state[name] * torch.nan},
        "is of torch.int64": {name: state[name].long()},
        "is of torch.complex64": {name: state[name].to(torch.complex64)},
        "size mismatch": {name: torch.zeros(1).expand(2**40, *state[name].shape[1:])},
        "Unexpected key": {"../../x": state[name]},
    }
    for words, change in faults.items():
        torch.save({**state, **change}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"load_classifier: .*x.pt .*{words}"):
            load_classifier(tmp_path / "x.pt", "small_cnn", channels=1, classes=3, width=4)


def test_public_checkpoints_are_refused(tmp_path):
    net = DeepFillV2(8)
    save_public(tmp_path / "x.pth", net)
    state = torch.load(tmp_path / "x.pth", weights_only=True)["G"]
    bias = "stage2.conv_bn7.conv.bias"
    faults = {
        f"NaN or infinity in {bias}": {bias: state[bias] * torch.nan},
        "size mismatch": {bias: torch.zeros(1).expand(2**40)},
        "not of real numbers": {bias: state[bias].long()},
    }
    for words, change in faults.items():
        torch.save({"G": {**state, **change}}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=f"load_deepfill: .*x.pth .*{words}"):
            load_deepfill(tmp_path / "x.pth")


def bomb(levels):
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "purifier:\n  options:\n" + "".join(f"    {line}\n" for line in lines)


RECIPES = {
    "python tag": "data: !!python/object/apply:os.system [touch it-ran]",
    "python name": "data: {source: !!python/name:os.system }",
    "class path": "data: {class_path: this.X, init_args: {}}",
    "class path within": "classifier: {training: {class_path: this.X}}",
    "another file": "data: other.yaml",
    "another file within": "classifier: {training: other.yaml}",
    "aliases": bomb(64),
    "alias to itself": "purifier: {options: &a {x: *a}}",
    "nesting": "purifier: {options: {x: " + "[" * 100_000 + "}}",
    "key twice": "data: {size: 3}\ndata: {size: 4}",
    "long": "# " + "x" * 2**20,
    "number of 5000 digits": "data: {size: " + "9" * 5000 + "}",
    "no mapping": "- data",
    "a section is a list": "data: []",
    "a section is nothing": "data:",
    "text for a number": "data: {size: big}",
    "NaN": "transform: {sigma: .nan}",
    "infinity": "finetune: {lr: .inf}",
    "negative size": "data: {size: -3}",
    "ratio of 2": "transform: {mask_ratio: 2}",
    "number for a key": "3: 4",
    "number for an option": "purifier: {options: {3: 4}}",
    "list for a key": "? [1, 2]\n: 3",
    "a date": "data: {source: 2020-01-01}",
    "control characters": "data: \x01",
    "its own base": "base: ./r.yaml",
    "its own base by another path": "base: ../here/r.yaml",
    "base is a list": "base: [1]",
}


@pytest.mark.parametrize("fault", RECIPES)
def test_hostile_recipes_are_refused(fault, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = folder / "r.yaml"
    path.write_text(RECIPES[fault])
    Path("other.yaml").write_text("size: 3")
    with pytest.raises(
        ValueError, match=r"load_recipe: preset must be (?s:.*)" + ("" if "base" in fault else "r.yaml")
    ):
        load_recipe(path)
    assert not Path("it-ran").exists()


def test_recipe_of_bytes_is_refused(tmp_path):
    for content in (b"\xff\xfe\x00", b"\x80data", bytes(range(256))):
        (tmp_path / "r.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=r"r\.yaml"):
            load_recipe(tmp_path / "r.yaml")


def test_configs_refuse_numbers_out_of_range():
    with pytest.raises(ValueError, match="DataConfig: holdout must be an integer and >= 0, got -1"):
        DataConfig(holdout=-1)
    with pytest.raises(ValueError, match="RT2: sigma must be finite and >= 0, got inf"):
        TransformConfig(sigma=float("inf"))


@pytest.fixture
def images(tmp_path):
    """Writes one image of a folder with a sound one beside it."""
    pil = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    (tmp_path / "a").mkdir()
    pil.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a" / "0.png")

    def write(name, image, **options):
        path = tmp_path / "a" / name
        path.write_bytes(image) if isinstance(image, bytes) else image.save(path, **options)
        return tmp_path

    return write


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_unusual_images_are_read(images):
    from PIL import Image

    red = Image.new("RGB", (8, 8), (255, 0, 0))
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = b"\x80"
    exif = Image.Exif()
    exif[0x0112] = 6
    bright = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 8, 8)
    for name, image, options in (
        ("palette.png", palette, {"transparency": b"\x80"}),
        ("alpha.png", red.convert("RGBA"), {}),
        ("cmyk.tif", red.convert("CMYK"), {}),
        ("rotated.png", red, {"exif": exif}),
    ):
        folder = images(name, image, **options)
        torch.testing.assert_close(image_folder(folder).images[1], bright, rtol=0, atol=2 / 255)
        (folder / "a" / name).unlink()
    folder = images("gray.png", Image.new("1", (8, 8), 1))
    assert image_folder(folder).images[1].eq(1).all()


def test_extreme_sizes_are_resized(images):
    from PIL import Image

    for name, size in (("1.png", (1, 1)), ("wide.png", (20_000, 1)), ("high.png", (1, 20_000))):
        folder = images(name, Image.new("RGB", size, (0, 255, 0)))
        data = image_folder(folder, size=4).images
        assert data.shape == (2, 3, 4, 4)
        torch.testing.assert_close(data[1], torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 4, 4))
        (folder / "a" / name).unlink()


def test_pixels_lie_as_they_are_stored(images):
    """Orientation 6, a quarter of a turn, is noted and not applied; as in torchvision."""
    from PIL import Image

    image = Image.new("RGB", (8, 8))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert image_folder(images("1.png", image, exif=exif)).images[1, 0].nonzero().tolist() == [[0, 0]]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb_png(side):
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_images_that_cannot_be_right_are_refused(images):
    from PIL import Image

    noise = Image.frombytes("RGB", (64, 64), bytes(range(256)) * 48)
    faults = {
        "empty.png": b"",
        "text.png": b"<svg onload=alert(1)>",
        "html.jpg": b"<script>",
        "cut.png": png(noise)[:-300],
        "zip.png": b"PK\x03\x04" + bytes(100),
        "16.png": Image.new("I;16", (8, 8), 40_000),
        "32.tif": Image.new("I", (8, 8), 2**20),
        "float.tif": Image.new("F", (8, 8), 0.5),
        "bomb.png": bomb_png(50_000),
        "small-bomb.png": bomb_png(10_000),
        "no-pixels.png": bomb_png(0),
        "short.png": bomb_png(100),
    }
    for name, content in faults.items():
        folder = images(name, content)
        with pytest.raises(ValueError, match=f"image_folder: path must be a folder of readable images, got .*{name}"):
            image_folder(folder)
        (folder / "a" / name).unlink()


def rewritten(folder, change):
    """Change the last record of a run's log and the shard that it names."""
    log = folder / "log.jsonl"
    *lines, last = log.read_text().splitlines()
    record = json.loads(last)
    shard = folder / "shards" / record["shard"]
    tensors = load(shard.read_bytes())
    change(record, tensors)
    save_file(tensors, str(shard))
    record.setdefault("crc32", 0)
    if record["crc32"] is not None:
        record["crc32"] = zlib.crc32(shard.read_bytes())
    log.write_text("\n".join([*lines, json.dumps(record)]) + "\n")


RUNS = {
    "shard elsewhere": lambda r, t: r.update(shard="../../../x.safetensors"),
    "shard by its whole path": lambda r, t: r.update(shard="/etc/passwd"),
    "shard is a number": lambda r, t: r.update(shard=3),
    "no name": lambda r, t: r.pop("name"),
    "ids beyond the images": lambda r, t: t["ids"].fill_(10**6),
    "ids below 0": lambda r, t: t["ids"].fill_(-1),
    "no ids": lambda r, t: t.pop("ids"),
    "ids of floats": lambda r, t: t.update(ids=t["ids"].float()),
    "results of others": lambda r, t: t.update({k: v[:1] for k, v in t.items() if k != "ids"}),
}


@pytest.mark.usefixtures("no_pictures")
def test_hostile_run_folders_are_refused(tmp_path):
    model = build_classifier("small_cnn", channels=1, classes=3, width=4).eval()
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4) % 3

    def run(folder):
        options = {"draws": 2, "diagnostics": (), "progress": False}
        return evaluate(model, x, y, attacks={"none": lambda x, y, ids: x}, out=folder, **options)

    run(tmp_path / "sound")
    for i, change in enumerate(RUNS.values()):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "sound", folder)
        rewritten(folder, change)
        with pytest.raises(ValueError, match=f"evaluate: out must be a run folder with whole .*{folder}"):
            run(folder)
    for content in ("[]", "3", "[" * 100_000, '{"format": '):
        (folder / "run.json").write_text(content)
        with pytest.raises(ValueError, match="evaluate: out must be a readable run folder"):
            run(folder)
