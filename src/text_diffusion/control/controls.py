"""The controls, as a user says them, and what they come to together: demands on words, scores, a sentence to edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from text_diffusion.condition import Given, Guided
from text_diffusion.control.automaton import Automaton, Builder, Demands
from text_diffusion.control.classifier import Label
from text_diffusion.control.given import Labelled, Sources, given_of
from text_diffusion.control.phrases import Phrase
from text_diffusion.control.posterior import Accepting
from text_diffusion.control.steering import InnerSteps, OfWords, Score, Steered, has_signal
from text_diffusion.control.template import Gap, Known, parse
from text_diffusion.control.vocabulary import Vocabulary, bare, named
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.samplers import Denoise

if TYPE_CHECKING:
    from text_diffusion.generation import TextDiffusion


@dataclass(frozen=True)
class Template:
    """Known words, which are kept exactly, and gaps (see `template`). With `allow_unk`, unknown words are taken as
    [UNK] by the model, and put back into the sentence."""

    text: str
    allow_unk: bool = False


@dataclass(frozen=True)
class Length:
    """From `low` to `high` words (None: any number), as white space separates them."""

    low: int
    high: int | None


@dataclass(frozen=True)
class Want:
    """A word, or several in a row, that must occur: somewhere, or as the word number `at`, counted from 1."""

    text: str
    at: int | None = None


@dataclass(frozen=True)
class Avoid:
    """A word that must not occur: anywhere, or as the word number `at`, counted from 1."""

    text: str
    at: int | None = None


@dataclass(frozen=True)
class Edit:
    """Start from this sentence, with as much noise as t = strength * T has, instead of from noise alone."""

    text: str
    strength: float = 0.5


@dataclass(frozen=True)
class Scorer:
    """Any differentiable function of log p(w_l = v | x_t), (B, L, V) -> (B,): the higher, the better.

    It is taken as log p(c | x_t), times `strength`; its gradient goes through the denoiser.
    """

    function: Callable[[Tensor], Tensor]
    strength: float = 1.0

    def of(self, writer: TextDiffusion) -> Score:
        """Ready for a model."""
        return OfWords(self.function, self.strength)


T = TypeVar("T")
Control = Template | Length | Want | Avoid | Edit | Scorer | Label | InnerSteps | Labelled | Sources
OF_WORDS = (Template, Length, Want, Avoid)


@dataclass(frozen=True)
class Plan:
    """What controls come to for a model and a length.

    Args:
        scores: to follow by their gradient.
        accepting: the demands on words, if there are any.
        unknown: words of the template that the model sees as [UNK], in order.
        update: how to follow the scores, if not by eq. (1) of `steering`.
        edit: the sentence to start from (L,) and how much noise it gets, if one is edited.
        given: what a conditional model writes for.
        fills: whether gaps between known words are filled from noise.
    """

    scores: list[Score] = field(default_factory=list)
    accepting: Accepting | None = None
    unknown: tuple[str, ...] = ()
    update: InnerSteps | None = None
    edit: tuple[Tensor, float] | None = None
    given: Given | None = None
    fills: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether the denoiser has anything to follow."""
        return bool(self.scores) or self.accepting is not None

    @property
    def is_random(self) -> bool:
        """Whether the inner steps draw noise."""
        return self.update is not None and self.update.langevin

    def network(self, model: TransformerNetModel, start: int, stop: int) -> Guided:
        """The model with what the sentences start..stop-1 are given."""
        return Guided(model) if self.given is None else Guided(model, self.given.of(start, stop), self.given.scale)

    def steer(
        self,
        denoise: Denoise,
        network: Guided,
        process: GaussianDiffusion,
        noise: Callable[[int, int], Tensor],
        temperature: float = 1.0,
    ) -> Steered:
        """The denoiser that follows the plan."""
        drawn = noise if self.is_random else None
        return Steered(denoise, network, process, self.scores, self.accepting, self.update, drawn, temperature)

    def check_calls(self, process: GaussianDiffusion) -> None:
        """Refuse scores that no network call of a walk would follow.

        Raises:
            UserError: there is one.
        """
        first = 0 if self.accepting is None and self.update is None else 1
        followed = [t for s, t in enumerate(process.timesteps) if s >= first and has_signal(process, s)]
        for score in self.scores:
            low, high = (score.low, score.high) if isinstance(score, Label) else (0, None)
            if not any(low <= t and (high is None or t <= high) for t in followed):
                raise UserError(
                    "expected a network call at a t where what is asked for can be followed, found none of "
                    f"{len(process.timesteps)} from t {process.timesteps[-1]} to {process.timesteps[0]}; take more "
                    "STEPS, or a wider --guidance_range"
                )

    def levels(self, diffusion_steps: int) -> int:
        """How many of the T levels of noise are walked, from the least."""
        return diffusion_steps if self.edit is None else max(round(self.edit[1] * diffusion_steps), 1)

    def start(self, noise: Tensor, model: TransformerNetModel, process: GaussianDiffusion) -> Tensor:
        """Where the walk starts, (B, L, D): the noise itself, or the noised sentence that is edited."""
        if self.edit is None:
            return noise
        last = torch.full((len(noise),), process.num_timesteps - 1, device=noise.device)
        return process.q_sample(model.get_embeds(self.edit[0][None]), last, noise)


