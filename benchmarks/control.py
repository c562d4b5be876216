"""What steering does to `simple`: do sentences obey, do they stay sentences, what is the rest of them like.

python benchmarks/control.py labels|words|infilling|composed|group|learned|table [--samples N] [--steps S]

All by the shipped weights; the classifiers, and the model of `learned`, are trained here, by the commands of
docs/control.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import common
import numpy as np
import table
import torch
from common import ROOT, environment, record

from text_diffusion.control import Avoid, Control, InnerSteps, Label, Labelled, Length, Scorer, Template, Want
from text_diffusion.control import classifier as classifiers
from text_diffusion.control.classifier import Classifier
from text_diffusion.control.vocabulary import Vocabulary
from text_diffusion.generation import TextDiffusion, load_diffusion
from text_diffusion.grammar import Grammar
from text_diffusion.metrics import kl_bits

WEIGHTS = ROOT / "ckpts/simple/ema_0.9999_025000.pt"
GRAMMAR = Grammar.load(ROOT / "data/simple/grammar.json")
COLOURS = GRAMMAR.slots["color"].words
GROUP = ("red", "blue", "green", "white")


def train(folder: Path, model: TextDiffusion, *flags: str) -> Classifier:
    """A classifier of a slot's words, or of a group of them, by the real commands; one that is there is taken."""
    labeled, out = folder / "labeled.tsv", folder / f"{'-'.join(flags).strip('-') or 'color'}.pt"
    if out.is_file():
        return classifiers.load(out, model)
    with labeled.open("w") as file:
        command = [sys.executable, str(ROOT / "scripts/make_labeled.py"), *flags]
        subprocess.run(command, check=True, stdout=file, env=environment() | {"PYTHONPATH": str(ROOT / "src")})
    command = [sys.executable, "-m", "text_diffusion.control.train_classifier", str(WEIGHTS)]
    subprocess.run(
        [*command, "--labeled", str(labeled), "--out", str(out)],
        check=True,
        env=environment() | {"PYTHONPATH": str(ROOT / "src")},
    )
    return classifiers.load(out, model)


def others_kl(sentences: Sequence[str], slots: Sequence[str]) -> float:
    """Sum over slots of KL(true || sampled), of the lines that are sentences, in bits."""
    ids = GRAMMAR.encode(sentences)
    ids = np.compress(np.isfinite(GRAMMAR.log2_probs(ids)), ids, axis=0)
    total = 0.0
    for name in slots:
        probs = np.array(list(GRAMMAR.marginals[name].values()))
        counts = np.bincount(ids[:, GRAMMAR.places.index(name)], minlength=len(probs)) + 0.5
        total += kl_bits(probs, counts)
    return total


