"""The built-in digits: questions about pictures made of real handwritten digits, for a CPU and a few minutes.

A picture is a smooth grey canvas of 12 x 12 cells of 8 x 8 pixels, with a real scan (UCI digits, 8 x 8, from
scikit-learn) in at most one cell of each quadrant. The tiny LLaVA sees one visual token a cell: 144 tokens, of which
at most 4 matter, so that 10 % (14) are enough. That is the point of the design. Pruning here does not know the
question, so a picture packed with digits loses information when it is pruned, and no training schedule can make up for
it. A few digits on a large canvas are what photos are like for LLaVA: most of the 576 tokens are sky. `Canvas` can be
larger, or divided into 9 or 16 regions instead of quadrants, so that it holds more digits.

Questions ask for the digit of a region ("digit top-left" -> 7, or none) or whether a digit is there ("any seven" ->
yes). Training asks several about a picture, as LLaVA's conversations do. Evaluation asks one, so that no earlier answer
can help, about pictures made of scans that no training picture holds. The model is in digits_model.py.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from ..recipe import Recipe
from ..rows import IGNORE
from ..util import require
from .examples import Example, Sample

CELL = 8  # pixels
BLANK = 10  # the content of a cell without a digit
PLACES = {  # the names of the lines and columns of regions, by how many there are
    2: (("top", "bottom"), ("left", "right")),
    3: (("top", "middle", "bottom"), ("left", "centre", "right")),
    4: (("top", "upper", "lower", "bottom"), ("left", "inner-left", "inner-right", "right")),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


@dataclass(frozen=True)
class Canvas:
    """How large and how full pictures are. Each region holds at most one digit, so that its name asks for that one."""

    side: int = 12  # cells in a line; each cell is a visual token
    regions: int = 2  # in a line

    @property
    def cells(self) -> int:
        return self.side**2

    @property
    def pixels(self) -> int:
        return self.side * CELL

    @cached_property
    def places(self) -> list[str]:
        """The names of the regions, line by line."""
        lines, columns = PLACES[self.regions]
        return [f"{line}-{column}" for line in lines for column in columns]

    def region(self, place: int) -> tuple[slice, slice]:
        """The lines and the columns of a region's cells."""
        size = self.side // self.regions
        line, column = (at * size for at in divmod(place, self.regions))
        return slice(line, line + size), slice(column, column + size)

    @cached_property
    def ids(self) -> dict[str, int]:
        words = ("digit", "any", "none", "yes", "no", *self.places, *NUMBERS, *"0123456789")
        return {word: i for i, word in enumerate(SPECIAL + words)}


DEFAULT = Canvas()