def plan(controls: Sequence[Control], writer: TextDiffusion, length: int) -> Plan:
    """Check the controls against each other and against the model, before anything is sampled.

    Raises:
        UserError: they contradict each other, do not fit into L tokens, or name words that the model cannot say.
    """
    if not isinstance(controls, Sequence) or not all(isinstance(control, Control) for control in controls):
        raise UserError(
            f"controls must be a list of Want, Template, ... (see `text_diffusion.control`), found {controls!r}"
        )
    vocabulary = Vocabulary(writer.tokenizer)
    demands, unknown = gather(controls, vocabulary, length)
    accepting = None
    if any(isinstance(control, OF_WORDS) for control in controls):
        automaton = Builder(demands, vocabulary).build()
        check(automaton, demands, controls, length)
        check_sayable(automaton, writer)
        accepting = Accepting(automaton, writer.tokenizer.cls_id, writer.diffusion.device)
    scores = [control.of(writer) for control in controls if isinstance(control, Scorer | Label)]
    _check_labels([control for control in controls if isinstance(control, Label)])
    update = _one(InnerSteps, controls, "--inner_steps")
    if update is not None:
        _check_update(update, scores)
    edit = _one(Edit, controls, "--edit")
    edited = _edited(edit, writer, length) if edit else None
    fills = edit is None and any(isinstance(control, Template) for control in controls)
    return Plan(scores, accepting, unknown, update, edited, given_of(controls, writer), fills)


