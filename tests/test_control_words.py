"""Sentences that obey demands on words without exception, and demands that are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import LINES

import text_diffusion
from text_diffusion.config import ModelConfig
from text_diffusion.control import Avoid, Control, Edit, Length, Scorer, Template, Want
from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.generation import TextDiffusion, load_diffusion
from text_diffusion.schedules import named_betas
from text_diffusion.tokenizer import train_word_level


@pytest.fixture(scope="module")
def model(writer: Path) -> TextDiffusion:
    return load_diffusion(writer)


OBEYED: dict[str, tuple[list[Control], str]] = {
    "template": ([Template("The [GAP] apple is [GAP].")], r"The \S.* apple is \S.*\."),
    "prefix": ([Template("The red fig [GAP]")], r"The red fig \S.*"),
    "suffix": ([Template("[GAP:2-3] is hot.")], r"\S+ \S+( \S+)? is hot\."),
    "want": ([Want("blue")], r"(.* )?blue\W*( .*)?"),
    "at": ([Want("egg", 3), Avoid("red")], r"(?!.*\bred\b)\S+ \S+ egg\W*( .*)?"),
    "length": ([Length(4, 4)], r"\S+( \S+){3}"),
    "all": (
        [Template("The [GAP] is [GAP]."), Want("pear"), Avoid("cold"), Length(5, 5)],
        r"(?=.*\bpear\b)(?!.*\bcold\b)(?=\S+( \S+){4}$)The .* is .*\.",
    ),
}


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm-solver++", "heun"])
@pytest.mark.parametrize("name", list(OBEYED))
def test_demands_hold_without_exception(name: str, sampler: str, model: TextDiffusion) -> None:
    """For every sampler, though the model is bad."""
    controls, pattern = OBEYED[name]
    sentences = model.sample(40, steps=6, sampler=sampler, controls=controls)
    assert [text for text in sentences if not re.fullmatch(pattern, text)] == []
    assert len(set(sentences)) > 1


@pytest.mark.parametrize(
    "settings", [{"resample": 2}, {"clamp": True}, {"churn": 4.0}, {"top_p": 0.9}, {"steps": 1}], ids=str
)
def test_demands_hold_with_other_settings(settings: dict[str, Any], model: TextDiffusion) -> None:
    sentences = model.sample(20, controls=[Want("new"), Length(5, 5)], **{"steps": 5} | settings)
    assert all("new" in text.split() and len(text.split()) == 5 for text in sentences)


def test_sentences_are_the_same_in_any_batch(model: TextDiffusion) -> None:
    controls: list[Control] = [Template("The [GAP] is [GAP]."), Want("fig")]
    sentences = model.sample(40, steps=5, controls=controls)
    for batch_size in (1, 7, 33):
        assert model.sample(40, steps=5, controls=controls, batch_size=batch_size) == sentences


def test_halting_and_controls_exclude_each_other(model: TextDiffusion) -> None:
    with pytest.raises(UserError, match=r"halt leaves alone .* leave one of the two out"):
        model.sample(1, steps=5, halt=1, controls=[Want("new")])
    assert len(model.sample(1, steps=5, halt=1, controls=[])) == 1


def test_demands_that_take_too_long(model: TextDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state is a set of wanted words that have been met."""
    monkeypatch.setattr("text_diffusion.control.automaton.MOST_STATES", 20)
    with pytest.raises(UserError, match="at most 20 states can keep count of, found more"):
        model.plan([Want("red"), Want("blue"), Want("old"), Want("fig"), Length(5, 6)])


def test_no_controls_are_no_controls(model: TextDiffusion) -> None:
    assert model.sample(10, steps=5, controls=[]) == model.sample(10, steps=5)


def test_editing(model: TextDiffusion) -> None:
    """Little noise leaves a sentence as it was; more leaves less of it; all of it is sampling."""
    text = LINES[10]
    kept = []
    for strength in (0.05, 0.4, 0.7, 1.0):
        sentences = model.sample(60, steps=1 if strength == 0.05 else 5, controls=[Edit(text, strength)])
        words = [list(map(str.__eq__, line.split(), text.split())) for line in sentences]
        kept.append(sum(map(sum, words)) / 300)
    assert kept[0] > 0.95
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 0.75


def test_editing_with_few_levels(model: TextDiffusion) -> None:
    with pytest.raises(UserError, match=r"between 1 and \d, the levels of noise that --edit_strength leaves of"):
        model.sample(1, steps=10, controls=[Edit("The red fig is hot.", 0.1)])


