"""Words as a tokenizer has them, in demands: several tokens, unknown ones, spaces, forms at the start."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from toy import LINES

from text_diffusion.control import Avoid, Control, Length, Template, Want
from text_diffusion.control.automaton import Builder
from text_diffusion.control.controls import gather
from text_diffusion.control.posterior import Accepting
from text_diffusion.control.template import Known, parse, with_unknown
from text_diffusion.control.vocabulary import Vocabulary
from text_diffusion.errors import UserError
from text_diffusion.tokenizer import Tokenizer, train_byte_level, train_word_level


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


def test_words_of_several_tokens() -> None:
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