def gather(controls: Sequence[Control], vocabulary: Vocabulary, length: int) -> tuple[Demands, tuple[str, ...]]:
    """The demands on words of sentences of L tokens, and the template's unknown words."""
    template, number = _one(Template, controls, "--template"), _one(Length, controls, "--length")
    demands, unknown = Demands(), tuple[str, ...]()
    items: tuple[Known | Gap, ...] = demands.items
    if template:
        parsed = parse(template.text, vocabulary, template.allow_unk)
        items, unknown = parsed.items, parsed.unknown
        if number and number.high is not None and parsed.fewest_words > number.high:
            raise UserError(
                f"--length {_shown(number)} contradicts --template {template.text!r}, which has at least "
                f"{parsed.fewest_words} words; leave one out"
            )
        _check_size(f"--template {template.text!r}", parsed.fewest_words, length)
    number = number or Length(1, None)
    if number.low < 1 or (number.high is not None and number.high < number.low):
        raise UserError(f"--length must be a number of words from 1, or a range such as 4-7, found {_shown(number)}")
    _check_size(f"--length {_shown(number)}", number.low, length)
    wanted: list[Phrase] = []
    wanted_at: dict[int, Phrase] = {}
    for want in (control for control in controls if isinstance(control, Want)):
        phrase = _spelled(want, vocabulary, length)
        if want.at is None:
            wanted.append(phrase)
        elif want.at in wanted_at:
            raise UserError(
                f"--want {want.text}@{want.at} contradicts --want {wanted_at[want.at].text}@{want.at}; leave one out"
            )
        else:
            wanted_at[want.at] = phrase
    avoided, avoided_at = set[int](), dict[int, frozenset[int]]()
    for avoid in (control for control in controls if isinstance(control, Avoid)):
        _check_avoidable(avoid, controls, items)
        forms = _spelled(avoid, vocabulary, length).forms
        if any(len(form) > 1 for form in forms):
            raise UserError(
                f"--avoid takes a word that is one token, found {avoid.text!r}, which is {max(map(len, forms))} tokens "
                "here; leave it out"
            )
        inside, first = forms[0][0], forms[-1][0]  # what is another token at the start may be a part of words elsewhere
        if avoid.at is None:
            avoided.add(inside)
        for at, token in {(avoid.at or 1, inside), (1, first)}:
            if avoid.at in (None, at):
                avoided_at[at] = avoided_at.get(at, frozenset()) | {token}
    named = {bare(word) for want in controls if isinstance(want, Want) for word in want.text.split()}
    _check_size(f"--want {','.join(sorted(named))}", len(named), length)
    high = None if number.high is None else min(number.high, length)
    items = tuple(replace(i, high=min(i.high, length)) if isinstance(i, Gap) and i.high else i for i in items)
    return Demands(items, (number.low, high), tuple(wanted), wanted_at, frozenset(avoided), avoided_at), unknown


def _one(kind: type[T], controls: Sequence[Control], name: str) -> T | None:
    """The control of a kind of which there may be one."""
    found = [control for control in controls if isinstance(control, kind)]
    if len(found) > 1:
        raise UserError(f"one {name} is expected, found two")
    return found[0] if found else None


def _check_labels(labels: Sequence[Label]) -> None:
    for i, label in enumerate(labels):
        for other in labels[:i]:
            if label.classifier is other.classifier:
                pair = ["|".join([one.label] if isinstance(one.label, str) else one.label) for one in (other, label)]
                raise UserError(
                    f"--label takes one of a classifier's labels, found {pair[0]!r} and {pair[1]!r} of the same; "
                    f"{'|'.join(pair)} is either"
                )


def _check_update(update: InnerSteps, scores: Sequence[Score]) -> None:
    if update.steps < 1 or not update.lr > 0:
        raise UserError(f"--inner_steps must be at least 1 and --inner_lr above 0, found {update.steps}, {update.lr:g}")
    if not scores:
        raise UserError("--inner_steps is about following a score such as --label, found none")
    if any(isinstance(score, OfWords) for score in scores):
        raise UserError("--inner_steps follows classifiers; a Scorer goes through the denoiser, so leave the steps out")


def check(automaton: Automaton, demands: Demands, controls: Sequence[Control], length: int) -> None:
    """Refuse demands that no sentence meets, or none that is short enough.

    Raises:
        UserError: naming them.
    """
    said = [text for control in controls if (text := _said(control))]
    if automaton.shortest is None:
        raise UserError(f"no sentence satisfies {' and '.join(said)}: they contradict each other; leave one out")
    if automaton.shortest > length:
        raise UserError(_must_fit(" and ".join(said), automaton.shortest, length))


