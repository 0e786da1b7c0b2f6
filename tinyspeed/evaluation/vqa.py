"""When two short answers are the same, and how far a model agrees with ten people: the rules of VQAv2 and TextVQA.

Each question was put to ten people. How right an answer is depends on how many of them gave it too, leaving out each
person in turn:

    score = mean over the ten of  min(1, matches among the other nine / 3)      0, 1, 2, 3, 4 alike: 0, .3, .6, .9, 1

Answers match if they are the same letters once they are normalised. VQA (`vqaEval.py` of GT-Vision-Lab/VQA) removes
punctuation, writes number words as digits, drops articles, and gives contractions their apostrophe back. TextVQA (M4C's
`EvalAIAnswerProcessor`) first drops commas and question marks and cuts off "'s", then does the same.

The official code for VQAv2 normalises nothing if all ten people wrote the same, so "Yes" does not match ten times
"yes". Predictions are therefore normalised before they are handed in. LLaVA does that too, in TextVQA's way; here it is
done in VQA's own.
"""

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official pattern also asks for "not behind a digit", but of the period itself, where that is always true.
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # the official code passes re.UNICODE (32) where the number of replacements belongs
ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
# As published, slips included. Those with a capital never match: words are in lower case by then.
_PUBLISHED = """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
youve:you've
"""
CONTRACTIONS = dict(pair.split(":") for pair in _PUBLISHED.split())


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
