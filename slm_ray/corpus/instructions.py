"""Instructions before stories, after TinyStories-Instruct, and the prompts of models that learned with and without.

In: a cleaned story and its hash. Out: the same story behind an instruction that it fulfils, in the form of section 4
of Eldan and Li (arXiv:2305.07759): a subset of words, features, a sentence and a summary, in any order. The paper had
them written by a language model; here they are found in the text by rules (`lexicon`), so that they are always true of
the story and cost nothing. The subset is a pure function of the hash.

    Features: Dialogue
    Words: share, kite, happy
    Summary: Tom had a kite. He loved it.
    Story:
    Tom had a kite. ...

The paper leaves a blank line behind `Story:`. Here there is none: the ids of a prompt would not be the first ones of a
training text, because tokenizers join two line breaks at the end of a text.
"""

import re
from collections.abc import Sequence

from slm_ray.corpus.dice import Dice

INSTRUCTION_FORMAT = 2
"""Names these rules in a manifest. Bump it whenever any story gets another instruction."""

WORDS, FEATURES, SUMMARY = "Words: ", "Features: ", "Summary: "
FIRST_SENTENCE, RANDOM_SENTENCE = "First sentence: ", "Random sentence: "
STORY_MARK = "Story:\n"
"""Ends an instruction: the story follows."""

DIALOGUE, MORAL_VALUE = "Dialogue", "MoralValue"
FIXED_WORDS = (WORDS, FEATURES, SUMMARY, FIRST_SENTENCE, RANDOM_SENTENCE, STORY_MARK, f"{DIALOGUE}, {MORAL_VALUE}")
"""All that an instruction may hold besides what is the story's."""

CHAT_TEMPLATE = "chat_template.jinja"
"""File of a model folder that says which of the two templates below it takes."""

_LAST_USER = """\
{%- set said = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- set parts = message['content'] or '' -%}
{%- set parts = [parts] if parts is string else parts | selectattr('text', 'defined') | map(attribute='text') | list -%}
{%- set said.text = parts | join('\\n') -%}
{%- endif -%}
{%- endfor -%}
"""
STORY_TEMPLATE = "{{- bos_token -}}\n" + _LAST_USER + "{{- said.text -}}\n"
"""For models of plain stories: the mark that begins every story, and the last user message as its beginning."""
INSTRUCTION_TEMPLATE = (
    "{{- bos_token -}}\n"
    + _LAST_USER
    + "{%- set said.text = said.text | trim -%}\n"
    + "{{- said.text + ('\\n' if said.text else '') + 'Story:\\n' -}}\n"
)
"""For models of instructed stories: the same mark, and `instruction_prompt` of the last user message."""

MIN_SENTENCES = 3
"""Of a story that gets a sentence or a summary: of a shorter one they would be all of it."""
SUMMARY_SENTENCES = 2
MAX_SENTENCE_CHARS = 160  # a context of 128 tokens holds a story as well
_WORDS_PERCENT, _FEATURES_PERCENT = 75, 60
_SALT = 0x1257  # other draws than those that choose a split

_END = re.compile(r"[.!?…][\"'”’)]*\s+(?![a-z])|[。！？][」』”]*")
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St)\.\s+$")
_QUOTED = re.compile(r"(?<![^\s(\[—–-])\"(?=\S)([^\"]*)(?<=\S)\"|“([^“”]*)”|«([^«»]*)»|「([^「」]*)」(と)?")
"""Text between two marks that belong together, from the left on: inches (5") open nothing."""
_SPEECH_ENDS = (*".,!?…。！？-–—",)
_NOT = r"(?<!\bnot )(?<!\bnever )(?<!n't )"
_KINDS = r"(?:(?:a|an|the|very|big|great|good|new|valuable|important) )*"
_MORAL = re.compile(
    rf"\b[Mm]oral of (?:the|this|our) (?:story|tale)\b|\b[Tt]he moral is\b|"
    rf"{_NOT}\b(?:learn(?:ed|t|s) {_KINDS}|taught (?:him|her|them|us|me|everyone) {_KINDS})lesson\b"
)


def with_instruction(story: str, digest: bytes) -> str:
    """The story behind an instruction that it fulfils; `digest`, at least 8 bytes, decides which parts it has."""
    return instruction_of(story, digest) + story


