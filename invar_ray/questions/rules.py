"""The rule-based rewriter: wording and noise kinds take turns, drawn from a stable hash."""

from __future__ import annotations

import random
from collections.abc import Callable

from invar_ray.questions.noise import case, speech, typo
from invar_ray.questions.phrases import WORDING
from invar_ray.schema import Example, Rewrite
from invar_ray.text.language import is_latin
from invar_ray.text.stable import stable_random
from invar_ray.text.words import words

Kind = Callable[[str, random.Random], str | None]

# Two groups, so that two rewrites of a question are one that says it otherwise and one that garbles
# it.
NOISE: dict[str, Kind] = {"typo": typo, "speech": speech, "case": case}
KINDS: dict[str, Kind] = {**WORDING, **NOISE}
_DRAWS = 4  # tries of a kind for a wording that is not there yet
# "case" differs from the anchor for a cased tokenizer only: it comes last in its group.
_NOISE_ORDER = ("typo", "speech")


def comparison_key(text: str) -> str:
    """What two wordings are compared by: no case, no punctuation, single spaces (an apostrophe
    parts a word).
    """
    return " ".join(words(text))


class RuleRewriter:
    """Rewrites by rule; needs nothing but the question.

    The kinds are the functions of :data:`KINDS`.  Their order depends on the seed and the example's
    id; wording and noise alternate, so that two rewrites are of different kinds.  A kind with
    nothing new to offer passes its turn to the next of its group.
    """

    provider = "rules"

    def rewrite(self, example: Example, count: int, seed: int) -> list[Rewrite]:
        """``count`` rewrites, numbered from 1; the same arguments give the same ones in any
        process.

        None equals the question or another one when case and punctuation are ignored; if the rules
        run out of such (more rewrites than a short question allows), wordings that differ in case
        or punctuation only fill up, and then fewer are returned.
        """
        return self.fill(example, [], count, seed)

    def fill(self, example: Example, given: list[Rewrite], count: int, seed: int) -> list[Rewrite]:
        """``given`` plus as many rewrites as are missing to ``count``, different from it and from
        the question; none more for a question in another alphabet, as the rules write English.
        """
        rewrites = list(given[:count])
        if not is_latin(example.question):
            return rewrites
        loose = {
            comparison_key(text)
            for text in (example.question, *(rewrite.text for rewrite in rewrites))
        }
        exact = {example.question.strip(), *(rewrite.text for rewrite in rewrites)}
        groups = _groups(seed, example.id)
        places = [0, 0]
        for strict in (True, False):
            turn = idle = 0
            while len(rewrites) < count and idle < len(groups):
                side = turn % len(groups)
                turn += 1
                for _ in groups[side]:
                    place = places[side]
                    places[side] += 1
                    kind = groups[side][place % len(groups[side])]
                    text = _new_wording(
                        example, kind, seed, place, loose if strict else exact, strict
                    )
                    if text is not None:
                        loose.add(comparison_key(text))
                        exact.add(text)
                        rewrites.append(
                            Rewrite(example.id, len(rewrites) + 1, text, kind, self.provider)
                        )
                        idle = 0
                        break
                else:
                    idle += 1
        return rewrites


def _new_wording(
    example: Example, kind: str, seed: int, place: int, taken: set[str], strict: bool
) -> str | None:
    for draw in range(_DRAWS):
        text = KINDS[kind](example.question, stable_random(kind, seed, example.id, place, draw))
        if text is None:
            return None
        text = text.strip()
        if text and (comparison_key(text) if strict else text) not in taken:
            return text
    return None


def _groups(seed: int, example_id: str) -> tuple[list[str], list[str]]:
    """Wording and noise kinds, each group shuffled, and which group is first: all by a stable
    hash.
    """
    # Shuffled, not rotated: else the kind behind one that often passes would get most of the turns.
    generator = stable_random("order", seed, example_id)
    wording = generator.sample(list(WORDING), len(WORDING))
    noise = [*generator.sample(_NOISE_ORDER, len(_NOISE_ORDER)), "case"]
    return (wording, noise) if generator.random() < 0.5 else (noise, wording)
