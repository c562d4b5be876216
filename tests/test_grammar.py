"""Languages that are known exactly: sentences, probabilities and figures, by hand and against sampling."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from text_diffusion.grammar import Grammar

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


N = 10_000  # the sample size at which models are judged


def read_lines(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar.load(DATA / "simple" / "grammar.json")


@pytest.fixture(scope="module")
def ideal_samples(grammar: Grammar) -> list[list[str]]:
    rng = np.random.default_rng(0)
    return [grammar.sample(N, rng) for _ in range(10)]


# Sentences


def test_parse_inverts_the_template(grammar: Grammar) -> None:
    assert grammar.parse("The red apple is rotten.") == {"color": "red", "food": "apple", "state": "rotten"}


@pytest.mark.parametrize(
    "sentence",
    [
        "The red apple is very rotten.",
        "the red apple is rotten.",
        "The red Apple is rotten.",
        "The red apple is rotten",
        "The red apple is rotten!",
        "The red  apple is rotten.",
        "The red apple is rotten. ",
        "The red apple is rotten.\n",
        " The red apple is rotten.",
        "The red apple is red.",
        "The apple red is rotten.",
        "The red apples is rotten.",
        "",
    ],
)
def test_parse_rejects_near_misses(grammar: Grammar, sentence: str) -> None:
    assert grammar.parse(sentence) is None
    assert grammar.log2_prob(sentence) == -math.inf


def test_parse_takes_template_and_words_literally() -> None:
    grammar = Grammar("({x}) {y}? {x}*", {"y": {"a": 1, "a b": 1, "a.": 1}, "x": {"1+1": 1, "1": 1}})
    assert grammar.parse("(1+1) a b? 1+1*") == {"y": "a b", "x": "1+1"}
    assert grammar.parse("(1) a.? 1*") == {"y": "a.", "x": "1"}
    assert grammar.parse("(1) ab? 1*") is None
    assert grammar.parse("(1) a? 1+1*") is None
    assert all(grammar.parse(sentence) for sentence in grammar.sample(20, np.random.default_rng(0)))


def test_sample_is_reproducible(grammar: Grammar) -> None:
    first, second, other = (grammar.sample(50, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == second != other
    assert grammar.sample(0, np.random.default_rng(0)) == []


# Exact figures against sampling


def test_entropy(grammar: Grammar, ideal_samples: list[list[str]]) -> None:
    assert grammar.entropy_bits() == pytest.approx(14.759, abs=5e-4)
    bits = [-grammar.log2_prob(sentence) for sentence in ideal_samples[0]]
    assert np.mean(bits) == pytest.approx(grammar.entropy_bits(), abs=5 * float(np.std(bits)) / math.sqrt(N))


def test_log2_prob_matches_frequencies() -> None:
    grammar = Grammar("{a} {b}", {"a": {"x": 3, "y": 1}, "b": {"p": 5, "q": 4, "r": 1}})
    counts = Counter(grammar.sample(N, np.random.default_rng(3)))
    assert len(counts) == 6
    assert math.fsum(2 ** grammar.log2_prob(sentence) for sentence in counts) == pytest.approx(1)
    for sentence, count in counts.items():
        p = 2 ** grammar.log2_prob(sentence)
        assert count / N == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / N))


def test_zero_probability_word() -> None:
    grammar = Grammar("{a}", {"a": {"x": 1, "never": 0}})
    assert grammar.log2_prob("never") == -math.inf
    assert (grammar.entropy_bits(), grammar.expected_unique(4), grammar.log2_prob("x")) == (0, 0.25, 0)


def test_expected_unique(grammar: Grammar, ideal_samples: list[list[str]]) -> None:
    expected = grammar.expected_unique(N)
    shares = [len(set(sample)) / N for sample in ideal_samples]
    assert expected == pytest.approx(0.781, abs=5e-4)
    # One draw's standard deviation is 0.0033, so the mean of ten has 0.0011.
    assert np.mean(shares) == pytest.approx(expected, abs=0.005)
    assert grammar.expected_unique(1) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one sample"):
        grammar.expected_unique(0)


def test_expected_novel(grammar: Grammar, ideal_samples: list[list[str]]) -> None:
    train = read_lines("simple-train.txt")
    known = set(train)
    expected = grammar.expected_novel(train)
    shares = [np.mean([sentence not in known for sentence in sample]) for sample in ideal_samples]
    assert np.mean(shares) == pytest.approx(expected, abs=0.01)
    assert grammar.expected_novel([]) == 1
    assert grammar.expected_novel([*train, *train, "Not a sentence of the grammar."]) == pytest.approx(expected)


def test_slot_kl_of_ideal_samples(grammar: Grammar, ideal_samples: list[list[str]]) -> None:
    floor = (10 + 93 + 54 - 3) / (2 * N * math.log(2))
    assert floor == pytest.approx(0.011, abs=2e-4)
    # One draw's standard deviation is 0.0012 bit, so the mean of ten has 0.0004.
    assert np.mean([grammar.slot_kl_bits(grammar.encode(s)) for s in ideal_samples]) == pytest.approx(floor, abs=0.002)


def test_slot_kl_of_poor_samples(grammar: Grammar, ideal_samples: list[list[str]]) -> None:
    def slot_kl(lines: list[str]) -> float:
        return grammar.slot_kl_bits(grammar.encode(lines))

    sample = ideal_samples[0]
    assert 20 < slot_kl(["The red apple is rotten."] * N) < 100
    assert slot_kl([line.replace("red", "pink") for line in sample]) > 1
    assert slot_kl([*sample, "Not a sentence."]) == slot_kl(sample)
    assert math.isnan(slot_kl(["Not a sentence."]))


# A language whose slots constrain each other


SMALL = Grammar(  # by hand: P(one) = 3/4, then cow alone; P(two) = 1/4, then cows or geese, each at 1/2; the name twice
    "{who}: {count} {animal}, {who}",
    {
        "who": {"Ann": 1, "Bob": 1},
        "count": {"one": 3, "two": 1},
        "animal": {
            "given": "count",
            "cases": [{"when": ["one"], "words": {"cow": 7}}, {"when": ["two"], "words": {"cows": 2, "geese": 2}}],
        },
    },
)


@pytest.fixture(scope="module")
def animals() -> Grammar:
    return Grammar.load(DATA / "animals" / "grammar.json")


@pytest.mark.parametrize(
    ("sentence", "probability"),
    [
        ("Ann: one cow, Ann", 3 / 8),
        ("Bob: one cow, Bob", 3 / 8),
        ("Ann: two cows, Ann", 1 / 16),
        ("Bob: two geese, Bob", 1 / 16),
        ("Ann: one cow, Bob", 0),
        ("Ann: one cows, Ann", 0),
        ("Ann: two cow, Ann", 0),
    ],
)
def test_probabilities_by_hand(sentence: str, probability: float) -> None:
    assert 2 ** SMALL.log2_prob(sentence) == pytest.approx(probability)
    assert (SMALL.parse(sentence) is None) == (probability == 0)


def test_figures_by_hand() -> None:
    ids, probs = SMALL.support
    assert sorted(SMALL.decode(ids)) == sorted(
        f"{who}: {what}, {who}" for who in ("Ann", "Bob") for what in ("one cow", "two cows", "two geese")
    )
    assert probs.sum() == pytest.approx(1)
    count_bits = 2 - 0.75 * math.log2(3)
    assert SMALL.entropy_bits() == pytest.approx(1 + count_bits + 0.25)
    assert SMALL.marginals["animal"] == pytest.approx({"cow": 0.75, "cows": 0.125, "geese": 0.125})
    assert SMALL.true_mutual_information_bits == pytest.approx(1 + count_bits)  # who with who, count with animal
    assert SMALL.expected_unique(2) == pytest.approx(1 - (2 * (3 / 8) ** 2 + 4 * (1 / 16) ** 2) / 2)
    assert SMALL.expected_novel(["Ann: one cow, Ann", "Ann: one cow, Bob", "?"]) == pytest.approx(5 / 8)


def test_encode_takes_lines_of_the_shape_and_inverts_decode(animals: Grammar) -> None:
    ids = animals.sample_ids(1000, np.random.default_rng(0))
    np.testing.assert_array_equal(animals.encode(animals.decode(ids)), ids)
    rows = SMALL.encode(["Ann: two cow, Bob", "Ann: two dogs, Bob"])
    assert rows.tolist() == [[0, 1, 0, 1], [-1] * 4]
    assert np.isneginf(SMALL.log2_probs(rows)).all()


@pytest.mark.parametrize(
    ("sentence", "valid"),
    [
        ("Anna has two goats that chew hay, so Anna is happy.", True),
        ("Anna has two goats that chew hay, so Ben is happy.", False),  # copied word
        ("Anna has two goat that chew hay, so Anna is happy.", False),  # number of the noun
        ("Anna has two goats that chews hay, so Anna is happy.", False),  # number of the verb
        ("Anna has two goats that steal hay, so Anna is happy.", False),  # what goats do
        ("Anna has two goats that chew fish, so Anna is happy.", False),  # what goats eat
    ],
)
def test_constraints_of_animals(animals: Grammar, sentence: str, valid: bool) -> None:
    assert (animals.parse(sentence) is not None) is valid
    assert (animals.encode([sentence]) >= 0).all()  # it has the shape


def test_exact_figures_of_animals_agree_with_each_other(animals: Grammar) -> None:
    ids, probs = animals.support
    assert len(probs) == 16 * 10 * 24 * 5 * 10 * 10
    assert probs.sum() == pytest.approx(1)
    assert animals.entropy_bits() == pytest.approx(-float((probs * np.log2(probs)).sum()))
    assert animals.entropy_bits() == pytest.approx(20.385, abs=5e-4)
    some = np.random.default_rng(0).integers(len(probs), size=1000)
    np.testing.assert_allclose(animals.log2_probs(ids[some]), np.log2(probs[some]))


def test_independent_words_fail_on_animals_only(grammar: Grammar, animals: Grammar) -> None:
    """Each place drawn from its true frequencies, alone: perfect on `simple`, almost never a sentence of `animals`."""
    rng = np.random.default_rng(0)

    def valid_and_kl(language: Grammar) -> tuple[float, float]:
        ids = rng.permuted(language.sample_ids(N, rng), axis=0)
        return float(np.isfinite(language.log2_probs(ids)).mean()), language.slot_kl_bits(ids)

    valid, kl = valid_and_kl(grammar)
    assert valid == 1
    assert kl == pytest.approx(0.011, abs=0.006)
    valid, kl = valid_and_kl(animals)
    assert valid < 0.01
    assert kl < 0.02  # word frequencies alone do not tell


def test_mutual_information_of_samples(grammar: Grammar, animals: Grammar) -> None:
    rng = np.random.default_rng(0)
    assert grammar.true_mutual_information_bits == pytest.approx(0, abs=1e-9)
    for language in (grammar, animals):
        sizes = [len(language.slots[name].words) for name in language.places]
        ids = language.sample_ids(100_000, rng)
        bias = sum((a - 1) * (b - 1) for i, a in enumerate(sizes) for b in sizes[:i]) / (2 * len(ids) * math.log(2))
        excess = language.mutual_information_bits(ids) - language.true_mutual_information_bits
        assert 0 < excess < bias + 0.02  # pairs that exclude each other have fewer free cells


# Malformed files


def test_load_normalises(tmp_path: Path) -> None:
    path = tmp_path / "grammar.json"
    path.write_text(json.dumps({"template": "{a}!", "slots": {"a": {"x": 3, "y": 1}}}), encoding="utf-8")
    assert Grammar.load(path).marginals == {"a": {"x": 0.75, "y": 0.25}}


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the JSON file of a grammar, found: No such file"):
        Grammar.load(tmp_path / "grammar.json")


def conditional(given: str = "a", cases: object = None) -> str:
    """A grammar whose slot b depends on slot a, which has the words x and y."""
    whole = [{"when": ["x"], "words": {"p": 1}}, {"when": ["y"], "words": {"q": 1}}]
    slots = {"a": {"x": 1, "y": 1}, "b": {"given": given, "cases": whole if cases is None else cases}}
    return json.dumps({"template": "{a} {b}", "slots": slots})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "grammar.json: "),
        ("[]", "expected a JSON object"),
        ('{"slots": {"a": {"x": 1}}}', 'missing "template"'),
        ('{"template": "{a}"}', 'missing "slots"'),
        ('{"template": "{a}", "slots": {"a": {}}}', "slot 'a' has no words"),
        ('{"template": "{a}", "slots": {"a": ["x"]}}', "slot 'a' must map words to probabilities"),
        ('{"template": "{a}", "slots": {"a": {"x": -1, "y": 2}}}', "the probability of 'x' is negative"),
        ('{"template": "{a}", "slots": {"a": {"x": "1"}}}', "not a finite number"),
        ('{"template": "{a}", "slots": {"a": {"x": NaN}}}', "not a finite number"),
        ('{"template": "{a}", "slots": {"a": {"x": 0}}}', "sum to zero"),
        ('{"template": "{a}", "slots": {"a": {"": 1}}}', "empty word"),
        ('{"template": "{a} {b}", "slots": {"a": {"x": 1}}}', "slots that are not given: b"),
        ('{"template": "{a}", "slots": {"a": {"x": 1}, "b": {"y": 1}}}', "does not use: b"),
        ('{"template": "{a", "slots": {"a": {"x": 1}}}', "stray brace"),
        ('{"template": "a", "slots": {}}', "names no slot"),
        (conditional(given="b"), "slot 'b' is given 'b', which is not a slot before it"),
        (conditional(cases={}), "slot 'b' must list its \"cases\""),
        (conditional(cases=[{"when": ["x"]}]), "slot 'b' must map words to probabilities"),
        (conditional(cases=[{"when": ["z"], "words": {"p": 1}}]), "a case for 'z', which is not a word of slot 'a'"),
        (conditional(cases=[{"when": ["x", "x"], "words": {"p": 1}}]), "two cases for 'x'"),
        (conditional(cases=[{"when": ["x"], "words": {"p": 1}}]), "no case for 'y'"),
    ],
)
def test_load_rejects_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "grammar.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        Grammar.load(path)