def instruction_of(story: str, digest: bytes) -> str:
    """An instruction that the story fulfils, with `STORY_MARK` at its end.

    Three of four stories have words to use (a verb, a noun, an adjective, as far as there are), three of five their
    features, and three of four one sentence of theirs, the first one, or their first sentences as a summary. A story
    that is too short for a part goes without; of nothing but a few words, the mark alone stands before it.
    """
    from slm_ray.corpus.lexicon import find_words  # takes a tenth of a second, and few jobs write instructions

    dice = Dice(_SALT, int.from_bytes(digest[:8]))
    has_words, has_features = dice.chance(_WORDS_PERCENT), dice.chance(_FEATURES_PERCENT)
    kind = dice.pick(("", FIRST_SENTENCE, RANDOM_SENTENCE, SUMMARY))
    words = ", ".join(dice.pick(found) for found in find_words(story) if found) if has_words else ""
    parts = [
        WORDS + words if words else "",
        FEATURES + ", ".join(found) if has_features and (found := features(story)) else "",
        _told(story, kind, dice) if kind else "",
    ]
    lines = [part for part in parts if part]
    return "".join(f"{line}\n" for line in dice.sample(lines, len(lines))) + STORY_MARK


def without_instruction(text: str) -> str:
    """The story behind the first `STORY_MARK` that is a line of its own; a text that has none is returned as it is."""
    _, mark, story = f"\n{text}".partition(f"\n{STORY_MARK}")
    return story if mark else text


def features(story: str) -> list[str]:
    """Those of the paper's six features that the text itself shows, by the names of TinyStories-Instruct.

    `Dialogue`: between two quotation marks stands text that ends as speech does, with a stop or a comma. `MoralValue`:
    the story says that a lesson was learned, or what its moral is.
    `BadEnding`, `Twist`, `Foreshadowing` and `Conflict` need a reader who understands, and are never claimed.
    """
    found = {DIALOGUE: _has_speech(story), MORAL_VALUE: _MORAL.search(story) is not None}
    return [name for name, is_shown in found.items() if is_shown]


def _has_speech(story: str) -> bool:
    for *quoted, is_told in _QUOTED.findall(story):
        text = "".join(quoted).rstrip()
        if any(map(str.isalnum, text)) and (is_told or text.endswith(_SPEECH_ENDS)):
            return True
    return False


def sentences(story: str) -> list[str]:
    """The sentences of a story, each on one line. `"Stop!" said Tom. He ran.` has two."""
    text = " ".join(story.split())
    parts, start = [], 0
    for end in _END.finditer(text):
        if not _TITLE.search(text, start, end.end()):
            parts.append(text[start : end.end()].strip())
            start = end.end()
    return [part for part in (*parts, text[start:].strip()) if part]


def _told(story: str, kind: str, dice: Dice) -> str:
    """A part that repeats sentences of the story; empty where it is too short, or its sentences are too long."""
    told = sentences(story)
    if len(told) < MIN_SENTENCES:
        return ""
    if kind == SUMMARY:
        short = [" ".join(told[:number]) for number in range(SUMMARY_SENTENCES, 0, -1)]
    else:
        short = [dice.pick(told) if kind == RANDOM_SENTENCE else told[0]]
    fitting = [text for text in short if len(text) <= MAX_SENTENCE_CHARS]
    return kind + fitting[0] if fitting else ""


def instruction_prompt(text: str) -> str:
    r"""The prompt of a model that learned with instructions: `"Words: kite"` becomes `"Words: kite\nStory:\n"`."""
    text = text.strip()
    return (f"{text}\n" if text else "") + STORY_MARK


def words_instruction(words: Sequence[str]) -> str:
    """The instruction to use these words: `["kite", "tree"]` becomes `"Words: kite, tree"`; empty without any."""
    named = [" ".join(word.split()) for word in words if word.strip()]
    return WORDS + ", ".join(named) if named else ""


def takes_instructions(template: str) -> bool:
    """Whether the content of a model's `chat_template.jinja` is that of models that learned with instructions."""
    return template.strip() == INSTRUCTION_TEMPLATE.strip()