@cache
def scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The scans (n, 8, 8) as uint8, and their labels. One scan in five is held out for evaluation."""
    found = find_spec("sklearn")
    require(found is not None, "the digits come with scikit-learn: pip install '.[demo]'")
    # Only its file is read, since importing scikit-learn takes a second.
    digits = np.loadtxt(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    held_out = np.arange(len(digits)) % 5 == 0
    chosen = digits[held_out if split == "eval" else ~held_out]
    return (chosen[:, :-1].reshape(-1, 8, 8) / 16 * 255).astype(np.uint8), chosen[:, -1].astype(int)


def picture(rng: Generator, split: str, canvas: Canvas = DEFAULT) -> tuple[np.ndarray, np.ndarray]:
    """A picture's pixels (96, 96) as uint8, and the content of its cells (12, 12): a digit or BLANK."""
    images, labels = scans(split)
    # The smooth background is a 3 x 3 grid of greys, interpolated.
    at = np.linspace(0, 2, canvas.pixels)
    low = np.minimum(at.astype(int), 1)
    weight = np.zeros((canvas.pixels, 3))
    rows = np.arange(canvas.pixels)
    weight[rows, low], weight[rows, low + 1] = 1 - (at - low), at - low
    pixels = weight @ rng.uniform(0, 90, (3, 3)) @ weight.T
    cells = np.full((canvas.side, canvas.side), BLANK)
    for place in range(len(canvas.places)):
        if rng.random() < 0.25:
            continue
        lines, columns = canvas.region(place)
        row, column = rng.integers(canvas.side // canvas.regions, size=2) + (lines.start, columns.start)
        scan = rng.integers(len(labels))
        cells[row, column] = labels[scan]
        window = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        np.maximum(window, images[scan], out=window)
    return pixels.astype(np.uint8), cells


def questions(rng: Generator, cells: np.ndarray, count: int, canvas: Canvas = DEFAULT) -> list[tuple[str, str]]:
    """`count` different questions about a picture, with their answers. Three in five ask for the digit of a region; the
    others ask whether a digit is there, half of them for one that is (if any is)."""
    held = [cells[canvas.region(place)].min() for place in range(len(canvas.places))]
    present = sorted({int(digit) for digit in held if digit != BLANK})
    absent = [d for d in range(10) if d not in present]
    asked: dict[str, str] = {}
    while len(asked) < count:
        if rng.random() < 0.6:
            place = int(rng.integers(len(held)))
            asked[f"digit {canvas.places[place]}"] = "none" if held[place] == BLANK else str(held[place])
        elif present and (not absent or rng.random() < 0.5):
            asked[f"any {NUMBERS[rng.choice(present)]}"] = "yes"
        else:
            asked[f"any {NUMBERS[rng.choice(absent)]}"] = "no"
    # All questions of one kind come first. After all regions, whether a digit is there can be read off the earlier
    # answers, without the picture; so for half of the pictures that is asked first.
    first = ("any", "digit")[rng.integers(2)]
    return sorted(asked.items(), key=lambda item: not item[0].startswith(first))


def pixel_values(pixels: np.ndarray) -> Tensor:
    """A picture as a tensor (3, 96, 96) in [-1, 1], as the saved image processor would make it."""
    return torch.from_numpy(pixels).float().div_(127.5).sub_(1).expand(3, -1, -1)


@dataclass(frozen=True)
class Digits:
    """A `Source`: pictures 0 .. size-1 with their conversations. Picture i depends on split, seed and i only."""

    size: int
    turns: int
    split: str = "train"
    seed: int = 0
    canvas: Canvas = DEFAULT

    def __len__(self) -> int:
        return self.size

    @property
    def fingerprint(self) -> str:
        return f"{self.size} {self.split} pictures, {self.turns} turns, seed {self.seed}, {self.canvas}"

    def _rng(self, i: int) -> Generator:
        return np.random.default_rng([self.seed, i, self.split == "eval"])

    def lengths(self, i: int) -> Sample:
        return 1 + 4 * self.turns, [self.canvas.cells], 2 * self.turns

    def where(self, i: int) -> str:
        return f"picture {i}"

    def text(self, i: int) -> tuple[Tensor, Tensor]:
        example = self.example(i)
        return example.input_ids, example.labels

    def example(self, i: int) -> Example:
        rng, known = self._rng(i), self.canvas.ids
        pixels, cells = picture(rng, self.split, self.canvas)
        ids, labels = [known["<s>"]], [IGNORE]
        for turn, (question, answer) in enumerate(questions(rng, cells, self.turns, self.canvas)):
            image = [known["<image>"]] * self.canvas.cells if turn == 0 else []
            prompt = [*image, *(known[word] for word in question.split())]
            reply = [known[answer], known["</s>"]]
            ids += prompt + reply
            labels += [IGNORE] * len(prompt) + reply
        return Example(torch.tensor(ids), torch.tensor(labels), {"pixel_values": pixel_values(pixels)[None]})


def canvas_of(recipe: Recipe) -> Canvas:
    return Canvas(recipe.digits.side, recipe.digits.regions)


def from_recipe(recipe: Recipe) -> Digits:
    """The training pictures of a recipe: by default far more than any run looks at, so that every picture is new."""
    return Digits(recipe.digits.pictures, recipe.data.turns, "train", recipe.run.seed, canvas_of(recipe))
