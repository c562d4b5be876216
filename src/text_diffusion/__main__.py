"""`text-diffusion train|sample|train-word-level|train-byte-level`: the same commands as the scripts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """usage: text-diffusion COMMAND [--flag value ...]

  train                       train a model (scripts/run_train.sh)
  sample                      write sentences (scripts/text_sample.sh)
  train-word-level FILE       train a word-level tokenizer (src/utils/custom_tokenizer.py)
  train-byte-level FILE       train a byte-level tokenizer

`text-diffusion COMMAND --help` lists the flags."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to the command that is named; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "train":
        from text_diffusion import train

        return train.main(arguments[1:])
    if name == "sample":
        from text_diffusion import sample

        return sample.main(arguments[1:])
    if name in ("train-word-level", "train-byte-level"):
        from text_diffusion import tokenizer

        return tokenizer.main(arguments)
    known = "train, sample, train-word-level or train-byte-level"
    print(f"error: COMMAND must be {known}, found {name!r}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
