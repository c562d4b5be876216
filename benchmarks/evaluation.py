"""Can the evaluation be fooled? Four cheating samplers, real text and the diffusion model go through it.

python benchmarks/evaluation.py animals [--weights CKPT]          data/animals; without --weights it trains first
python benchmarks/evaluation.py e2e FOLDER [--weights CKPT]       the CSV files of E2E, see e2e.py
python benchmarks/evaluation.py table                             only write the tables again, from results.json
python benchmarks/evaluation.py split FOLDER OUT                  only write OUT/e2e-train.txt and OUT/e2e-test.txt

--teacher CKPT, trained with --objective autoregressive, judges by perplexity and writes a text too; without it a
counted model of word triples judges. Weights must have been trained on the same text (for E2E: that of `split`, also by
--train_txt_path).
The tables go to docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import e2e
import numpy as np
import table
from common import ROOT, record, train

from text_diffusion import evaluate, figures, load
from text_diffusion.figures import Scorer
from text_diffusion.files import read_lines
from text_diffusion.grammar import Grammar
from text_diffusion.metrics import Floats
from text_diffusion.ngrams import Ints, words_of
from text_diffusion.teacher import load_teacher


@dataclass(frozen=True)
class Task:
    """What a sampler learns from, and what it is held to."""

    name: str
    train: list[str]
    test: list[str]
    grammar: Grammar | None = None


class CountedTeacher:
    """A teacher that any text trains in a second: word triples, pairs and words, counted and mixed with fixed shares.

    P(w | u v) = 0.6 P_3(w | u v) + 0.3 P_2(w | v) + 0.099 P_1(w) + 0.001 / V     (Jelinek and Mercer 1980)
    """

    SHARES = ((3, 0.6), (2, 0.3), (1, 0.099))

    def __init__(self, lines: Sequence[str]) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.contexts: Counter[tuple[str, ...]] = Counter()
        for triple in (triple for line in lines for triple in self._triples(line)):
            for n, _ in self.SHARES:
                self.counts[triple[3 - n :]] += 1
                self.contexts[triple[3 - n : 2]] += 1
        self.vocab_size = sum(len(gram) == 1 for gram in self.counts) + 1  # one for all that is unknown

    def __call__(self, lines: Sequence[str]) -> tuple[Floats, Ints]:
        """-log2 P(line), end of line included, and its tokens."""
        triples = [self._triples(line) for line in lines]
        bits = [-sum(math.log2(self._p(triple)) for triple in line) for line in triples]
        return np.array(bits), np.array(list(map(len, triples)))

    def _p(self, triple: tuple[str, ...]) -> float:
        total = 0.001 / self.vocab_size
        for n, share in self.SHARES:
            if seen := self.contexts[triple[3 - n : 2]]:
                total += share * self.counts[triple[3 - n :]] / seen
        return total

    @staticmethod
    def _triples(line: str) -> list[tuple[str, ...]]:
        words = ["<s>", "<s>", *words_of(line), "</s>"]
        return [tuple(words[i : i + 3]) for i in range(len(words) - 2)]


def cheapest_pattern(words: Sequence[list[str]], teacher: CountedTeacher) -> tuple[str, ...]:
    """Of the frequent runs of 1 to 8 words, the one that the teacher likes best when it is said again and again."""
    found: list[tuple[str, ...]] = []
    for n in range(1, 9):
        runs = Counter(tuple(line[i : i + n]) for line in words for i in range(len(line) - n + 1))
        found += [run for run, _ in runs.most_common(200)]
    length = sum(map(len, words)) // len(words)
    bits, tokens = teacher([" ".join(run[i % len(run)] for i in range(length)) for run in found])
    return found[int((bits / tokens).argmin())]


def cheats(lines: Sequence[str], n: int, teacher: CountedTeacher, rng: np.random.Generator) -> dict[str, list[str]]:
    """n lines of each way to cheat, all from the training lines."""
    words = [line.split() for line in lines]
    pool = [word for line in words for word in line]
    lengths = [len(words[i]) for i in rng.integers(len(words), size=n)]
    pattern = cheapest_pattern(words, teacher)
    drawn = iter(rng.integers(len(pool), size=sum(lengths)).tolist())
    return {
        "copies of training lines": [lines[i] for i in rng.integers(len(lines), size=n)],
        "one sentence repeated": [Counter(lines).most_common(1)[0][0]] * n,
        "words drawn independently": [" ".join(pool[next(drawn)] for _ in range(length)) for length in lengths],
        "a periodic pattern": [" ".join(pattern[i % len(pattern)] for i in range(length)) for length in lengths],
    }


def exact(name: str) -> Task:
    """A corpus that is known exactly."""
    grammar = Grammar.load(ROOT / f"data/{name}/grammar.json")
    lines = [read_lines(ROOT / f"data/{name}-{part}.txt") for part in ("train", "test")]
    return Task(name, lines[0], lines[1], grammar)


def restaurants(folder: Path) -> Task:
    """E2E, split so that no meaning representation is on two sides."""
    return Task("e2e", *e2e.split(folder))


def model_samples(task: Task, weights: Path | None, n: int, calls: Sequence[int]) -> dict[str, list[str]]:
    """n lines of the diffusion model for each number of sampling steps; trained here if no weights are given."""
    with tempfile.TemporaryDirectory() as name:
        if weights is None:
            write_split(task, Path(name))
            flags = ["--val_txt_path", str(Path(name) / f"{task.name}-test.txt")]
            weights = train(Path(name) / "run", str(Path(name) / f"{task.name}-train.txt"), flags=flags).weights
        model = load(str(weights))
    return {f"diffusion, {steps} steps": model.sample(n, steps=steps) for steps in calls}


def write_split(task: Task, folder: Path) -> None:
    """The two parts as files."""
    for part, lines in (("train", task.train), ("test", task.test)):
        (folder / f"{task.name}-{part}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def judge(task: Task, texts: dict[str, list[str]], teacher: Scorer) -> dict[str, Any]:
    """Each text through the whole suite, with the seconds that takes."""
    results = {}
    for name, lines in texts.items():
        started = time.perf_counter()
        result = figures.evaluate(lines, task.test, train=task.train, grammar=task.grammar, scorer=teacher)
        seconds = time.perf_counter() - started
        results[name] = {"seconds": seconds, "example": lines[0], **evaluate.as_json(result)}
        print(f"{name}: {evaluate.verdict(result)} ({seconds:.0f} s)", flush=True)
    return results


def badness(figure: dict[str, Any]) -> tuple[float, float]:
    """How far the samples of a figure are from its bar on the bad side: the ends of the interval."""
    bar, low, high = (figure["ideal"] or figure["real"])["value"], figure["samples"]["low"], figure["samples"]["high"]
    if figure["good"] == "high":
        return bar - high, bar - low
    if figure["good"] == "low":
        return low - bar, high - bar
    nearest = 0.0 if low <= bar <= high else min(abs(low - bar), abs(high - bar))
    return nearest, max(abs(low - bar), abs(high - bar))


def where_better(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Figures on which a is better than b, intervals apart."""
    both = [key for key in a["figures"] if key in b["figures"]]
    return [key for key in both if badness(a["figures"][key])[1] < badness(b["figures"][key])[0]]


