"""The benchmark of steering on E2E: its rules for what a sentence says, its split, and every part at toy size."""

from __future__ import annotations

import argparse
import csv
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from toy import SIZES, flags

from text_diffusion import train
from text_diffusion.generation import load_diffusion

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import control_e2e
import control_e2e_table
import e2e_sequence
from e2e_fields import FIELDS, PHRASES, RULES, Matcher, is_family_friendly, linear, parse
from e2e_infilling import Masked
from e2e_task import Task, write_texts

MEANING = parse(
    "name[The Eagle], eatType[pub], food[Fast food], priceRange[less than £20], rating[high], area[city centre], "
    "familyFriendly[no], near[Raja Indian Cuisine]"
)
MATCHER = Matcher([MEANING, {"name": "Cotto", "food": "Indian", "area": "riverside", "rating": "1 out of 5"}])
SAYS = (
    "Near Raja Indian Cuisine in the centre of town, Eagle is a highly rated fast-food pub where you pay under £20. "
    "Children are not welcome."
)


def test_meanings_are_read_and_written_as_sources() -> None:
    assert MEANING["priceRange"] == "less than £20"
    assert list(MEANING) == ["name", "eatType", "food", "priceRange", "rating", "area", "familyFriendly", "near"]
    assert linear(parse("name[Cotto], area[riverside]")) == "name Cotto area riverside"


def test_matcher_finds_what_is_said_in_other_words() -> None:
    assert {field: MATCHER.said(SAYS, field) for field in FIELDS} == {
        "name": ["The Eagle"],
        "area": ["city centre"],
        "food": ["Fast food"],  # and not the Indian one of the name
        "priceRange": ["less than £20"],
        "rating": ["high"],
        "familyFriendly": ["no"],
        "near": ["Raja Indian Cuisine"],
    }
    assert MATCHER.errors(SAYS, MEANING) == 0


def test_matcher_counts_what_is_missing_and_what_is_added() -> None:
    assert MATCHER.errors("The Eagle.", MEANING) == 6
    assert MATCHER.errors("The Eagle is by the river.", parse("name[The Eagle]")) == 1
    assert MATCHER.errors("Cotto is by the river.", parse("name[The Eagle], area[city centre]")) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it is family-friendly", "yes"),
        ("kids are welcome", "yes"),
        ("not far from the river, it welcomes families", "yes"),
        ("it is not suitable for families", "no"),
        ("it isn't kid friendly", "no"),
        ("children are not allowed", "no"),
        ("a non family-friendly pub", "no"),
        ("for adults only", "no"),
        ("a pub by the river", None),
    ],
)
def test_families(text: str, expected: str | None) -> None:
    assert is_family_friendly(text) == expected


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("priceRange", "high", "prices are very high"),
        ("priceRange", "moderate", "a moderate price range"),
        ("priceRange", "cheap", "low prices"),
        ("rating", "low", "a low customer rating"),
        ("rating", "average", "its customer rating is average"),
        ("rating", "3 out of 5", "rated three stars"),
    ],
)
def test_prices_and_ratings_are_not_confused(field: str, value: str, text: str) -> None:
    matcher = Matcher({field: value} for field, value in RULES)
    assert matcher.said(text, field) == [value]
    assert matcher.said(text, "rating" if field == "priceRange" else "priceRange") == []


def test_phrases_say_what_they_are_wanted_for() -> None:
    matcher = Matcher({field: value} for field, value in [*RULES, *PHRASES])
    for field, value in [*RULES, *PHRASES]:
        assert matcher.said(PHRASES.get((field, value), value), field) == [value], (field, value)