def measure(
    model: TextDiffusion,
    name: str,
    cases: Sequence[tuple[list[Control], Callable[[dict[str, str]], bool]]],
    slots: Sequence[str],
    samples: int,
    steps: int,
    kept: Sequence[str] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Of `samples` sentences of each case: the share that are sentences and obey, and the other slots' KL, pooled.

    With the cases' templates also the share of sentences that have all their known words.
    """
    obeyed, valid, pooled, shares, seconds, whole = 0, 0, list[str](), list[float](), 0.0, 0
    for seed, (controls, is_obeyed) in enumerate(cases):  # else all cases would meet the same noise
        started = time.perf_counter()
        sentences = model.sample(samples, steps=steps, controls=controls, seed=seed, **settings)
        seconds += time.perf_counter() - started
        parsed = [GRAMMAR.parse(line) for line in sentences]
        good = sum(words is not None and is_obeyed(words) for words in parsed)
        valid += sum(words is not None for words in parsed)
        obeyed += good
        shares.append(good / samples)
        pooled += sentences
        if kept:
            known = r"\S(?:.*\S)?".join(map(re.escape, re.split(r"\[GAP[^]]*\]", kept[seed])))
            whole += sum(re.fullmatch(known, line) is not None for line in sentences)
    row = {
        "name": name,
        "samples": len(pooled),
        "steps": steps,
        "obeyed": obeyed / len(pooled),
        "lowest": min(shares),
        "valid": valid / len(pooled),
        "kl_bits": others_kl(pooled, slots),
        "ms": 1000 * seconds / len(pooled),
        **({"kept": whole / len(pooled)} if kept else {}),
    }
    print(row, flush=True)
    return row


def is_word(slot: str, *words: str) -> Callable[[dict[str, str]], bool]:
    """Whether a slot has one of the words."""
    return lambda parsed: parsed[slot] in words


def ideal_kl(slots: Sequence[str], samples: int) -> float:
    """What `others_kl` comes to for a perfect sampler, on average."""
    words = sum(len(GRAMMAR.slots[name].words) - 1 for name in slots)
    return float(words / (2 * samples * np.log(2)))


def labels(model: TextDiffusion, folder: Path, samples: int, steps: int) -> dict[str, Any]:
    """Each colour, by its classifier."""
    classifier = train(folder, model)
    others = ("food", "state")
    few = max(samples // 10, 1)
    rows = [measure(model, "none", [([], lambda parsed: True)], others, few * len(COLOURS), steps)]
    usual, name = Label.strength, f"strength {Label.strength:g}"
    variants: list[tuple[str, int, list[Control], float, dict[str, Any]]] = [
        (f"score, {name} (default)", samples, [], usual, {}),
        ("score, strength 1", few, [], 1.0, {}),
        (f"3 Adagrad steps, {name}", few, [InnerSteps(3, 0.1)], usual, {}),
        (f"score, {name}, ancestral", few, [], usual, {"sampler": "ancestral"}),
        (f"score, {name}, heun", few, [], usual, {"sampler": "heun"}),
    ]
    for name, count, update, strength, settings in variants:
        cases: list[Any] = [
            ([Label(classifier, colour, strength), *update], is_word("color", colour)) for colour in COLOURS
        ]
        rows.append(measure(model, name, cases, others, count, steps, **settings))
    return {"rows": rows, "ideal_kl": ideal_kl(others, samples * len(COLOURS))}


def words(model: TextDiffusion, folder: Path, samples: int, steps: int) -> dict[str, Any]:
    """Each colour, through the model's own word probabilities."""
    others = ("food", "state")
    vocabulary = Vocabulary(model.tokenizer)

    def scorer(colour: str) -> Scorer:
        (token,), _ = vocabulary.spell(colour)
        return Scorer(lambda log_p: log_p[:, :, token].logsumexp(dim=1), strength=20)

    cases: dict[str, list[Any]] = {
        "--want COLOUR": [([Want(colour)], is_word("color", colour)) for colour in COLOURS],
        "--want COLOUR@2": [([Want(colour, 2)], is_word("color", colour)) for colour in COLOURS],
        "--avoid, all other colours": [
            ([Avoid(other) for other in COLOURS if other != colour], is_word("color", colour)) for colour in COLOURS
        ],
        "a Scorer in Python, strength 20": [([scorer(colour)], is_word("color", colour)) for colour in COLOURS],
    }
    few = max(samples // 10, 1)
    rows = [
        measure(model, name, case, others, samples if "want" in name else few, steps) for name, case in cases.items()
    ]
    return {"rows": rows, "ideal_kl": ideal_kl(others, samples * len(COLOURS))}


def infilling(model: TextDiffusion, folder: Path, samples: int, steps: int) -> dict[str, Any]:
    """The two gaps of a template, of free length and of one word; and each colour as a known word."""
    count = samples * len(COLOURS)
    rows = []
    for gap in ("[GAP]", "[GAP:1]"):
        template = f"The {gap} apple is {gap}."
        case: list[Any] = [([Template(template)], is_word("food", "apple"))]
        rows.append(measure(model, template, case, ("color", "state"), count, steps, kept=[template]))
    templates = [f"The {colour} [GAP] is [GAP]." for colour in COLOURS]
    cases: list[Any] = [
        ([Template(one)], is_word("color", colour)) for one, colour in zip(templates, COLOURS, strict=True)
    ]
    rows.append(measure(model, "The COLOUR [GAP] is [GAP].", cases, ("food", "state"), samples, steps, kept=templates))
    return {"rows": rows, "ideal_kl": ideal_kl(("food", "state"), count)}


def composed(model: TextDiffusion, folder: Path, samples: int, steps: int) -> dict[str, Any]:
    """Colour, state and length at once; by two classifiers, and by words."""
    colour, state = train(folder, model), train(folder, model, "--slot", "state")
    generator = np.random.default_rng(0)
    states = list(GRAMMAR.slots["state"].words)
    pairs = [(c, states[int(generator.integers(len(states)))]) for c in COLOURS]

    def both(c: str, s: str) -> Callable[[dict[str, str]], bool]:
        return lambda parsed: parsed["color"] == c and parsed["state"] == s

    by_label: list[Any] = [([Label(colour, c), Label(state, s), Length(5, 5)], both(c, s)) for c, s in pairs]
    by_word: list[Any] = [([Want(c), Want(s), Length(5, 5)], both(c, s)) for c, s in pairs]
    mixed: list[Any] = [([Label(colour, c), Want(s), Length(5, 5)], both(c, s)) for c, s in pairs]
    rows = [
        measure(model, name, case, ("food",), samples, steps)
        for name, case in (("two classifiers", by_label), ("two words", by_word), ("a classifier and a word", mixed))
    ]
    return {"rows": rows, "ideal_kl": ideal_kl(("food",), samples * len(pairs)), "pairs": pairs}


def group(model: TextDiffusion, folder: Path, samples: int, steps: int) -> dict[str, Any]:
    """The original's walk-through: {red, blue, green, white} as one label."""
    classifier = train(folder, model, "--group", ",".join(GROUP))
    count = samples * len(COLOURS)
    case: list[Any] = [([Label(classifier, "+".join(GROUP))], is_word("color", *GROUP))]
    rows = [measure(model, "one label of four colours", case, ("food", "state"), count, steps)]
    return {"rows": rows, "ideal_kl": ideal_kl(("food", "state"), count)}


def learned(model: TextDiffusion, folder: Path, samples: int, steps: int) -> dict[str, Any]:
    """Each colour, by a model that was trained with labels; a scale above 1 is classifier-free guidance."""
    weights = folder / "learned" / "ema_0.9999_004000.pt"
    if not weights.is_file():
        weights = common.train(
            folder / "learned", "simple", 4000, ["--condition", "labels", "--objective", "diffusion_lm"]
        ).weights
    model, others = load_diffusion(weights), ("food", "state")
    rows = []
    for scale in (1.0, 1.25, 1.5, 2.0):
        cases: list[Any] = [([Labelled(colour, scale)], is_word("color", colour)) for colour in COLOURS]
        rows.append(measure(model, f"--guidance_scale {scale:g}", cases, others, samples, steps))
    return {"rows": rows, "ideal_kl": ideal_kl(others, samples * len(COLOURS))}


PARTS = {
    "labels": labels,
    "words": words,
    "infilling": infilling,
    "composed": composed,
    "group": group,
    "learned": learned,
}


def main() -> None:
    """Measure a part, and write it into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "table"))
    parser.add_argument("--samples", type=int, default=1000, help="of each of 10 colours or pairs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="for the classifiers, to be used again")
    args = parser.parse_args()
    if args.part != "table":
        torch.set_num_threads(1)
        model = load_diffusion(WEIGHTS)
        with tempfile.TemporaryDirectory() as folder:
            figures = PARTS[args.part](model, args.folder or Path(folder), args.samples, args.steps)
        record(f"control_{args.part}", figures)
    table.write()


if __name__ == "__main__":
    main()
