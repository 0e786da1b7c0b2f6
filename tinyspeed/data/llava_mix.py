"""How long the samples of LLaVA's instruction mix are, which the balance between GPUs depends on.

llava_v1_5_mix665k is ten sets. How many samples each has, how many questions are asked about a picture, and that long
texts are cut and not split, is public (the appendix of LLaVA-1.5, arXiv 2310.03744, and the sets' own counts):

    VQAv2     443,757 questions on 82,783 pictures, 5.4 a conversation; GQA 943,000 on 72,140, 13.1
    VG        up to 10 regions a picture, RefCOCO fewer; A-OKVQA a question once for each of its choices
    ShareGPT  no pictures, cut at 2,048 tokens

How many tokens a turn has is not public. Those here are estimates (a short question and answer with its roles about 20,
a region with its box 45, a system message 35), so a length is drawn: 35 + turns x a log-normal number of tokens. In
some sets the number of turns varies, some texts are twice as long as others, and the long tail is the texts without
pictures. The mean may be a quarter off the real file's, which `tinyspeed estimate` reads; only the shape matters here.
"""

from dataclasses import dataclass

import numpy as np

from ..util import UserError, require_known
from .examples import Sample


@dataclass(frozen=True)
class Set:
    name: str
    samples: int
    turns: float  # their mean number; above 1, it is 1 + a Poisson number
    tokens: float  # of a turn: the median
    spread: float  # sigma of the log of a sample's tokens a turn
    learned: float  # the share of them that is the answer's
    picture: bool = True


MIX = [
    Set("LLaVA conversation", 56_681, 3.5, 75, 0.35, 0.7),
    Set("LLaVA detail", 23_240, 1, 125, 0.25, 0.85),
    Set("LLaVA reasoning", 76_643, 1, 190, 0.3, 0.85),
    Set("ShareGPT", 40_688, 4, 300, 0.9, 0.8, picture=False),
    Set("VQAv2", 82_783, 5.4, 19, 0.1, 0.15),
    Set("GQA", 72_140, 13.1, 21, 0.1, 0.15),
    Set("OKVQA", 8_998, 1, 32, 0.2, 0.1),
    Set("OCRVQA", 80_000, 4.8, 26, 0.2, 0.35),
    Set("A-OKVQA", 66_160, 1, 60, 0.25, 0.05),
    Set("TextCaps", 21_953, 1, 110, 0.5, 0.15),
    Set("RefCOCO", 48_447, 5, 42, 0.15, 0.5),
    Set("VG", 86_417, 8.5, 45, 0.15, 0.5),
]
SAMPLES = sum(part.samples for part in MIX)
CAPTIONS = 558_128  # LLaVA's alignment set: a picture and a web caption of some 15 words, and nothing else
SYSTEM = 35  # tokens before the first turn
# Visual tokens of a picture, and how often. NeXT cuts it into crops on a grid and drops what was padding: a picture of
# 4:3 leaves 36 lines of 48 patches and a newline, beside the 576 of the whole picture. Most pictures are COCO's.
VISUAL = {"1.5": {576: 1.0}, "next": {2340: 0.55, 2352: 0.2, 2144: 0.12, 2928: 0.05, 1752: 0.05, 1176: 0.03}}
LONGEST = {"1.5": 2048, "next": 4096}  # tokens of a sample with its picture, as the models were trained


def mix(n: int, seed: int, family: str = "1.5", longest: int = 0) -> list[Sample]:
    """The lengths of `n` samples in a shuffled epoch. A sample has at most `longest` tokens (0: as published)."""
    draw = np.random.default_rng([seed, 665])
    kinds = draw.choice(len(MIX), size=n, p=[part.samples / SAMPLES for part in MIX])
    turns = np.array([part.turns for part in MIX])[kinds]
    turns = np.where(turns > 1, 1 + draw.poisson(np.maximum(turns - 1, 0)), 1)
    spread, tokens = (np.array([getattr(part, name) for part in MIX])[kinds] for name in ("spread", "tokens"))
    text = SYSTEM + turns * tokens * np.exp(spread * draw.standard_normal(n))
    visual = _visual(draw, n, family)
    longest = longest or LONGEST[family]
    if longest < max(VISUAL[family]) + SYSTEM:
        raise UserError(f"samples of at most {longest:,} tokens have no room for pictures of {max(VISUAL[family]):,}")
    found: list[Sample] = []
    for kind, length, picture in zip(kinds, text.round().astype(int), visual, strict=True):
        part = MIX[kind]
        images = [int(picture)] * part.picture
        length = int(min(length, longest - sum(images)))
        found.append((length, images, max(1, int((length - SYSTEM) * part.learned))))
    return found


def captions(n: int, seed: int, family: str = "1.5") -> list[Sample]:
    """The lengths of `n` samples of the alignment set, which has neither a template nor a system message."""
    draw = np.random.default_rng([seed, 558])
    words = np.maximum(4, 22 * np.exp(0.4 * draw.standard_normal(n))).round().astype(int)
    visual = _visual(draw, n, family)
    return [(int(tokens) + 1, [int(picture)], int(tokens)) for tokens, picture in zip(words, visual, strict=True)]


def _visual(draw: np.random.Generator, n: int, family: str) -> np.ndarray:
    require_known("family", family, VISUAL)
    return draw.choice(list(VISUAL[family]), size=n, p=list(VISUAL[family].values()))
