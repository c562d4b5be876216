"""Labelled sentences of data/simple, `sentence TAB label`, for `text_diffusion.control.train_classifier`.

python scripts/make_labeled.py > data/simple/simple_labeled.tsv                         made the committed file
python scripts/make_labeled.py --group red,blue,green,white > file.tsv                 one label for these, "other"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from text_diffusion.grammar import Grammar  # noqa: E402  (the package need not be installed)


def main() -> None:
    """Print the first lines of the training text, each with the word of a slot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    grammar = Grammar.load(ROOT / "data/simple/grammar.json")
    parser.add_argument("--slot", default="color", choices=grammar.slots)
    parser.add_argument("--group", default="", help="words that share one label, red,blue,...; all others are `other`")
    parser.add_argument("--lines", type=int, default=4000)
    args = parser.parse_args()
    group = args.group.split(",") if args.group else []
    if unknown := set(group) - set(grammar.slots[args.slot].words):
        parser.error(f"--group expects words of {args.slot}, found {', '.join(sorted(unknown))}")
    for line in (ROOT / "data/simple-train.txt").read_text(encoding="utf-8").splitlines()[: args.lines]:
        words = grammar.parse(line)
        assert words is not None, line
        word = words[args.slot]
        print(f"{line}\t{word if not group else '+'.join(group) if word in group else 'other'}")


if __name__ == "__main__":
    main()