def check_sayable(automaton: Automaton, writer: TextDiffusion) -> None:
    """Words that the head takes for others are left out of gaps; a demand for one is refused.

    Raises:
        UserError: naming the first of them.
    """
    with torch.no_grad():
        sayable = writer.model.get_logits(writer.model.embeddings[None])[0].argmax(dim=-1).cpu().numpy()
    for tokens in automaton.sets:
        kept = tokens & (sayable == range(len(sayable)))
        if tokens[writer.tokenizer.pad_id]:  # what comes after [SEP] is not read
            continue
        if not kept.any():
            token = int(tokens.argmax())
            if token == writer.tokenizer.unk_id:
                raise UserError(
                    "--allow_unk expects a model that met unknown words in training, found one that did not"
                )
            name, other = (writer.tokenizer.backend.id_to_token(i) for i in (token, int(sayable[token])))
            raise UserError(f"the model cannot say {name!r}, as its head takes it for {other!r}; leave the word out")
        tokens[:] = kept


def _spelled(control: Want | Avoid, vocabulary: Vocabulary, length: int) -> Phrase:
    name = "--want" if isinstance(control, Want) else "--avoid"
    said = control.text + ("" if control.at is None else f"@{control.at}")
    if not control.text.split() or (control.at is not None and (control.at < 1 or len(control.text.split()) > 1)):
        raise UserError(
            f"{name} must be a word, or a word and its number in the sentence such as green@2, found {said!r}"
        )
    _check_size(f"{name} {said}", control.at or 1, length)
    phrase, unknown = Phrase.of(control.text, vocabulary)
    if unknown:
        raise UserError(f"{name} must be words that the model knows, found {', '.join(unknown)}; leave them out")
    return phrase


def _check_size(said: str, words: int, length: int) -> None:
    """Refuse what has more words than there are tokens, before automata of that size are built."""
    if words + 2 > length:
        raise UserError(_must_fit(said, words + 2, length))


def _must_fit(said: str, tokens: int, length: int) -> str:
    return (
        f"{said} must fit into {length} tokens, the length of the model's sentences, found at least {tokens} "
        "([CLS] and [SEP] included); ask for less"
    )


def _check_avoidable(avoid: Avoid, controls: Sequence[Control], items: Sequence[Known | Gap]) -> None:
    """Avoiding a word that is wanted is refused."""
    for want in (control for control in controls if isinstance(control, Want)):
        if bare(avoid.text) in map(bare, want.text.split()) and avoid.at in (None, want.at):
            raise UserError(f"--avoid {avoid.text} contradicts --want {want.text}; leave one out")
    if avoid.at is None and any(_occurs(avoid.text, item) for item in items):
        raise UserError(f"--avoid {avoid.text} contradicts --template, which has that word; leave one out")


def _occurs(text: str, item: Known | Gap) -> bool:
    return isinstance(item, Known) and bare(item.text) == bare(text)


def _said(control: Control) -> str:
    """A control as on the command line, if it makes a demand on words."""
    if isinstance(control, Template):
        return f"--template {control.text!r}"
    if isinstance(control, Length):
        return f"--length {_shown(control)}"
    if isinstance(control, Want | Avoid):
        return f"--{type(control).__name__.lower()} {control.text}" + ("" if control.at is None else f"@{control.at}")
    return ""


def _shown(length: Length) -> str:
    if length.low == length.high:
        return str(length.low)
    return f"{length.low}-{'' if length.high is None else length.high}"


def _edited(edit: Edit, writer: TextDiffusion, length: int) -> tuple[Tensor, float]:
    if not 0 < edit.strength <= 1:
        raise UserError(f"--edit_strength must be above 0 and at most 1, found {edit.strength:g}")
    vocabulary, tokenizer = Vocabulary(writer.tokenizer), writer.tokenizer
    words, unknown = vocabulary.spell(edit.text, first=True)
    if unknown:
        raise UserError(f"--edit has words that the model does not know: {named(unknown)}")
    ids = [tokenizer.cls_id, *words, tokenizer.sep_id]
    if not words or len(ids) > length:
        raise UserError(
            f"--edit must be a sentence of at most {length} tokens, the length of the model's sentences, "
            f"found {len(ids)} ([CLS] and [SEP] included)"
        )
    ids += [tokenizer.pad_id] * (length - len(ids))
    return torch.tensor(ids, device=writer.diffusion.device), edit.strength
