"""Which words of an English story are verbs, nouns and adjectives, as far as its small words tell.

In: a story. Out: words that stand in it. Read by `instructions`. No dictionary and no tagger: a word is taken only
where what stands before and behind it leaves little doubt ("wanted to share", "the kite.", "very happy"), so many are
missed and few are wrong. Stories of other languages give words without a kind.
"""

import re
from typing import NamedTuple


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words("a an the his her their my your our its")
_MODALS = _words(
    "can could will would should must might may did does do didn't don't doesn't can't couldn't won't wouldn't "
    "shouldn't cannot let's i'll we'll you'll he'll she'll they'll"
)
_BEFORE_TO = _words(
    "want wants wanted wanting begin begins began start starts started try tries tried need needs needed like likes "
    "liked love loves loved decide decides decided learn learns learned had has have able how ready time hope hoped "
    "promised agreed asked told helped forgot afraid happy excited going trying"
)
_DEGREES = _words("very so too really quite felt feel feels")
_FUNCTION = (
    _DETERMINERS
    | _MODALS
    | _DEGREES
    | _words(
        "i you he she it we they me him us them who what which whose mine yours hers ours theirs myself himself "
        "herself itself themselves and or but nor because if when while until since although though as than then so "
        "of in on at by for with from to into onto over under up down out off about around after before behind near "
        "between through across along inside outside above below beside against without toward towards away back "
        "is am are was were be been being have has had having get got go goes going went gone come came "
        "not no yes never always also only just even still again soon now here there where why how all any both many "
        "much more most less few other one two three four five six seven eight nine ten first last next once together "
        "this that these those some every each another home ever too well lots lot often ago time day end "
        "everyone everything someone something nothing anything anyone nobody else same "
        "own such like own oh hello hi okay please thank thanks named called"
    )
)
_PAST = _words(
    "ran saw said told took gave made found knew thought felt left kept held began sang swam drank ate slept sat stood "
    "fell flew grew threw drew blew broke spoke woke wore bought brought caught taught fought built sent spent lent "
    "heard led met paid read rode rose shook shone shot shut stole stuck swung won wrote bit hid hit hurt cut put let "
    "lost meant hung dug fed forgot chose drove froze became understood sold lay laid lit slid spun stung crept leapt"
)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|[^\w\s]")
_MIN_LETTERS, _MAX_LETTERS = 2, 14
_MIN_OTHER_LETTERS = 4  # of a word whose kind is not known
_ENGLISH = 0.2  # share of small words in a text that is English


class Found(NamedTuple):
    """Distinct words of a story by their kind, in order of appearance; `others` only where no kind is known."""

    verbs: list[str]
    nouns: list[str]
    adjectives: list[str]
    others: list[str]


def find_words(story: str) -> Found:
    """Words that a story uses, in lower case there, which leaves out names and the beginnings of sentences."""
    tokens = _WORD.findall(story.replace("’", "'"))
    lowered = [token.lower() for token in tokens]
    words = [token for token in tokens if token[0].isalpha()]
    if sum(map(_FUNCTION.__contains__, lowered)) < _ENGLISH * len(words):
        others = [word for word in words if _MIN_OTHER_LETTERS <= len(word) <= _MAX_LETTERS and word.islower()]
        return Found([], [], [], list(dict.fromkeys(others)))
    tokens, lowered = [*tokens, ".", "."], [*lowered, ".", "."]
    verbs, adjectives = dict.fromkeys(_verbs(tokens, lowered)), dict.fromkeys(_after_degrees(tokens, lowered))
    nouns: dict[str, None] = {}
    for qualities, noun in _after_determiners(tokens, lowered):
        nouns[noun] = None
        adjectives.update(dict.fromkeys(qualities))
    return Found(
        list(verbs),
        [word for word in nouns if word not in verbs and word not in adjectives],
        [word for word in adjectives if word not in verbs],
        [],
    )


def _is_content(token: str) -> bool:
    """Whether it may be used: a word in lower case with a meaning of its own."""
    return token.isalpha() and token.islower() and token not in _FUNCTION and _MIN_LETTERS <= len(token) <= _MAX_LETTERS


def _is_verbal(token: str) -> bool:
    """Whether it looks like a verb in another form, or an adverb; `red`, `king` and `fly` are short enough not to."""
    if token in _PAST:
        return True
    return token.endswith(("ed", "ly")) if len(token) == 5 else len(token) > 5 and token.endswith(("ed", "ing", "ly"))


def _verbs(tokens: list[str], lowered: list[str]) -> list[str]:
    """`wanted to share`, `did not share`, `could share`: the word behind is a verb in its plain form."""
    found = []
    for place, word in enumerate(lowered[:-2]):
        if word in _MODALS or (word == "to" and place and lowered[place - 1] in _BEFORE_TO):
            verb = tokens[place + 1 + (lowered[place + 1] in ("not", "never", "always"))]
            if _is_content(verb) and not _is_verbal(verb):
                found.append(verb)
    return found


def _after_degrees(tokens: list[str], lowered: list[str]) -> list[str]:
    """`very happy`, `felt sad`: the word behind is an adjective, unless it belongs to another (`so many trees`)."""
    places = [place + 1 for place, word in enumerate(lowered) if word in _DEGREES]
    return [
        tokens[place]
        for place in places
        if _is_content(tokens[place]) and not _is_verbal(tokens[place]) and not _is_content(tokens[place + 1])
    ]


def _after_determiners(tokens: list[str], lowered: list[str]) -> list[tuple[list[str], str]]:
    """`the big red ball.` gives `(["big", "red"], "ball")`, `the dog ran` gives `([], "dog")`.

    At most two words before the noun, and behind it a small word, a mark or a verb in the past.
    """
    found = []
    for place, determiner in enumerate(lowered):
        if determiner not in _DETERMINERS:
            continue
        run: list[str] = []
        for word in tokens[place + 1 : place + 5]:
            if not _is_content(word) or (run and _is_verbal(word)):
                break
            run.append(word)
        is_doubtful = len(run) > 1 and run[-1].endswith("s")  # "the dog barks"
        if 1 <= len(run) <= 3 and not is_doubtful and not any(map(_is_verbal, run)):
            found.append((run[:-1], run[-1]))
    return found
