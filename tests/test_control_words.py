"""Demands on words: the automaton and its posterior against enumeration, and sentences that obey without exception."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import LINES

import text_diffusion
from text_diffusion.config import ModelConfig
from text_diffusion.control import Avoid, Control, Edit, Length, Scorer, Template, Want
from text_diffusion.control.automaton import Builder
from text_diffusion.control.controls import gather
from text_diffusion.control.posterior import Accepting
from text_diffusion.control.steering import reweighted
from text_diffusion.control.template import Known, parse, with_unknown
from text_diffusion.control.vocabulary import Vocabulary
from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.generation import TextDiffusion, load_diffusion
from text_diffusion.schedules import named_betas
from text_diffusion.tokenizer import Tokenizer, train_byte_level, train_word_level

L = 6

# Small enough to list every sequence of tokens: [CLS] and five of "a", "b", "c" after a space, ".", [SEP], [PAD].


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_word_level(["a b c."])


def all_sentences(tokenizer: Tokenizer) -> tuple[Tensor, list[str]]:
    """Every sequence [CLS] w_1 ... w_n [SEP] [PAD] ... of L tokens, n >= 1, and its text."""
    words = [i for i in range(tokenizer.vocab_size) if tokenizer.decode_all([i])]
    rows = []
    for n in range(1, L - 1):
        for middle in product(words, repeat=n):
            rows.append([tokenizer.cls_id, *middle, tokenizer.sep_id, *[tokenizer.pad_id] * (L - 2 - n)])
    return torch.tensor(rows), [tokenizer.decode(row) for row in rows]


CASES: dict[str, tuple[list[Control], Callable[[str], Any]]] = {
    "gap": ([Template("a [GAP] c")], re.compile(r"a \S.* c").fullmatch),
    "fixed gap": ([Template("[GAP:2] c")], re.compile(r"\S+ \S+ c").fullmatch),
    "range": ([Template("b [GAP:0-1]")], re.compile(r"b( \S+)?").fullmatch),
    "open range": ([Template("[GAP:2-] b")], re.compile(r"(\S+ ){2,}b").fullmatch),
    "glued after": ([Template("[GAP].")], re.compile(r"(?!\.$)\S.*\.").fullmatch),
    "glued before": ([Template("a[GAP:1]")], re.compile(r"a\.+").fullmatch),
    "known only": ([Template("a b")], re.compile(r"a b").fullmatch),
    "two gaps": ([Template("[GAP] b [GAP]")], re.compile(r"\S.* b .*\S").fullmatch),
    "length": ([Length(2, 2)], lambda text: len(text.split()) == 2),
    "length range": ([Length(2, 3)], lambda text: 2 <= len(text.split()) <= 3),
    "at least": ([Length(3, None)], lambda text: len(text.split()) >= 3),
    "want": ([Want("b")], lambda text: any(word.rstrip(".") == "b" for word in text.split())),
    "want a phrase": ([Want("b a")], re.compile(r"(.* )?b a(\.* .*|\.*)").fullmatch),
    "want what a template has": (
        [Template("a [GAP] c"), Want("a b")],
        lambda text: re.fullmatch(r"a \S.* c", text) and re.search(r"(^| )a b\.* ", text),
    ),
    "want a phrase at both ends": ([Template("[GAP:1] b"), Want("a b")], re.compile(r"a b").fullmatch),
    "want phrases that share a word": (
        [Want("a b"), Want("b c")],
        re.compile(r"(.* )?(a b c(\.* .*|\.*)|a b[. ].*b c(\.* .*|\.*)|b c[. ].*a b(\.* .*|\.*))").fullmatch,
    ),
    "want twice": ([Want("b"), Want("b", 2)], re.compile(r"\S+ b\.*( .*)?").fullmatch),
    "want what begins again within itself": ([Want("a a b")], re.compile(r"(.* )?a a b(\.* .*|\.*)").fullmatch),
    "want the same word twice": ([Want("b b")], re.compile(r"(.* )?b b(\.* .*|\.*)").fullmatch),
    "want at": ([Want("b", 2)], re.compile(r"\S+ b\.*( .*)?").fullmatch),
    "want two": ([Want("a"), Want("c")], lambda text: {"a", "c"} <= {word.rstrip(".") for word in text.split()}),
    "avoid": ([Avoid("b")], lambda text: "b" not in text),
    "avoid at": ([Avoid("b", 1)], re.compile(r"[^b].*").fullmatch),
    "together": (
        [Template("a [GAP]"), Length(3, 3), Want("c"), Avoid("b")],
        lambda text: (
            len(text.split()) == 3
            and text.startswith("a ")
            and "b" not in text
            and "c" in [word.rstrip(".") for word in text.split()]
        ),
    ),
}
AMBIGUOUS = ("two gaps", "want a phrase", "glued after")  # accepted in several ways, which count severally


def accepting(tokenizer: Tokenizer, controls: list[Control]) -> Accepting:
    vocabulary = Vocabulary(tokenizer)
    demands, _ = gather(controls, vocabulary, L)
    return Accepting(Builder(demands, vocabulary).build(), tokenizer.cls_id)


@pytest.mark.parametrize("name", list(CASES))
def test_posterior_against_enumeration(name: str, small: Tokenizer) -> None:
    """p(w_l = v | accepted) is the sum over the sentences that an independent test accepts."""
    controls, is_accepted = CASES[name]
    ids, texts = all_sentences(small)
    chosen = torch.tensor([bool(is_accepted(text)) for text in texts])
    torch.manual_seed(0)
    log_p = (2 * torch.randn(3, L, small.vocab_size)).log_softmax(dim=-1)
    log_p[..., small.backend.get_vocab()["."]] -= 1.0
    automaton = accepting(small, controls)

    weight = log_p[:, torch.arange(1, L), ids[:, 1:]].sum(dim=-1).masked_fill(~chosen, -torch.inf)  # (3, N)
    best = ids[weight.argmax(dim=1)]
    assert torch.equal(automaton.best(log_p), best)
    if name in AMBIGUOUS:
        return
    share = weight.softmax(dim=1)
    expected = torch.zeros_like(log_p)
    for position in range(L):
        expected[:, position].index_add_(1, ids[:, position], share)
    torch.testing.assert_close(automaton.posterior(log_p)[0], expected, rtol=1e-4, atol=1e-6)
    log_p.requires_grad_()
    log_Z = automaton.log_prob(log_p)
    torch.testing.assert_close(log_Z, log_p[:, 0, small.cls_id] + weight.logsumexp(dim=1), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(log_Z.sum(), log_p)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(CASES))
def test_posterior_is_a_distribution(name: str, small: Tokenizer) -> None:
    """Also where what is demanded is next to impossible: in float32, at probabilities of e^-200 a token."""
    torch.manual_seed(1)
    log_p = (200 * torch.randn(4, L, small.vocab_size)).log_softmax(dim=-1)
    p = accepting(small, CASES[name][0]).posterior(log_p)[0]
    torch.testing.assert_close(p.sum(dim=-1), torch.ones(4, L), rtol=1e-3, atol=1e-4)
    assert bool((p >= 0).all())


def test_words_that_change_nothing_change_nothing() -> None:
    torch.manual_seed(2)
    x, p, embeds = torch.randn(2, 3, 4), torch.rand(2, 3, 7).softmax(dim=-1), torch.randn(7, 4)
    torch.testing.assert_close(reweighted(x, p, p, embeds), x)
    certain = torch.eye(7)[torch.tensor([[0, 1, 2], [3, 4, 5]])]
    far = reweighted(x, (1 - certain) / 6, certain, embeds)
    torch.testing.assert_close(far, certain @ embeds)


# Vocabularies


@pytest.mark.parametrize("train", [train_word_level, train_byte_level])
def test_spelling_gives_the_text_back(train: Callable[[list[str]], Tokenizer]) -> None:
    tokenizer = train(LINES)
    vocabulary = Vocabulary(tokenizer)
    for text in ("The red apple is ripe.", "apple", "ripe."):
        ids, unknown = vocabulary.spell(text, first=True)
        assert unknown == []
        assert tokenizer.decode(ids) == text
        assert int(vocabulary.starts[ids].sum()) == len(text.split())
    glued, _ = vocabulary.spell(".", glued=True)
    assert tokenizer.decode([*vocabulary.spell("ripe")[0], *glued]) == "ripe."
    for special in (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id):
        assert not vocabulary.starts[special]
        assert not vocabulary.continues[special]


def test_forms_of_a_word() -> None:
    """A tokenizer without a space before the sentence has two forms of a word, and may know only one."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "Ġapple", "Ġis", "Ġripe", ".", "Ġ."]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    vocabulary = Vocabulary(Tokenizer(backend))
    spelled = {text: vocabulary.spell(text, first=True) for text in ("The apple", "apple is", "Ape is", "is The")}
    assert [words[i] for i in spelled["The apple"][0]] == ["The", "Ġapple"]
    assert [words[i] for i in spelled["apple is"][0]] == ["Ġapple", "Ġis"], "only known after a space"
    assert [words[i] for i in spelled["is The"][0]] == ["Ġis", "The"], "only known at the start"
    assert spelled["Ape is"] == ([1, words.index("Ġis")], ["Ape"])


