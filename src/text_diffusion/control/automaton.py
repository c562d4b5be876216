"""All sentences that meet the demands made on their words, as a finite automaton over tokens.

A state lies between two tokens and says what has been met so far; an edge emits one token of a set. The automaton is
small: it counts words only if their number matters, and only as far as it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from text_diffusion.control.phrases import NOTHING, Phrase, Progress, Token
from text_diffusion.control.template import Gap, Known
from text_diffusion.control.vocabulary import Mask, Vocabulary
from text_diffusion.errors import UserError

MOST_STATES = 10_000  # more take minutes to build, and longer at every network call
ANYTHING = (Gap(1, None),)  # the template of every sentence


@dataclass(frozen=True)
class Demands:
    """What sentences must be like.

    Args:
        items: known words and gaps, in order.
        length: fewest and most words (None: any number).
        wanted: phrases that must stand somewhere.
        wanted_at: words that must stand at a place, by number of the word from 1.
        avoided: tokens that must not occur in a gap.
        avoided_at: tokens that a word, by number, must not begin with.
    """

    items: tuple[Known | Gap, ...] = ANYTHING
    length: tuple[int, int | None] = (1, None)
    wanted: tuple[Phrase, ...] = ()
    wanted_at: dict[int, Phrase] = field(default_factory=dict)
    avoided: frozenset[int] = frozenset()
    avoided_at: dict[int, frozenset[int]] = field(default_factory=dict)


class State(NamedTuple):
    """What has been met, between two tokens."""

    item: int = 0  # the item that is under way or comes next; one past the last two when the sentence has ended
    done: int = 0  # of a known word its tokens, of a gap its words begun
    words: int = 0  # begun in the sentence, as far as they are counted
    blank: bool = False  # the word under way in a gap has only its space yet
    found: tuple[Progress, ...] = ()  # of each wanted phrase
    place: tuple[int, Progress] | None = None  # of the word under way, if one is wanted there, its number and progress


@dataclass(frozen=True)
class Automaton:
    """States numbered from 0, the start, to S - 1, the end; edges (E,) from, to, and the set of tokens emitted.

    `sets` (K, V) are the sets of tokens. `shortest` is how many tokens the shortest sentence has, [CLS] and [SEP]
    included; None if there is none.
    """

    source: np.ndarray[tuple[int], np.dtype[np.int64]]
    target: np.ndarray[tuple[int], np.dtype[np.int64]]
    emits: np.ndarray[tuple[int], np.dtype[np.int64]]
    sets: Mask
    states: int
    shortest: int | None


class Step(NamedTuple):
    """A token of a set, where template and length lead with it."""

    tokens: Mask
    begins: bool  # a word
    state: State


class Builder:
    """Turns demands into an automaton: what template and length allow, each token looked at by the phrases."""

    def __init__(self, demands: Demands, vocabulary: Vocabulary) -> None:
        self.demands, self.vocabulary = demands, vocabulary
        low, high = demands.length
        at = max([*demands.wanted_at, *demands.avoided_at, 0])
        self.counted = max(low, at) if high is None else max(high, at)  # beyond it the number does not matter
        self.end = State(item=len(demands.items) + 1)
        self.sets: dict[bytes, int] = {}
        allowed = np.ones(vocabulary.tokenizer.vocab_size, dtype=bool)
        allowed[list(demands.avoided)] = False
        self.starts, self.continues = vocabulary.starts & allowed, vocabulary.continues & allowed
        self.spaces = vocabulary.spaces & allowed
        phrases = (*demands.wanted, *demands.wanted_at.values())
        special = {token for phrase in phrases for form in phrase.forms for token in form}
        self.special = sorted(special.union(*demands.avoided_at.values()))  # tokens that are no like any other

    def build(self) -> Automaton:
        """Breadth first from the start; states that cannot reach the end are left out."""
        start = State(found=(NOTHING,) * len(self.demands.wanted))
        depth = {start: 1}  # after [CLS]
        edges: list[tuple[State, int, State]] = []
        queue = deque([start])
        while queue:
            state = queue.popleft()
            if len(depth) > MOST_STATES:
                raise UserError(
                    f"expected demands that at most {MOST_STATES:,} states can keep count of, found more (each --want "
                    "doubles them, each word of --length adds as many again); ask for less"
                )
            for tokens, following in self.edges(state):
                edges.append((state, self.number(tokens), following))
                if following not in depth:
                    depth[following] = depth[state] + 1
                    queue.append(following)
        alive = _reaching(self.end, edges)
        order = [start, *(state for state in depth if state in alive and state not in (start, self.end)), self.end]
        numbers = {state: i for i, state in enumerate(order)}
        kept = [(numbers[a], k, numbers[b]) for a, k, b in edges if a in alive and b in alive]
        source, emits, target = np.array(kept or [(0, 0, 0)], dtype=np.int64).T
        sets = np.array([np.frombuffer(key, dtype=bool) for key in self.sets])
        return Automaton(source, target, emits, sets, len(order), depth.get(self.end))

    def number(self, tokens: Mask) -> int:
        """The number of a set of tokens."""
        return self.sets.setdefault(tokens.tobytes(), len(self.sets))

    def only(self, token: int) -> Mask:
        """The set of one token."""
        one = np.zeros(self.vocabulary.tokenizer.vocab_size, dtype=bool)
        one[token] = True
        return one

    def edges(self, state: State) -> Iterator[tuple[Mask, State]]:
        """What may come next, and where it leads."""
        if state == self.end:
            yield self.only(self.vocabulary.tokenizer.pad_id), state
            return
        for step in self.steps(state):
            if step.state == self.end:
                if self.is_complete(state):
                    yield step.tokens, self.end
            else:
                yield from self.looked_at(state, step)

    def is_complete(self, state: State) -> bool:
        """Whether the sentence may end here, as far as its words go."""
        fewest = max([self.demands.length[0], *self.demands.wanted_at])
        there = all(map(Phrase.is_there, self.demands.wanted, state.found))
        return state.words >= fewest and there and self.is_in_place(state)

    def is_in_place(self, state: State) -> bool:
        """Whether the word under way may end here: it is the one wanted there, if one is."""
        return state.place is None or self.demands.wanted_at[state.place[0]].is_there(state.place[1])

    def looked_at(self, state: State, step: Step) -> Iterator[tuple[Mask, State]]:
        """The tokens of a step, parted by what they mean to the phrases; those that are not wanted left out."""
        parts: dict[State, Mask] = {}
        common = step.tokens.copy()
        common[self.special] = False
        closing = common & self.vocabulary.closes
        kinds = [self.only(token) for token in self.special if step.tokens[token]]
        for tokens in (*kinds, closing, common & ~closing):
            if not tokens.any():
                continue
            token = int(tokens.argmax())
            seen = Token(token, step.begins, step.begins and state.words == 0, bool(self.vocabulary.closes[token]))
            after = self.after(state, step, seen)
            if after is not None:
                parts[after] = parts.get(after, np.zeros_like(tokens)) | tokens
        for after, tokens in parts.items():
            yield tokens, after

    def after(self, state: State, step: Step, token: Token) -> State | None:
        """The state behind a token; None if a word at its place must be another."""
        number, place = state.words + 1, state.place
        if token.begins:
            if not self.is_in_place(state) or token.id in self.demands.avoided_at.get(number, ()):
                return None
            wanted = self.demands.wanted_at.get(number)
            place = None if wanted is None else (number, wanted.begun(token))
        elif place is not None:
            place = (place[0], self.demands.wanted_at[place[0]].continued(place[1], token))
        if place is not None and not place[1]:
            return None
        pairs = zip(self.demands.wanted, state.found, strict=True)
        return step.state._replace(found=tuple(phrase.searched(found, token) for phrase, found in pairs), place=place)

    def steps(self, state: State) -> Iterator[Step]:
        """What the template and the length let come next."""
        items = self.demands.items
        if state.item == len(items):
            yield Step(self.only(self.vocabulary.tokenizer.sep_id), False, self.end)
            return
        item = items[state.item]
        yield from self.known(state, item) if isinstance(item, Known) else self.gap(state, item)

    def known(self, state: State, item: Known) -> Iterator[Step]:
        """The next token of a known word."""
        begins = state.done == 0 and not item.glued
        words = self.one_more(state.words) if begins else state.words
        if words is not None:
            last = state.done + 1 == len(item.ids)
            item_then, done = (state.item + 1, 0) if last else (state.item, state.done + 1)
            yield Step(self.only(item.ids[state.done]), begins, state._replace(item=item_then, done=done, words=words))

    def gap(self, state: State, item: Gap) -> Iterator[Step]:
        """More of the word under way in a gap, another word, or what comes after the gap."""
        if state.done:
            yield Step(self.continues, False, state._replace(blank=False))
        if state.blank:  # a space alone is no word
            return
        if state.done == 0 and item.glued:
            yield Step(self.continues, False, state._replace(done=1))
        elif item.high is None or state.done < item.high:
            yield from self.word(state, item)
        if state.done >= item.low:
            yield from self.steps(state._replace(item=state.item + 1, done=0))

    def word(self, state: State, item: Gap) -> Iterator[Step]:
        """The first token of a new word in a gap."""
        words = self.one_more(state.words)
        if words is None:
            return
        done = state.done + 1 if item.high is not None else min(state.done + 1, max(item.low, 1))
        begun = state._replace(done=done, words=words)
        yield Step(self.starts | self.continues if state.words == 0 else self.starts, True, begun)
        yield Step(self.spaces, True, begun._replace(blank=True))

    def one_more(self, words: int) -> int | None:
        """The number of words when another begins; None if that is one too many."""
        high = self.demands.length[1]
        return None if high is not None and words >= high else min(words + 1, self.counted)


def _reaching(end: State, edges: list[tuple[State, int, State]]) -> set[State]:
    before: dict[State, list[State]] = {}
    for source, _, target in edges:
        before.setdefault(target, []).append(source)
    alive, queue = {end}, [end]
    while queue:
        for state in before.get(queue.pop(), ()):
            if state not in alive:
                alive.add(state)
                queue.append(state)
    return alive
