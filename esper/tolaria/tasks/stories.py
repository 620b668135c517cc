"""The embedded generator of small grammatical stories: a stand-in where the real TinyStories are not at hand.

A story has a hero, a friend, a place and a thing that come back by name or by the right pronoun, so that what comes
next depends on words far behind. Story `index` is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper.leyline.keys import numpy_generator

Pick = Callable[[Sequence[str]], str]

_PEOPLE = {
    "girl": ("Lily", "Mia", "Anna", "Sue", "Ella", "Rosa"),
    "boy": ("Tom", "Ben", "Max", "Sam", "Leo", "Jack"),
    "dog": ("Spot", "Rex"),
    "cat": ("Whiskers", "Luna"),
    "rabbit": ("Hop", "Clover"),
    "bird": ("Tweet", "Robin"),
    "frog": ("Lil", "Croak"),
    "mouse": ("Pip", "Nib"),
}
_PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
_ITS = ("it", "it", "its")
_CHARACTERS = ("happy", "kind", "small", "clever", "brave", "shy", "funny", "old", "curious", "sleepy")
_THINGS = ("ball", "kite", "apple", "box", "book", "drum", "hat", "egg", "toy", "cake", "flower", "shell", "umbrella")
_LOOKS = ("red", "blue", "big", "shiny", "tiny", "soft", "old", "orange", "pretty", "yellow")
_PLACES = ("park", "garden", "forest", "kitchen", "field", "village", "yard", "school", "meadow", "barn")
_GAMES = ("play", "run", "sing", "dance", "jump", "read", "hide", "swim", "dig", "paint")
_OPENINGS = ("Once upon a time", "One day", "Long ago", "One sunny morning", "One rainy day", "Last winter")
_WEATHER = ("The sun was warm", "The wind was cold", "It was very quiet", "The sky was blue", "Snow fell all day")
_FEELINGS = ("happy", "sad", "proud", "scared", "surprised", "glad", "worried", "excited")
_LESSONS = ("share", "help a friend", "tell the truth", "be patient", "try again", "be kind", "say sorry", "listen")
_SPOTS = ("under a tree", "behind the door", "near the pond", "on a chair", "in the grass", "next to a wall")

_EVENTS = (
    "{hero} saw {a_thing} {spot}.",
    "{hero} wanted to {game} with {friend}, but {friend} was {feeling}.",
    "Then {he} gave the {thing} to {friend} and {friend} was {feeling}.",
    '"Can I have your {thing}?" asked {friend}.',
    '"Do not be {feeling}," said {hero}. "I will help you."',
    "{hero} lost {his} {thing} {spot}, so {friend} helped {him} to find it.",
    "{friend} and {hero} went back to the {place} to {game}.",
    "{weather}, and {hero} felt {feeling}.",
    "{hero} looked {spot} and found the {thing}.",
    "The {thing} was too {look} for {hero}, so {he} asked {friend} for help.",
    "{friend} said that the {place} was a good place to {game}.",
    "{hero} put the {thing} {spot} and went to sleep.",
)


@dataclass(frozen=True, slots=True)
class _Being:
    name: str
    kind: str

    @property
    def pronouns(self) -> tuple[str, str, str]:
        """Subject, object and possessive."""
        return _PRONOUNS.get(self.kind, _ITS)


def embedded_story(index: int) -> str:
    """Return one story."""
    draws = iter(numpy_generator("embedded-stories", index).integers(0, 2**31, size=96).tolist())

    def pick(choices: Sequence[str]) -> str:
        return choices[int(next(draws)) % len(choices)]

    hero = _being(pick, but="")
    friend = _being(pick, but=hero.name)
    thing, look, place = pick(_THINGS), pick(_LOOKS), pick(_PLACES)
    he, him, his = hero.pronouns
    names = {"hero": hero.name, "friend": friend.name, "he": he, "him": him, "his": his, "thing": thing, "place": place}
    names |= {"look": look, "a_thing": _with_article(f"{look} {thing}")}
    character = pick(_CHARACTERS)
    sentences = [
        f"{pick(_OPENINGS)}, there was {_with_article(f'{character} {hero.kind}')} named {hero.name}.",
        f"{hero.name} liked to {pick(_GAMES)} in the {place} with {his} friend {friend.name} the {friend.kind}.",
        f"{he.capitalize()} had {_with_article(f'{look} {thing}')}.",
    ]
    events = list(_EVENTS)
    for _ in range(3 + next(draws) % 4):
        event = pick(events)
        events.remove(event)
        words = {"game": pick(_GAMES), "feeling": pick(_FEELINGS), "weather": pick(_WEATHER), "spot": pick(_SPOTS)}
        sentences.append(event.format(**names, **words))
    sentences.append(f"At the end, {hero.name} was {pick(_FEELINGS)}, and {he} learned to {pick(_LESSONS)}.")
    return " ".join(sentences)


def _being(pick: Pick, but: str) -> _Being:
    """A character of another name than `but`."""
    kind = pick(tuple(_PEOPLE))
    return _Being(pick([name for name in _PEOPLE[kind] if name != but]), kind)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
