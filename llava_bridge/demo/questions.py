"""Which facts of a scene are asked for, and how.

What makes the answers hard to guess without the picture:

* yes/no questions come in complementary pairs, as in VQA v2 (Goyal et al. 2017, section 3): the same text is asked of
  two scenes, true of one and false of the other, and a coin says of which. P(yes | text) is exactly one half.
* of the other facts about a scene the one whose answer was given least often so far is asked, which makes answers as
  equally frequent as the scenes allow. An object counted zero times is one of the other scene of the pair, so that
  absent objects are as frequent as present ones.
* whether one object is above or left of another is asked in both senses and both orders alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from llava_bridge.demo.facts import DIFFERENCES, FACTS, TYPE_OF, Fact, Scene
from llava_bridge.demo.texts import NUM_WORDINGS, Language
from llm2clip.demo.concepts import Concept

OPENING_TYPES = ("count", "yesno")
"""Asked first in a dialogue: the others mention what is there."""


@dataclass(frozen=True)
class Question:
    """One question with its answer, in words."""

    type: str
    subtype: str
    text: str
    answer: str
    language: str


@dataclass
class Questioner:
    """Chooses facts of scenes and asks for them in one language, keeping answers balanced over all it asked."""

    language: Language
    grid: int
    rng: Random
    vary: bool
    """Use all wordings; false: the first of each."""
    _given: Counter[tuple] = field(default_factory=Counter)

    def ask_both(
        self, subtype: str, scenes: tuple[Scene, Scene], asked: tuple[set[str], set[str]]
    ) -> tuple[Question, Question] | None:
        """Ask a question of each of two scenes; if it is a yes/no question, the same, true of exactly one of them.

        Args:
            subtype: one of SUBTYPES.
            scenes: what is asked about; objects of the one are counted zero times in the other.
            asked: topics of each to leave out; the new ones are added.

        Returns:
            The two questions, or None when one of the scenes has nothing left to ask.
        """
        facts = (
            self._differing(subtype, scenes, asked) if subtype in DIFFERENCES else self._own(subtype, scenes, asked)
        )
        if facts is None:
            return None
        wording = self._wording()
        for topics, fact in zip(asked, facts, strict=True):
            topics.add(fact.topic)
            self._given[_answer_key(fact)] += 1
        first, second = (self._worded(fact, wording) for fact in facts)
        return first, second

    def _own(
        self, subtype: str, scenes: tuple[Scene, Scene], asked: tuple[set[str], set[str]]
    ) -> tuple[Fact, Fact] | None:
        first = self._rarest(FACTS[subtype](*scenes), asked[0])
        second = self._rarest(FACTS[subtype](*scenes[::-1]), asked[1])
        return (first, second) if first and second else None

    def _differing(
        self, subtype: str, scenes: tuple[Scene, Scene], asked: tuple[set[str], set[str]]
    ) -> tuple[Fact, Fact] | None:
        order = self.rng.sample((0, 1), 2)
        for holder in order:  # the second only where nothing holds of the first alone
            if fact := self._rarest(DIFFERENCES[subtype](scenes[holder], scenes[1 - holder]), asked[0] | asked[1]):
                opposite = fact._replace(answer=False)
                return (fact, opposite) if holder == 0 else (opposite, fact)
        return None

    def _rarest(self, facts: Sequence[Fact], asked: set[str]) -> Fact | None:
        """The fact whose answer was given least; ties are drawn."""
        usable = [fact for fact in facts if fact.topic not in asked]
        return min(usable, key=lambda fact: (self._given[_answer_key(fact)], self.rng.random()), default=None)

    def _wording(self) -> int:
        return self.rng.randrange(NUM_WORDINGS) if self.vary else 0

    def _worded(self, fact: Fact, wording: int) -> Question:
        text = self.language.question(fact.subtype, wording, self.grid, **fact.slots)
        return Question(
            TYPE_OF[fact.subtype], fact.subtype, text, self.language.answer(fact.answer), self.language.tag
        )


def _answer_key(fact: Fact) -> tuple:
    """What is to be equally frequent: the answer; of yes/no pairs, where answers are even, what is asked for."""
    value = next(iter(fact.slots.values())) if fact.subtype in DIFFERENCES else fact.answer
    return fact.subtype, value.key if isinstance(value, Concept) else value
