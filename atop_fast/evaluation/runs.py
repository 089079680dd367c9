"""Run folders: an append-only log of finished work and atomic shards, shared by the processes of one evaluation.

    <out>/run.json                 which run it is: fingerprint, settings, number of images
    <out>/log.jsonl                one line for each finished unit; log-<rank>.jsonl for the ranks above 0
    <out>/shards/*.safetensors     a unit's results: ids, candidate images, selection counts, predictions

A unit is one candidate (the clean images, or those of an attack) for some of the images. Its line is written after its
shard, so that a process that is killed loses at most its current unit. Units without a line remain to be done, for any
batch size and number of processes before and after the interruption.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._core.checks import message
from .._core.distributed import Group
from .._core.files import claim_folder, remove_leftovers, writable_folder, write_atomic
from .identity import same_model
from .tracing import check_line

FORMAT = 2


@dataclass(frozen=True)
class Unit:
    """The results of one unit of work.

    Attributes:
        name: the candidate.
        ids: int64 (n,), the indices of the images in the evaluated set.
        values: name -> tensor (n, ...): small results.
        images: the candidates (n, C, H, W), or the shard that holds them; None if they are not kept.
        seconds, forward, backward: time and passes; passes are counted in images, None if they cannot be counted.
        trace: the steps of its attack, if they were traced; see tracing.trace_line.
    """

    name: str
    ids: Tensor
    values: dict[str, Tensor]
    images: Tensor | Path | None
    seconds: float
    forward: int | None
    backward: int | None
    trace: tuple[dict[str, Any], ...] = ()


class Run:
    """The results of an evaluation so far, in memory or in a folder.

    Args:
        count: number of images N.
        folder: run folder, or None to keep everything in memory.
        header: JSON-ready description of the run; a folder with another header is refused.
        group: the processes of the run.

    Raises:
        ValueError: `folder` cannot be written, holds something else, or is damaged.
    """

    def __init__(self, count: int, folder: Path | None, header: dict[str, Any], group: Group) -> None:
        self.count, self.group, self.folder = count, group, folder
        self.units: list[Unit] = []
        self.tables: dict[str, dict[str, Tensor]] = {}
        self._own: list[Unit] = []
        self.agree(lambda: _open_folder(folder, header) if folder and group.rank == 0 else None)
        if any(_known_by(header, other) != other for other in group.gather(header)):
            expected = "the same model, data and settings in every process"
            raise ValueError(message("evaluate", "model, images, labels", expected, "differences between the ranks"))
        if folder is not None:
            self._log = folder / ("log.jsonl" if group.rank == 0 else f"log-{group.rank}.jsonl")
            # A barrier: all ranks read the logs before any rank appends to one.
            self.agree(lambda: self._read(folder))
            _cut_torn_line(self._log)

    def done(self, name: str) -> Tensor:
        """Whether each image has a candidate of this name, bool (N,)."""
        table = self.tables.get(name)
        return table["done"] if table else torch.zeros(self.count, dtype=torch.bool)

    def add(self, unit: Unit) -> None:
        """Record a finished unit; if the run has a folder, the unit is on disk when this returns."""
        if self.folder is not None:
            unit = self._write(self.folder, unit)
        self._own.append(unit)
        self._take(unit)

    def images(self, name: str, ids: Tensor) -> Tensor:
        """The candidates `name` of the images `ids`, on the CPU; this process or the folder must have them."""
        found: dict[int, Tensor] = {}
        wanted = set(ids.tolist())
        for unit in self.units:
            if unit.name != name or unit.images is None:
                continue
            if rows := [(row, i) for row, i in enumerate(unit.ids.tolist()) if i in wanted]:
                images = _load(unit.images)["images"] if isinstance(unit.images, Path) else unit.images
                found.update({i: images[row] for row, i in rows})
        return torch.stack([found[i] for i in ids.tolist()])

    def share(self) -> None:
        """Exchange the small results between all processes; a barrier."""
        for rank, units in enumerate(self.group.gather([replace(unit, images=None) for unit in self._own])):
            if rank != self.group.rank:
                for unit in units:
                    self._take(unit)
        self._own = []

    def trace(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The steps of all units of these names, in the order of names and images."""
        units = sorted((unit for unit in self.units if unit.trace), key=lambda unit: int(unit.ids[0]))
        return [step for name in names for unit in units if unit.name == name for step in unit.trace]

    def saved(self, names: Sequence[str]) -> str:
        """One sentence on the saved state after an interruption."""
        if self.folder is None:
            return "nothing is saved, as no folder was given (out)"
        counts = [f"{name} {int(self.done(name).sum())}" for name in names if self.done(name).any()]
        what = f"has {', '.join(counts)} of {self.count} images" if counts else "has no image yet"
        return f"{self.folder} {what}, and the same call resumes it"

    def agree(self, work: Callable[[], object]) -> None:
        """Run `work` in every process; if it raises ValueError in one, raise it in all."""
        problem = None
        try:
            work()
        except ValueError as error:
            problem = str(error)
        if problems := [p for p in self.group.gather(problem) if p]:
            raise ValueError(problems[0])

    def _read(self, folder: Path) -> None:
        for path in sorted(folder.glob("log*.jsonl")):
            for record in _read_log(path):
                self._take(_read_shard(folder, record, self.count))

    def _take(self, unit: Unit) -> None:
        self.units.append(unit)
        table = self.tables.setdefault(unit.name, {"done": torch.zeros(self.count, dtype=torch.bool)})
        for key, value in unit.values.items():
            if key not in table:
                table[key] = torch.zeros(self.count, *value.shape[1:], dtype=value.dtype)
            table[key][unit.ids] = value
        table["done"][unit.ids] = True

    def _write(self, folder: Path, unit: Unit) -> Unit:
        # No image has two candidates of the same name, so the name and the first id make the file name unique.
        slug = re.sub(r"[^\w.@-]", "_", unit.name)[:60]
        path = folder / "shards" / f"{slug}-{zlib.crc32(unit.name.encode()):08x}-{int(unit.ids[0]):07d}.safetensors"
        tensors = {"ids": unit.ids, **{f"values.{k}": v for k, v in unit.values.items()}}
        if isinstance(unit.images, Tensor):
            tensors["images"] = unit.images
        write_atomic(path, lambda p: save_file({k: v.contiguous() for k, v in tensors.items()}, str(p)))
        record = {
            "name": unit.name,
            "images": len(unit.ids),
            "shard": path.name,
            "crc32": _crc32(path),
            "seconds": unit.seconds,
            "forward": unit.forward,
            "backward": unit.backward,
            **({"trace": unit.trace} if unit.trace else {}),
        }
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return replace(unit, images=path if "images" in tensors else None)


