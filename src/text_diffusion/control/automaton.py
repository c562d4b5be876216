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

from text_diffusion.control.template import Gap, Known
from text_diffusion.control.vocabulary import Mask, Vocabulary, bare

ANYTHING = (Gap(1, None),)  # the template of every sentence


@dataclass(frozen=True)
class Demands:
    """What sentences must be like.

    Args:
        items: known words and gaps, in order.
        length: fewest and most words (None: any number).
        wanted: phrases that must stand somewhere, as tokens.
        wanted_at: words that must stand at a place, by number of the word from 1: text and tokens.
        avoided: tokens that must not occur in a gap.
        avoided_at: tokens that a word, by number, must not begin with.
    """

    items: tuple[Known | Gap, ...] = ANYTHING
    length: tuple[int, int | None] = (1, None)
    wanted: tuple[tuple[int, ...], ...] = ()
    wanted_at: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    avoided: frozenset[int] = frozenset()
    avoided_at: dict[int, frozenset[int]] = field(default_factory=dict)


class State(NamedTuple):
    """What has been met, between two tokens."""

    item: int = 0  # the item that is under way or comes next; one past the last two when the sentence has ended
    done: int = 0  # of a known word its tokens, of a gap its words begun
    words: int = 0  # begun in the sentence, as far as they are counted
    seen: int = 0  # bit k: wanted phrase k
    rest: tuple[int, ...] = ()  # what is still to come of a phrase that is under way in a gap
    phrase: int = -1  # which one, if it is one that may stand anywhere
    sealed: bool = False  # the word under way is a wanted one: only punctuation may be added


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


class Builder:
    """Turns demands into an automaton."""

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
        self.closes = vocabulary.closes & allowed

    def build(self) -> Automaton:
        """Breadth first from the start; states that cannot reach the end are left out."""
        start = State()
        depth = {start: 1}  # after [CLS]
        edges: list[tuple[State, int, State]] = []
        queue = deque([start])
        while queue:
            state = queue.popleft()
            for tokens, following in self.edges(state):
                if tokens.any():
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
        items = self.demands.items
        if state == self.end:
            yield self.only(self.vocabulary.tokenizer.pad_id), state
        elif state.rest:
            yield from self.within_phrase(state)
        elif state.item == len(items):
            if self.is_complete(state):
                yield self.only(self.vocabulary.tokenizer.sep_id), self.end
        else:
            item = items[state.item]
            yield from self.known(state, item) if isinstance(item, Known) else self.gap(state, item)

    def is_complete(self, state: State) -> bool:
        """Whether the sentence may end here."""
        fewest = max([self.demands.length[0], *self.demands.wanted_at])
        return state.words >= fewest and state.seen == (1 << len(self.demands.wanted)) - 1

    def known(self, state: State, item: Known) -> Iterator[tuple[Mask, State]]:
        """The next token of a known word."""
        words = state.words
        if state.done == 0 and not item.glued:
            at = self.demands.wanted_at.get(words + 1)
            if (at and bare(at[0]) != bare(item.text)) or (counted := self.one_more(words)) is None:
                return
            if item.ids[0] in self.demands.avoided_at.get(words + 1, ()):
                return
            words = counted
        last = state.done + 1 == len(item.ids)
        item_then, done = (state.item + 1, 0) if last else (state.item, state.done + 1)
        yield self.only(item.ids[state.done]), state._replace(item=item_then, done=done, words=words, sealed=False)

    def gap(self, state: State, item: Gap) -> Iterator[tuple[Mask, State]]:
        """More of the word under way in a gap, another word, or what comes after the gap."""
        if state.done:
            yield self.closes if state.sealed else self.continues, state
        if state.done == 0 and item.glued:
            yield self.continues, state._replace(done=1, sealed=False)
        elif item.high is None or state.done < item.high:
            yield from self.word(state, item)
        if state.done >= item.low:
            yield from self.edges(state._replace(item=state.item + 1, done=0))

    def word(self, state: State, item: Gap) -> Iterator[tuple[Mask, State]]:
        """The first token of a new word in a gap."""
        number = state.words + 1
        begun = self.after_word(state, item)
        if begun is None:
            return
        if number in self.demands.wanted_at:
            yield self.phrase(begun, self.demands.wanted_at[number][1], -1)
            return
        tokens = self.starts | self.continues if state.item == 0 and state.done == 0 else self.starts.copy()
        tokens[list(self.demands.avoided_at.get(number, ()))] = False
        for k, phrase in enumerate(self.demands.wanted):
            if not state.seen >> k & 1:
                yield self.phrase(begun, phrase, k)
                if len(phrase) == 1:
                    tokens[phrase[0]] = False  # else the same sentence would count twice
        yield tokens, begun._replace(sealed=False)

    def within_phrase(self, state: State) -> Iterator[tuple[Mask, State]]:
        """The next token of a wanted phrase; its words count as the gap's."""
        item = self.demands.items[state.item]
        assert isinstance(item, Gap), "phrases stand in gaps"
        after: State | None = state
        if self.vocabulary.starts[state.rest[0]]:
            full = item.high is not None and state.done >= item.high
            after = None if full or state.words + 1 in self.demands.wanted_at else self.after_word(state, item)
        if after is not None:
            yield self.phrase(after, state.rest, state.phrase)

    def phrase(self, state: State, tokens: tuple[int, ...], phrase: int) -> tuple[Mask, State]:
        """Emit the first of a phrase's tokens; the others are what comes next."""
        rest = tokens[1:]
        seen = state.seen if rest or phrase < 0 else state.seen | 1 << phrase
        following = state._replace(rest=rest, phrase=phrase if rest else -1, seen=seen, sealed=not rest)
        return self.only(tokens[0]), following

    def after_word(self, state: State, item: Gap) -> State | None:
        """The state when one more word of a gap has begun; None if that is one too many."""
        words = self.one_more(state.words)
        done = state.done + 1 if item.high is not None else min(state.done + 1, max(item.low, 1))
        return None if words is None else state._replace(done=done, words=words)

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