def test_tokens_that_are_words() -> None:
    """The original's tokenizers put spaces between all tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "apple", "."]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = Vocabulary(Tokenizer(backend))
    assert vocabulary.starts.tolist() == [False] * 4 + [True] * 3
    assert vocabulary.spell("the apple") == ([4, 5], [])


def test_unknown_words_come_back() -> None:
    tokenizer = train_word_level(LINES)
    ids = tokenizer.encode(["The zebra apple is quux."])[0]
    assert tokenizer.decode(ids) == "The apple is."
    assert (
        with_unknown(Vocabulary(tokenizer), [*ids, tokenizer.pad_id], [" zebra", " quux"]) == "The zebra apple is quux."
    )


@pytest.mark.parametrize(
    "text", ["The zorp (red) is red.", 'The "zorp" is - zorp', "zorp is red", "a zorp-zorp.", "red zorp £20"]
)
def test_words_around_unknown_ones_stay_as_they_were(text: str) -> None:
    tokenizer = train_word_level([*LINES, '( ) " - £ 20 (red) "red" £20 a.'])
    parsed = parse(text, Vocabulary(tokenizer), allow_unk=True)
    ids = [tokenizer.cls_id, *(i for item in parsed.items if isinstance(item, Known) for i in item.ids)]
    found = with_unknown(Vocabulary(tokenizer), [*ids, tokenizer.sep_id], parsed.unknown)
    assert found == text


# Sentences


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
    "settings", [{"halt": 1}, {"clamp": True}, {"churn": 4.0}, {"top_p": 0.9}, {"steps": 1}], ids=str
)
def test_demands_hold_with_other_settings(settings: dict[str, Any], model: TextDiffusion) -> None:
    sentences = model.sample(20, controls=[Want("new"), Length(5, 5)], **{"steps": 5} | settings)
    assert all("new" in text.split() and len(text.split()) == 5 for text in sentences)


def test_sentences_are_the_same_in_any_batch(model: TextDiffusion) -> None:
    controls: list[Control] = [Template("The [GAP] is [GAP]."), Want("fig")]
    sentences = model.sample(40, steps=5, controls=controls)
    for batch_size in (1, 7, 33):
        assert model.sample(40, steps=5, controls=controls, batch_size=batch_size) == sentences


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


def test_words_of_several_tokens(tmp_path: Path) -> None:
    """Byte-level: wanted words are found whole; avoiding takes one token."""
    tokenizer = train_byte_level(["aa bb cc dd"], vocab_size=262)
    vocabulary = Vocabulary(tokenizer)
    ids, unknown = vocabulary.spell("xyz")
    assert len(ids) > 1
    assert unknown == []
    with pytest.raises(UserError, match=r"--avoid takes .* one token, found 'xyz', which is \d tokens"):
        gather([Avoid("xyz")], vocabulary, 20)
    demands, _ = gather([Want("xyz"), Length(2, 2)], vocabulary, 20)
    automaton = Accepting(Builder(demands, vocabulary).build(), tokenizer.cls_id)
    torch.manual_seed(0)
    best = automaton.best(torch.randn(20, 12, tokenizer.vocab_size).log_softmax(dim=-1)).tolist()
    for text in map(tokenizer.decode, best):
        assert "xyz" in text
        assert text.count(" ") == 1


def accepts(tokenizer: Tokenizer, controls: list[Control], text: str, length: int = 12) -> bool:
    """Whether the automaton has a path for exactly these tokens."""
    ids = tokenizer.encode([text])[0]
    ids = [*ids, *[tokenizer.pad_id] * (length - len(ids))]
    log_p = torch.full((1, length, tokenizer.vocab_size), -1000.0)
    log_p[0, range(length), ids] = 0.0
    demands, _ = gather(controls, Vocabulary(tokenizer), length)
    automaton = Accepting(Builder(demands, Vocabulary(tokenizer)).build(), tokenizer.cls_id)
    found: list[int] = automaton.best(log_p)[0].tolist()
    return found == ids


@pytest.mark.parametrize("controls", [[Template("[GAP]")], [Length(3, 3)], [Want("zebra")]], ids=str)
def test_space_that_is_a_token(controls: list[Control]) -> None:
    """Of a word that no token begins, byte-level vocabularies have the space alone."""
    tokenizer = train_byte_level(["aa zeb zebra soup", "aazebra"], vocab_size=264)
    ids = tokenizer.encode(["bb zebra 5"])[0]
    assert Vocabulary(tokenizer).spaces[ids].any()
    assert accepts(tokenizer, controls, "bb zebra 5")


@pytest.mark.parametrize(
    ("control", "accepted", "refused"),
    [
        (Want("red"), ["red apple", "an red"], ["an reddish", "an apple"]),
        (Want("red", 1), ["red apple"], ["an red"]),
        (Want("red apple"), ["red apple", "an red apple"], ["red an apple"]),
        (Avoid("red"), ["an apple"], ["red apple", "an red"]),
        (Avoid("red", 1), ["an red"], ["red apple"]),
        (Avoid("red", 2), ["red apple"], ["an red"]),
    ],
    ids=str,
)
def test_first_word_has_a_form_of_its_own(control: Control, accepted: list[str], refused: list[str]) -> None:
    """As with GPT-2's tokenizer, which puts no space before the first word."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "an", "apple", "Ġred", "Ġan", "Ġapple", "Ġreddish"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $0 [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = Tokenizer(backend)
    assert [text for text in accepted + refused if accepts(tokenizer, [control], text)] == accepted


def test_shipped_weights_fill_gaps() -> None:
    model = text_diffusion.load(str(Path(__file__).parents[1] / "ckpts/simple/ema_0.9999_025000.pt"))
    assert isinstance(model, TextDiffusion)
    sentences = model.sample(20, controls=[Template("The [GAP] apple is [GAP].")])
    assert [line for line in sentences if not re.fullmatch(r"The \w+ apple is \w+\.", line)] == []
    assert len(set(sentences)) > 10
