"""The embedded default: questions about pictures made of real handwritten digits, for a CPU and a few minutes.

A picture is a 12 x 12 canvas of 8 x 8 cells, smooth and grey, with a real scan (UCI digits, 8 x 8, from
scikit-learn) in up to one cell of each quadrant. The tiny LLaVA sees one visual token a cell: 144 tokens, of which
at most 4 matter and 10 % (14) is enough. That is the point of the design. Pruning here is blind to the question, so
a picture packed with digits loses information when pruned and no training scheme can answer; a few digits on a
large canvas is what photos are like for LLaVA: most of the 576 tokens are sky. `Canvas` makes it larger, or divides it
into 9 or 16 regions instead of quadrants, and so holds more digits.

Questions ask for the digit of a region ("digit top-left" -> 7, or none) or for the presence of a digit
("any seven" -> yes). Training shows several to a picture, as LLaVA's conversations do; evaluation asks one, so that no
earlier answer can help. Evaluation pictures are made of scans that no training picture holds.

There is no CLIP to download, so the CLIP-shaped tower is trained here, briefly, to name each cell's content, and then
frozen as LLaVA's is.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..models import built
from ..recipe import Recipe
from ..util import files
from ..util.errors import UserError
from .examples import IGNORE, Example

CELL = 8  # pixels
BLANK = 10  # the content of a cell without a digit
PLACES = {  # lines and columns of regions, by how many there are
    2: (("top", "bottom"), ("left", "right")),
    3: (("top", "middle", "bottom"), ("left", "centre", "right")),
    4: (("top", "upper", "lower", "bottom"), ("left", "inner-left", "inner-right", "right")),
}
DIGITS = tuple("0123456789")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


@dataclass(frozen=True)
class Canvas:
    """How large and how full pictures are. Each region holds at most one digit, so that its name asks for that one."""

    side: int = 12  # cells a line; a cell is a visual token
    regions: int = 2  # a line

    @property
    def cells(self) -> int:
        return self.side**2

    @property
    def pixels(self) -> int:
        return self.side * CELL

    @cached_property
    def places(self) -> list[str]:
        """The regions' names, line by line."""
        lines, columns = PLACES[self.regions]
        return [f"{line}-{column}" for line in lines for column in columns]

    def region(self, place: int) -> tuple[slice, slice]:
        """Lines and columns of a region's cells."""
        size = self.side // self.regions
        line, column = (at * size for at in divmod(place, self.regions))
        return slice(line, line + size), slice(column, column + size)

    @cached_property
    def ids(self) -> dict[str, int]:
        words = ("digit", "any", "none", "yes", "no", *self.places, *NUMBERS, *DIGITS)
        return {word: i for i, word in enumerate(SPECIAL + words)}


DEFAULT = Canvas()


