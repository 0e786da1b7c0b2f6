"""When two short answers are the same, and how far a model agrees with ten people: the rules of VQAv2 and TextVQA.

Each question was put to ten people. An answer scores by how many of them gave it too, leaving out each in turn:

    score = mean over the ten of  min(1, matches among the other nine / 3)      0, 1, 2, 3, 4 alike: 0, .3, .6, .9, 1

Answers match if they are the same letters once they are normalised. VQA (`vqaEval.py` of GT-Vision-Lab/VQA) removes
punctuation, writes number words as digits, drops articles, and gives contractions their apostrophe back. TextVQA (M4C's
`EvalAIAnswerProcessor`) first drops commas and question marks and cuts off "'s", then does the same.

The official code for VQAv2 normalises nothing if all ten people wrote the same, so "Yes" does not match ten times
"yes". So predictions are normalised before they are handed in: by LLaVA in TextVQA's way, here in VQA's own.
"""

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official pattern also asks for "not after a digit", but of the period itself, where that is always true.
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # the official code passes re.UNICODE (32) where the number of replacements belongs
ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
# The published map has each of these words without one of its apostrophes, and a slip of its own. Words with a capital
# never match: everything is in lower case by then.
_WORDS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am might've mightn't mightn't've
must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _WORDS.split() for i, c in enumerate(word) if c == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"


def normalise(answer: str) -> str:
    """Returns an answer as VQA compares it."""
    words = (NUMBERS.get(word, word) for word in _punctuation(_line(answer)).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalise_textvqa(answer: str) -> str:
    """Returns an answer as TextVQA compares it."""
    return normalise(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def _line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(answer: str) -> str:
    """Removes marks next to a space, and makes others a space; if a number has a comma, removes all of them."""
    thousands = re.search(r"\d,\d", answer)
    out = answer
    for mark in PUNCTUATION:
        goes = thousands or f"{mark} " in answer or f" {mark}" in answer
        out = out.replace(mark, "" if goes else " ")
    return PERIOD.sub("", out, count=PERIODS)


def agreement(answer: str, people: Sequence[str]) -> float:
    """Returns the score above. Of n people m said the same: these have m - 1 matches among the others, the rest m."""
    n, m = len(people), people.count(answer)
    return (m * min(1, (m - 1) / 3) + (n - m) * min(1, m / 3)) / n


def vqav2(prediction: str, people: Sequence[str]) -> float:
    """Returns what the official code gives for a prediction that was normalised and handed in."""
    people = [_line(answer) for answer in people]
    if len(set(people)) > 1:
        people = [normalise(answer) for answer in people]
    return agreement(normalise(prediction), people)


def textvqa(prediction: str, people: Sequence[str]) -> float:
    return agreement(normalise_textvqa(prediction), [normalise_textvqa(answer) for answer in people])