def run(
    task: Task, weights: Path | None, judge_weights: Path | None, n: int, written: int, calls: Sequence[int]
) -> None:
    """Everything of one corpus; the figures go to results.json."""
    rng = np.random.default_rng(0)
    half = len(task.test) // 2
    counted = CountedTeacher(task.train)
    teacher: Scorer = counted if judge_weights is None else load_teacher(str(judge_weights))
    texts = cheats(task.train, n, counted, rng)
    cheaters = list(texts)
    if task.grammar is not None:
        texts["an ideal sampler"] = task.grammar.sample(n, rng)
    if judge_weights is not None:
        texts["the autoregressive teacher"] = load(str(judge_weights)).sample(written)
    texts |= model_samples(task, weights, written, calls) if calls else {}
    results = judge(task, texts, teacher)
    model = results[list(texts)[-1]]
    # Real text as if a sampler had written it: half of the test lines, beside the other half.
    other_half = Task(task.name, task.train, task.test[half:], task.grammar)
    results |= judge(other_half, {"real text": task.test[:half]}, teacher)
    better = {}
    for name in cheaters if calls else ():
        cheat = results[name]
        better[name] = {"cheat": where_better(cheat, model), "model": where_better(model, cheat)}
        print(f"{name}: better than the model on {better[name]['cheat']}, the model on {better[name]['model']}")
    about = {"samples": n, "written": written, "teacher": "counted" if judge_weights is None else "autoregressive"}
    record(f"evaluation-{task.name}", about | {"results": results, "better": better})


def main(argv: Sequence[str] | None = None) -> None:
    """Run one part and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("animals", "e2e", "split", "table"))
    parser.add_argument("folder", type=Path, nargs="?", help="for `e2e` and `split`")
    parser.add_argument("out", type=Path, nargs="?", help="for `split`")
    parser.add_argument("--weights", type=Path, help="of a diffusion model trained on the same lines")
    parser.add_argument("--teacher", type=Path, help="weights of a model that writes left to right, likewise")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--written", type=int, default=10_000, help="lines that each of the trained models writes")
    parser.add_argument(
        "--calls", default="1,4,20", help="sampling steps, separated by commas; the last is the model's"
    )
    args = parser.parse_args(argv)
    if args.part in ("e2e", "split") and args.folder is None:
        parser.error(f"{args.part} needs a FOLDER")
    calls = [int(number) for number in args.calls.split(",") if number]
    if args.part == "split":
        args.out.mkdir(parents=True, exist_ok=True)
        write_split(restaurants(args.folder), args.out)
    elif args.part != "table":
        task = exact("animals") if args.part == "animals" else restaurants(args.folder)
        run(task, args.weights, args.teacher, args.samples, args.written, calls)
    table.write()


if __name__ == "__main__":
    main()