def read_candidates(folder: Path, name: str, ids: Sequence[int]) -> dict[int, Tensor]:
    """The candidates `name` (C, H, W) of those of the images `ids` that the run in `folder` has; by image."""
    found: dict[int, Tensor] = {}
    for path in sorted(folder.glob("log*.jsonl")):
        for record in _read_log(path):
            if record["name"] != name:
                continue
            tensors = _load(folder / "shards" / record["shard"])
            found |= {i: tensors["images"][row] for row, i in enumerate(tensors["ids"].tolist()) if i in ids}
    return found


def _open_folder(folder: Path, header: dict[str, Any]) -> None:
    """Create the folder of a new run, or check that it belongs to this run; other folders are not touched."""
    found: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        # claim_folder reports the errors.
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if isinstance(found, dict):
        header = _known_by(header, found)
    claim_folder("evaluate", folder, {"format": FORMAT, **header})
    remove_leftovers(writable_folder("evaluate", "out", folder / "shards"))


def _known_by(header: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The header, with the other header's numbers for the model if these are equal up to rounding.

    Numbers at other images say nothing about the model: then the data alone differ.
    """
    if "model" not in header or "model" not in other:
        return header
    if header.get("data") != other.get("data") or same_model(header["model"], other["model"]):
        return {**header, "model": other["model"]}
    return header


def _read_log(path: Path) -> Iterator[dict[str, Any]]:
    # A killed process may have left an incomplete line after the last line feed.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            if Path(record["shard"]).name != record["shard"]:
                raise ValueError("its shard is in another folder")
            [record[key] for key in ("name", "crc32", "seconds", "forward", "backward")]
            record["trace"] = tuple(check_line(step) for step in record.get("trace", ()))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            given = f"{path}, damaged in line {number} ({error})"
            raise ValueError(message("evaluate", "out", "a run folder with whole logs", given)) from error
        yield record


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)


def _read_shard(folder: Path, record: dict[str, Any], count: int) -> Unit:
    path = folder / "shards" / record["shard"]
    try:
        if _crc32(path) != record["crc32"]:
            raise ValueError("its checksum is not that of the log")
        tensors = _load(path, images=False)
        ids = tensors["ids"]
        if ids.dtype != torch.int64 or ids.dim() != 1 or not ((ids >= 0) & (ids < count)).all():
            raise ValueError(f"its ids are not those of {count} images")
        if any(value.shape[:1] != ids.shape for value in tensors.values()):
            raise ValueError("its results are not those of its ids")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(message("evaluate", "out", "a run folder with whole shards", f"{path} ({error})")) from error
    values = {k.removeprefix("values."): v for k, v in tensors.items() if k.startswith("values.")}
    passes = (record["seconds"], record["forward"], record["backward"])
    return Unit(record["name"], tensors["ids"], values, path, *passes, record["trace"])


def _load(path: Path, images: bool = True) -> dict[str, Tensor]:
    with safe_open(str(path), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if images or key != "images"}  # noqa: SIM118


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while part := file.read(2**24):
            crc = zlib.crc32(part, crc)
    return crc
