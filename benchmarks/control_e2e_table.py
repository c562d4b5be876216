"""The table of steering on E2E in docs/control.md."""

from __future__ import annotations

from typing import Any

NAMES = {"priceRange": "price range", "familyFriendly": "family friendly"}


def percent(share: float) -> str:
    """With one place."""
    return f"{share:.1%}"


def render(results: dict[str, Any]) -> str:
    """Every part that has been measured."""
    parts = {
        name: (results[f"control_e2e_{name}"], renderer)
        for name, renderer in RENDERERS.items()
        if f"control_e2e_{name}" in results
    }
    blocks = [renderer(part) for part, renderer in parts.values()]
    machines = [f"Measured on {part['machine']}: {name}." for name, (part, _) in parts.items()]
    return "\n\n".join([*blocks, *machines]) or "Not measured yet."


def of_training(about: dict[str, Any]) -> str:
    """How long a model has learned."""
    return f"`{about['weights']}`" + (f", trained for {about['seconds'] / 60:.0f} minutes" if about["seconds"] else "")


def fields(title: str, part: dict[str, Any]) -> str:
    """Each field: success beside people's, and what became of the sentences."""
    lines = [
        f"**{title}** ({part['calls']} steps, {of_training(part['trained'])}):",
        "",
        "| field | values | samples | says it | lowest value | people | without steering | and no other value (people; "
        "without steering, of those that say one) | triples | ms a sentence |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        cells = (
            NAMES.get(row["field"], row["field"]),
            row["values"],
            f"{row['samples']:,}",
            f"**{percent(row['says'])}**",
            f"{percent(row['lowest'])} ({row['lowest_value']})",
            percent(row["people"]),
            percent(row["chance"]),
            f"{percent(row['alone'])} ({percent(row['people_alone'])}; {percent(row['chance_alone'])})",
            percent(row["triples"]),
            f"{row['ms']:.0f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    rows = part["rows"]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("says", "people", "chance", "triples")}
    lines += [
        f"| mean | | | **{percent(mean['says'])}** | | {percent(mean['people'])} | {percent(mean['chance'])} | "
        f"| {percent(mean['triples'])} | |",
        "",
        f"Triples: without steering {percent(part['unguided']['triples'])}, people {percent(part['people_triples'])}. "
        f"Copies of training lines: at most {percent(max(row['copies'] for row in rows))} of a field.",
    ]
    return "\n".join(lines)


def words(part: dict[str, Any]) -> str:
    """By words."""
    return fields("Each value of each field, by words that must occur", part)


def labels(part: dict[str, Any]) -> str:
    """By classifiers."""
    return fields(f"The same by a classifier of each field, --guidance_strength {part['strength']:g}", part)


def length(part: dict[str, Any]) -> str:
    """Exactness."""
    return (
        f"**Length**: {part['exact']:.2%} of {part['samples']:,} sentences have exactly as many words as asked for "
        f"({', '.join(map(str, part['lengths']))}, which are deciles of held-out text); triples "
        f"{percent(part['triples'])}, without steering {percent(part['unguided']['triples'])}."
    )


def infilling(part: dict[str, Any]) -> str:
    """Kept words, and the triples at the gap."""
    lines = [
        "**Infilling** of the middle third of held-out descriptions. Triples: of those that have a word in the gap, "
        "the share that occurs in the half of the held-out text that no template comes from.",
        "",
        "| by | lines | known words kept | triples | people's | ms a sentence |",
        "|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        lines.append(
            f"| {row['gap']} | {row['samples']:,} | {percent(row['kept'])} | {percent(row['triples'])} | "
            f"{percent(row['people'])} | {row['ms']:.0f} |"
        )
    row = part["rows"][0]
    refused = row["refused"] / (row["samples"] + row["refused"])
    template, filled = row["examples"][0]
    return "\n".join(
        [
            *lines,
            "",
            f"Refused, as the training text lacks a word of theirs: {percent(refused)} of the templates. The first:",
            "",
            "```text",
            template,
            filled,
            "```",
        ]
    )


def sequence(part: dict[str, Any]) -> str:
    """BLEU and slot errors."""
    sizes = "; ".join(
        f"{name}: {about['parameters'] / 1000:.0f} thousand parameters, {of_training(about)}"
        for name, about in part["trained"].items()
    )
    lines = [
        f"**From the meaning representation to the description**: {part['sources']} held-out meanings, "
        f"{part['calls']} steps; {sizes}.",
        "",
        "| by | BLEU | slot errors | copies of training lines | ms a sentence |",
        "|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        rest = f"{percent(row['copies'])} | {row['ms']:.0f}" if "ms" in row else " | "
        lines.append(f"| {row['way']} | {row['bleu']:.1f} | {percent(row['errors'])} | {rest} |")
    return "\n".join(lines)


def price(part: dict[str, Any]) -> str:
    """Time against none."""
    lines = [
        f"**The price** ({part['calls']} steps, {part['batch']} sentences at once, medians of five):",
        "",
        "| steered by | ms a sentence | against none |",
        "|---|---|---|",
    ]
    lines += [f"| {row['way']} | {row['ms']:.1f} | {row['ratio']:.2f} |" for row in part["rows"]]
    return "\n".join(lines)


RENDERERS = {
    "words": words,
    "labels": labels,
    "length": length,
    "infilling": infilling,
    "sequence": sequence,
    "price": price,
}
