"""The demo with its time and its machine recorded: writes results/demo--cpu.json and docs/demo.png."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from _results import RESULTS, metadata

from atop_fast._core.files import write_text
from atop_fast.recipes.run import run_recipe
from atop_fast.recipes.schema import load_recipe

PICTURE = Path(__file__).parent.parent / "docs" / "demo.png"


def main() -> None:
    """Run the demo once for each seed; the first one's report and picture are kept whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--commit", help="commit to record; by default what git says")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            report = run_recipe(load_recipe("demo"), folder, seed=seed)
            runs.append({"seconds": round(time.perf_counter() - start), **report})
            if seed == args.seeds[0]:
                shutil.copyfile(Path(folder) / "gallery.png", PICTURE)
    document = {**metadata("cpu", args.commit), "runs": runs}
    write_text(RESULTS / "demo--cpu.json", json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
