"""`atop-fast [COMMAND] --help`, which is printed before torch is imported, because the import takes seconds."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

USAGE = """usage: atop-fast COMMAND [options]

    demo      AToP on real MNIST digits, from training to the report, in a few minutes on a CPU.
    check     Try a classifier on your images, and write it as one file that other commands take.
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
    """Print the usage, or the options of a command, and exit if the arguments ask for help."""
    given = list(sys.argv[1:] if args is None else args)
    if not {"-h", "--help"} & set(given):
        return
    if f"\n    {given[0]} " in USAGE:
        from .help import command_help

        print(command_help(given[0], min(120, shutil.get_terminal_size().columns - 1)), end="")
    elif given[0] in ("-h", "--help"):
        print(USAGE, end="")
    else:
        return
    sys.exit(0)