def test_middle_third_is_masked() -> None:
    masked = Masked.of("a b c d e f g")
    assert (masked.before, masked.behind, masked.template("[GAP:{n}]")) == (["a", "b"], ["f", "g"], "a b [GAP:3] f g")
    assert Task.touching(list("abcdefg"), 2, 2) == [
        tuple("abc"),
        tuple("bcd"),
        tuple("cde"),
        tuple("def"),
        tuple("efg"),
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two descriptions of each of 64 meanings, as CSV files like those of E2E."""
    folder = tmp_path_factory.mktemp("e2e")
    with (folder / "devset.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("mr", "ref"))
        for name, area, food, price, rating, family in product(
            ("The Eagle", "Cotto"), ("riverside", "city centre"), ("Chinese", "French"), ("cheap", "high"),
            ("low", "high"), ("yes", "no"),
        ):  # fmt: skip
            near = "Burger King" if food == "French" else "Café Rouge"
            fields = f"food[{food}], priceRange[{price}], rating[{rating}], area[{area}], familyFriendly[{family}]"
            friendly = "is family friendly" if family == "yes" else "is not family friendly"
            cost = "cheap" if price == "cheap" else "high price range"
            first = (
                f"{name} is a coffee shop that serves {cost} {food} food in the {area} near {near} . It {friendly} ."
            )
            for line in (f"{first} It has a {rating} customer rating .", f"With a {rating} customer rating , {first}"):
                writer.writerow((f"name[{name}], {fields}, near[{near}]", line))
    return folder


def trained(texts: Path, name: str, text: str, **options: Any) -> Path:
    folder = texts / name
    options = SIZES | {"steps": 2} | options
    if options.get("objective") == "autoregressive":  # which has no noise
        del options["num_channels"], options["diffusion_steps"]
    assert train.main(flags(dataset=texts / text, checkpoint_path=folder, **options)) == 0
    return folder / f"ema_0.9_{options['steps']:06d}.pt"


def test_split_keeps_meanings_apart(corpus: Path) -> None:
    task = Task.of(corpus, 20)
    assert (len(task.train), len(task.test)) == (108, 20)
    assert not {linear(row.meaning) for row in task.train} & {linear(row.meaning) for row in task.test}
    halves = task.halves()
    assert sum(map(len, halves)) == 20
    assert not {linear(row.meaning) for row in halves[0]} & {linear(row.meaning) for row in halves[1]}


def test_every_part_at_toy_size(corpus: Path, tmp_path: Path) -> None:
    task = Task.of(corpus, 20)
    write_texts(task, tmp_path)
    weights = trained(tmp_path, "free", "e2e-train.txt", steps=150, lr=0.02, warmup_steps=1)
    args = argparse.Namespace(
        weights=weights, keep=tmp_path, samples=4, calls=4, strength=2.0,
        classifier_steps=1, batch=1,
    )  # fmt: skip
    model = load_diffusion(args.weights)
    about = {"machine": "a machine", "trained": {"weights": "ema.pt", "seconds": 60.0}}
    results = {f"control_e2e_{name}": about | part(task, model, args) for name, part in control_e2e.PARTS.items()}
    assert [row["field"] for row in results["control_e2e_words"]["rows"]] == list(FIELDS)
    for row in results["control_e2e_words"]["rows"]:
        # The model knows nothing yet; what is said all the same is said by the words that must occur.
        assert row["says"] > 0.5 + row["chance"] / 2 or row["field"] == "familyFriendly", row
        assert row["people"] == row["people_alone"] == 1
    assert results["control_e2e_length"]["exact"] == 1
    assert [row["kept"] for row in results["control_e2e_infilling"]["rows"][:4]] == [1, 1, 1, 1]  # the last one is free
    source = {"condition": "source"}
    args = argparse.Namespace(
        weights=trained(tmp_path, "source", "source-train.tsv", **source), calls=2, candidates=2, scale=1.5, seed=0,
        steps=2, left_to_right_steps=2,
        left_to_right=trained(tmp_path, "ar", "source-train.tsv", **source, objective="autoregressive"),
    )  # fmt: skip
    sequence = e2e_sequence.measure(task, args)
    results["control_e2e_sequence"] = about | sequence
    people, *rows = sequence["rows"]
    assert people["errors"] == 0
    assert people["bleu"] > 50 > max(row["bleu"] for row in rows)
    assert min(row["errors"] for row in rows) > 0.2
    assert [row["way"] for row in rows] == [
        "diffusion, plain",
        "diffusion, plain, --mbr 2",
        "diffusion, --guidance_scale 1.5",
        "diffusion, --guidance_scale 1.5, --mbr 2",
        "left to right, drawn",
        "left to right, drawn, --mbr 2",
        "left to right, most probable words",
    ]
    page = control_e2e_table.render(results)
    assert page.count("Measured on a machine") == 6
    assert "| name | 2 | 4 | **" in page
