"""Labelled sentences of data/simple, `sentence TAB label`, for `text_diffusion.control.train_classifier`.

python scripts/make_labeled.py > data/simple/simple_labeled.tsv                         made the committed file
python scripts/make_labeled.py --group red,blue,green,white > file.tsv                 one label for these, "other"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from text_diffusion.grammar import Grammar

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Print the first lines of the training text, each with the word of a slot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slot", default="color", help="color, food or state")
    parser.add_argument("--group", default="", help="words that share one label, red+blue+...; all others are `other`")
    parser.add_argument("--lines", type=int, default=4000)
    args = parser.parse_args()
    grammar = Grammar.load(ROOT / "data/simple/grammar.json")
    group = args.group.split(",") if args.group else []
    for line in (ROOT / "data/simple-train.txt").read_text(encoding="utf-8").splitlines()[: args.lines]:
        words = grammar.parse(line)
        assert words is not None, line
        word = words[args.slot]
        print(f"{line}\t{word if not group else '+'.join(group) if word in group else 'other'}")


if __name__ == "__main__":
    main()
