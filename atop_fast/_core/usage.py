"""`atop-fast --help`, which prints the usage before torch is imported, because the import takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """usage: atop-fast COMMAND [options]

    demo      AToP on real MNIST digits, from training to the report, in a few minutes on a CPU.
    train     From images to a report by a preset: atop-fast train PRESET [options].
    doctor    Check a defense's contract and look for gradient masking.
    evaluate  Attack a defense by a protocol, and judge it on fresh draws.
    judge     Judge defenses by the literature's rules and by a sound verdict: atop-fast judge DEFENSE|all [options].
    report    Show the results of a finished run: atop-fast report RUN [options].
    bench     Measure atop_fast against other libraries, plain PyTorch and torch.compile.
    env       Print versions, which backend owns which op, and why anything is missing.

`atop-fast COMMAND --help` lists a command's options, which a YAML file may give, too (--config=FILE).
Exit status: 0; 1 for a failed check or a file that cannot be written; 2 for bad input; 130 after Ctrl-C; 143 after
SIGTERM.
"""


def answer_usage(args: Sequence[str] | None = None) -> None:
    """Print the usage and exit if the arguments are only -h or --help, without a command."""
    if list(sys.argv[1:] if args is None else args) in (["-h"], ["--help"]):
        print(USAGE, end="")
        sys.exit(0)
