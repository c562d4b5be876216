"""`text-diffusion COMMAND`: the same commands as the scripts."""

from __future__ import annotations

import importlib
import socket
import sys
from collections.abc import Sequence

from text_diffusion import errors, launcher

# name: module, and what it does
COMMANDS = {
    "train": ("train", "train a model (scripts/run_train.sh)"),
    "sample": ("sample", "write sentences (scripts/text_sample.sh)"),
    "evaluate": ("evaluate", "measure samples beside real text (scripts/evaluate.sh)"),
    "likelihood": ("likelihood", "how many bits a model needs for a text"),
    "report": ("report", "write a page about a run, or compare several (scripts/report.sh)"),
    "train-word-level": ("tokenizer", "train a word-level tokenizer (src/utils/custom_tokenizer.py)"),
    "train-byte-level": ("tokenizer", "train a byte-level tokenizer"),
}


def usage() -> str:
    """What there is."""
    lines = [f"  {name:<20}{help}" for name, (_, help) in COMMANDS.items()]
    return "\n".join(
        ["usage: text-diffusion COMMAND [--flag value ...]", "", *lines, "", "`COMMAND --help` lists its flags."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to the command that is named; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        return errors.run(lambda _: print(usage()))
    if name not in COMMANDS:
        print(f"error: COMMAND must be one of {', '.join(COMMANDS)}, found {name!r}", file=sys.stderr)
        return 1
    module = COMMANDS[name][0]
    status: int
    try:
        launcher.mpi_world()  # MPI starts before PyTorch is loaded: if that fails on one host, the others are told
        command = importlib.import_module(f"text_diffusion.{module}")
    except BaseException as error:  # once it is there the command itself sees to its errors
        status = errors.say(explained(error))
        launcher.abort(status)
    else:
        status = command.main(arguments if module == "tokenizer" else arguments[1:])
    return status


def explained(error: BaseException) -> BaseException:
    """A library that is not there as a sentence; every other error as it is."""
    if isinstance(error, ImportError) and not (error.name or "").startswith("text_diffusion"):
        return errors.UserError(
            f"expected the libraries of requirements.txt, found on {socket.gethostname()}: {error}; "
            f"`{sys.executable} -m pip install -r requirements.txt` installs them"
        )
    return error


if __name__ == "__main__":
    sys.exit(main())