@cache
def scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, 8, 8) uint8 scans and their labels. One scan in five is held out for evaluation."""
    found = find_spec("sklearn")
    if found is None:
        raise UserError("the digits come with scikit-learn: pip install 'tinyspeed[demo]'")
    # Its file without itself: importing scikit-learn takes a second.
    digits = np.loadtxt(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    held_out = np.arange(len(digits)) % 5 == 0
    chosen = digits[held_out if split == "eval" else ~held_out]
    return (chosen[:, :-1].reshape(-1, 8, 8) / 16 * 255).astype(np.uint8), chosen[:, -1].astype(int)


def picture(rng: np.random.Generator, split: str, canvas: Canvas = DEFAULT) -> tuple[np.ndarray, np.ndarray]:
    """Its pixels (96, 96) uint8 and the content of its cells (12, 12): a digit or BLANK."""
    images, labels = scans(split)
    # Smooth ground: a 3 x 3 grid of greys, interpolated.
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


def questions(
    rng: np.random.Generator, cells: np.ndarray, count: int, canvas: Canvas = DEFAULT
) -> list[tuple[str, str]]:
    """`count` different questions about a picture, with their answers. Three in five ask for a region's digit, the
    others for presence, half of those of a digit that is there (when one is)."""
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
    # One kind first, then the other. Presence asked behind all regions can be read off the earlier answers, without
    # the picture; so in half of the pictures it is asked before them.
    first = ("any", "digit")[rng.integers(2)]
    return sorted(asked.items(), key=lambda item: not item[0].startswith(first))


def pixel_values(pixels: np.ndarray) -> Tensor:
    """(3, 96, 96) in [-1, 1]: what the saved image processor makes of the same picture."""
    return torch.from_numpy(pixels).float().div_(127.5).sub_(1).expand(3, -1, -1)


@dataclass(frozen=True)
class Digits:
    """Pictures 0 .. size-1 with their conversations. Picture i depends on (split, seed, i) only."""

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

    def _rng(self, i: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, i, self.split == "eval"])

    def lengths(self, i: int) -> tuple[int, list[int], int]:
        """Text rows, visual rows of each image, and tokens to learn."""
        return 1 + 4 * self.turns, [self.canvas.cells], 2 * self.turns

    def example(self, i: int) -> Example:
        rng = self._rng(i)
        pixels, cells = picture(rng, self.split, self.canvas)
        return Example(*self._text(rng, cells), pixel_values(pixels)[None])

    def where(self, i: int) -> str:
        return f"picture {i}"

    def text(self, i: int) -> tuple[Tensor, Tensor]:
        rng = self._rng(i)
        return self._text(rng, picture(rng, self.split, self.canvas)[1])

    def _text(self, rng: np.random.Generator, cells: np.ndarray) -> tuple[Tensor, Tensor]:
        known = self.canvas.ids
        ids, labels = [known["<s>"]], [IGNORE]
        for turn, (question, answer) in enumerate(questions(rng, cells, self.turns, self.canvas)):
            image = [known["<image>"]] * self.canvas.cells if turn == 0 else []
            prompt = [*image, *(known[word] for word in question.split())]
            reply = [known[answer], known["</s>"]]
            ids += prompt + reply
            labels += [IGNORE] * len(prompt) + reply
        return torch.tensor(ids), torch.tensor(labels)


def canvas_of(recipe: Recipe) -> Canvas:
    return Canvas(recipe.digits.side, recipe.digits.regions)


def from_recipe(recipe: Recipe) -> Digits:
    """The training pictures of a recipe: by default far more than any run looks at, so that every picture is new."""
    return Digits(recipe.digits.pictures, recipe.data.turns, "train", recipe.run.seed, canvas_of(recipe))


def build_model(
    seed: int,
    *,
    width: int = 128,
    layers: int = 2,
    tower_width: int = 64,
    tower_layers: int = 2,
    side: int = DEFAULT.side,
    regions: int = DEFAULT.regions,
) -> nn.Module:
    """A LLaVA-1.5 small enough for two CPU cores: CLIP tower, two-layer projector, Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    canvas = Canvas(side, regions)
    ids = canvas.ids
    vision = CLIPVisionConfig(
        hidden_size=tower_width,
        intermediate_size=2 * tower_width,
        num_hidden_layers=tower_layers,
        num_attention_heads=4,
        image_size=canvas.pixels,
        patch_size=CELL,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=context(canvas),
        # transformers' 0.02 suits widths of thousands; at this width it learns ten times slower.
        initializer_range=width**-0.5,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_seq_length=canvas.cells,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    # At the start attention brings every word the average of 144 mostly blank cells. The word must be louder than that,
    # or training on full sequences spends hundreds of steps telling questions apart (on pruned ones, far fewer).
    llm = model.model.language_model
    with torch.no_grad():
        llm.embed_tokens.weight.mul_(width**0.5)
        for layer in llm.layers:
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                branch.weight.mul_((4 * layers) ** -0.5)
    return model


def context(canvas: Canvas) -> int:
    """The longest sequence: a picture, and room for every question that there is about it."""
    return max(512, canvas.cells + 128)


def train_tower(
    tower: nn.Module,
    seed: int,
    steps: int,
    batch: int = 32,
    report=lambda step, loss: None,
    canvas: Canvas = DEFAULT,
) -> float:
    """Teach the tower what is in every cell and where the cell is; returns its accuracy on held-out digits.

    Linear heads read the tokens that LLaVA will read. Blank cells outnumber digits fifty to one, so they weigh less; on
    other canvases as much less as leaves the balance what it is.
    The place (line and column) is asked for because CLIP's tokens know theirs too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        side, blank = canvas.side, 1.8 * canvas.regions**2 / canvas.cells
        device = next(tower.parameters()).device
        head = nn.Linear(tower.config.hidden_size, BLANK + 1 + 2 * side).to(device)
        parameters = [*tower.parameters(), *head.parameters()]
        tower.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
        places = torch.arange(side**2, device=device).repeat(batch)
        line, column = places // side, places % side
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
            pixels, cells = (
                x.to(device) for x in _cells(np.random.default_rng([seed, step, 2]), "train", batch, canvas)
            )
            weight = torch.where(cells.flatten() == BLANK, blank, 1.0)
            what, at_line, at_column = _read(tower, head, pixels).flatten(0, 1).split([BLANK + 1, side, side], dim=1)
            loss = F.cross_entropy(what, cells.flatten(), reduction="none")
            for place, truth in ((at_line, line), (at_column, column)):
                loss = loss + 0.2 * F.cross_entropy(place, truth, reduction="none")
            loss = (loss * weight).sum() / weight.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            report(step, loss)
    tower.requires_grad_(False)
    with torch.no_grad():
        pixels, cells = (x.to(device) for x in _cells(np.random.default_rng([seed, 0, 3]), "eval", 256, canvas))
        guess = _read(tower, head, pixels)[..., : BLANK + 1].argmax(-1)
    digit = cells != BLANK
    return (guess == cells)[digit].float().mean().item()


def build_processor(canvas: Canvas = DEFAULT):
    """The processor that turns a real picture and a chat into what `Digits.example` makes directly."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(canvas.ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", canvas.ids["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"], model_max_length=context(canvas),
    )  # fmt: skip
    half, size = [0.5, 0.5, 0.5], {"height": canvas.pixels, "width": canvas.pixels}
    pictures = CLIPImageProcessor(  # it crops nothing, but `crop_size` is what transformers counts visual rows by
        size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half
    )
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}"
        "{{ '</s> ' if message['role'] == 'assistant' else '' }}{% endfor %}"
    )
    return LlavaProcessor(
        pictures, tokenizer, patch_size=CELL, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip


def prepare(
    folder: Path, seed: int, *, tower_steps: int, bar: bool = True, device: torch.device | str = "cpu", **sizes: int
) -> Path:
    """The base model in `folder`, in the real on-disk format; built, and its tower trained on the device, if it is not
    there yet."""
    how = {"seed": seed, "tower_steps": tower_steps, **sizes}
    if folder.is_dir():
        built.check(folder, "digits.json", how)
        return folder
    model = build_model(seed, **sizes)
    canvas = Canvas(**{name: sizes[name] for name in ("side", "regions") if name in sizes})
    with tqdm(total=tower_steps, desc="tower", unit="step", disable=not bar, mininterval=0.2) as line:

        def report(step: int, loss: Tensor) -> None:
            if step % 10 == 0:
                line.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            line.update()

        accuracy = train_tower(model.model.vision_tower.to(device), seed, tower_steps, report=report, canvas=canvas)
        line.set_postfix_str(f"names {100 * accuracy:.1f} % of held-out digits")
    with files.atomic(folder) as temporary:
        model.save_pretrained(temporary)
        build_processor(canvas).save_pretrained(temporary)
        built.label(temporary, "digits.json", how)
    return folder


def require_fitting(c, path: str, canvas: Canvas) -> None:
    """Refuses a model whose configuration says that it cannot read these pictures or these words."""
    words, image, size = c.text_config.vocab_size, c.image_token_id, c.vision_config.image_size
    wanted = (len(canvas.ids), canvas.ids["<image>"], canvas.pixels)
    if (words, image, size) != wanted:
        raise UserError(
            f'{path} is not a model for data.kind = "digits": it has {words} words, image token {image} and pictures '
            f"of {size} pixels, not {wanted[0]}, {wanted[1]} and {wanted[2]}; digits.side and digits.regions must be "
            "those that it was built with"
        )


def _read(tower: nn.Module, head: nn.Module, pixels: Tensor) -> Tensor:
    return head(tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:])


def _cells(rng: np.random.Generator, split: str, batch: int, canvas: Canvas) -> tuple[Tensor, Tensor]:
    made = [picture(rng, split, canvas) for _ in range(batch)]
    return torch.stack([pixel_values(p) for p, _ in made]), torch.from_numpy(np.stack([c.flatten() for _, c in made]))
