"""Features of made-up images, drawn by hypothesis, and what plugins get beside them."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from tinyspeed import pruning

SEED = 5  # of the plugins that draw


def beside(name: str, features: Tensor) -> dict[str, Tensor]:
    """The signals that a plugin needs, made up row by row, so that an image's are the same in any batch."""
    features = features.float()
    made_up = {
        "cls_attention": lambda: features[..., 0].abs(),
        "keys": lambda: features.roll(1, -1) - 1,
        "tower": lambda: features.flip(-1) + 1,
    }
    return {signal: made_up[signal]() for signal in pruning.entry(name).needs}


def distinct(seed: int, *shape: int) -> Tensor:
    """Features in which no two distances come near to being equal, up to luck that `assume` sorts out."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def pictures(draw, max_images: int = 3, max_rows: int = 40) -> Tensor:
    """(B, N, D) random features, at times with repeated, constant or zero rows: flat sky makes all of them."""
    shape = draw(st.integers(1, max_images)), draw(st.integers(1, max_rows)), draw(st.integers(1, 12))
    g = torch.Generator().manual_seed(draw(seeds))
    features = torch.randn(shape, generator=g)
    kind = draw(st.sampled_from(["random", "random", "repeated", "constant", "zero", "some zero"]))
    if kind == "repeated":
        features = features[:, torch.randint(max(1, shape[1] // 4), (shape[1],), generator=g)]
    elif kind == "constant":
        features = features[:, :1].expand(shape).contiguous()
    elif kind == "zero":
        features = torch.zeros(shape)
    elif kind == "some zero":
        features = features * (torch.rand(shape[:2], generator=g) < 0.5)[..., None]
    return features


def row_counts(features: Tensor) -> st.SearchStrategy[int]:
    return st.integers(1, features.shape[1])


def scatter_images(images: list[Tensor], n: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Images of different size in one (B, n, D) batch, their rows at random places and garbage between them: newline
    rows lie in the midst of a picture, padding at its end. (features, mask, where each image's rows lie)."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(len(images), n, images[0].shape[1], generator=g) * 3
    mask = torch.zeros(len(images), n, dtype=torch.bool)
    places = [torch.randperm(n, generator=g)[: len(image)].sort().values for image in images]
    for b, (image, place) in enumerate(zip(images, places, strict=True)):
        features[b, place] = image
        mask[b, place] = True
    return features, mask, places


seeds = st.integers(0, 2**31)


def cosine_distances(features: Tensor) -> Tensor:
    """(N, N): 1 - cos in float64. A zero row is at distance 1 from everything, itself included."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return 1 - unit @ unit.T


def greedy_values(distances: Tensor, chosen: list[int]) -> dict[int, float]:
    """What the next pick maximises: for each row not chosen, its distance to the nearest chosen row; while nothing is
    chosen, to the nearest other row."""
    others = [j for j in range(len(distances)) if j not in chosen]
    against = chosen or others
    return {j: min((float(distances[j, i]) for i in against if i != j), default=math.inf) for j in others}


def select(name: str, features: Tensor, **how):
    return pruning.select(name, features, seed=SEED, **{"signals": beside(name, features), **how})