def test_editing_with_all_noise_is_sampling(model: TextDiffusion) -> None:
    """abar_{T-1} of this short process is not 0, so that a trace of the sentence is left."""
    process = model.diffusion
    noise = torch.randn(2, model.sequence_len, model.model.config.in_channel)
    start = model.plan([Edit(LINES[0], 1.0)]).start(noise, model.model, process)
    torch.testing.assert_close(start, noise, rtol=0, atol=6 * float(process.sqrt_alphas_cumprod[-1]) + 0.01)


@pytest.mark.parametrize("sampler", ["ancestral", "dpm-solver++", "heun"])
def test_the_other_objective(sampler: str) -> None:
    """A model that gives probabilities of words obeys too, whatever they are: its weights are random."""
    torch.manual_seed(0)
    tokenizer = train_word_level(LINES)
    config = ModelConfig(objective="cross_entropy", in_channel=8, hidden_size=16, num_layers=1, num_heads=2)
    network = WordDenoiser(config, tokenizer.vocab_size, 8).eval()
    process = GaussianDiffusion(named_betas("log-snr", 50))
    words = TextDiffusion(network, process, tokenizer, 8, {})
    for name, (controls, pattern) in OBEYED.items():
        sentences = words.sample(10, steps=6, sampler=sampler, controls=controls)
        assert [text for text in sentences if not re.fullmatch(pattern, text)] == [], name
    scorer = Scorer(lambda log_p: log_p[:, :, 7].logsumexp(dim=1))
    assert words.sample(5, steps=6, sampler=sampler, controls=[scorer]) != words.sample(5, steps=6, sampler=sampler)


# What contradicts itself


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (
            [Length(3, 3), Template("The red apple is ripe [GAP].")],
            r"--length 3 contradicts --template .* at least 6 words",
        ),
        ([Length(4, 5), Template("The [GAP:5] fig")], r"--length 4-5 contradicts"),
        ([Length(0, 0)], r"--length must be a number of words from 1"),
        ([Length(5, 4)], r"--length must be .* a range such as 4-7, found 5-4"),
        ([Length(90, 90)], r"--length 90 must fit into \d+ tokens"),
        ([Length(3, 3), Length(4, 4)], "one --length is expected, found two"),
        ([Template("[GAP]"), Template("a")], "one --template is expected, found two"),
        ([Template(" ")], "--template must hold words or gaps"),
        ([Template("The [GAP:0] fig")], r"a gap must be \[GAP\], \[GAP:2\] or \[GAP:1-3\]"),
        ([Template("The [GAP:x] fig")], r"found \[GAP:x\]"),
        ([Template("The [GAP:3-2] fig")], r"found \[GAP:3-2\]"),
        ([Template("The purple fig sings.")], "words that the model does not know: purple, sings"),
        ([Template("The " + 30 * "red " + "fig")], r"must fit into \d+ tokens"),
        ([Want("red"), Avoid("red")], "--avoid red contradicts --want red"),
        ([Want("red", 2), Want("blue", 2)], "--want blue@2 contradicts --want red@2"),
        ([Want("red", 2), Template("The blue [GAP]")], r"no sentence satisfies --want red@2 and --template"),
        ([Want("red"), Template("The blue fig is ripe.")], "contradict each other"),
        ([Avoid("fig"), Template("The fig is [GAP]")], "--avoid fig contradicts --template"),
        ([Avoid("The", 1), Template("The fig is [GAP]")], "contradict each other"),
        ([Want("purple")], "--want must be words that the model knows, found purple"),
        ([Want("red fig", 2)], r"--want must be a word, or a word and its number"),
        ([Want("red", 0)], "found 'red@0'"),
        ([Want("red", 60)], r"--want red@60 must fit"),
        (
            [Want(word) for word in ("red", "blue", "old", "new", "fig", "egg", "pear")],
            r"egg,.*,red must fit into 8",
        ),
        ([Edit("The red fig"), Edit("The")], "one --edit is expected, found two"),
        ([Edit("The purple fig")], "--edit has words that the model does not know: purple"),
        ([Edit("red " * 40)], "--edit must be a sentence of at most"),
        ([Edit("The red fig", 0.0)], "--edit_strength must be above 0"),
    ],
    ids=str,
)
def test_refused(controls: list[Control], message: str, model: TextDiffusion) -> None:
    """Before anything is sampled, in one sentence."""
    with pytest.raises(UserError, match=message) as found:
        model.sample(1, controls=controls)
    assert "\n" not in str(found.value)


def test_shipped_weights_fill_gaps() -> None:
    model = text_diffusion.load(str(Path(__file__).parents[1] / "ckpts/simple/ema_0.9999_025000.pt"))
    assert isinstance(model, TextDiffusion)
    sentences = model.sample(20, controls=[Template("The [GAP] apple is [GAP].")])
    assert [line for line in sentences if not re.fullmatch(r"The \w+ apple is \w+\.", line)] == []
    assert len(set(sentences)) > 10
