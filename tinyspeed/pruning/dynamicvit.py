"""DynamicViT (NeurIPS 2021): a small network that learns from the loss which tokens matter."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .random_and_grid import noise
from .registry import register

HIDDEN = 384  # the authors' width; with an LLM's 4096 the network would have 27 million parameters
RATIO = 2.0  # the authors' weight of the ratio loss


@register("dynamicvit", merges="features", learned=True, draws=True, pairs=0)
class DynamicViT(nn.Module):
    """Predicts p_i, the probability that token i is kept, from its own features and the mean of all. The K best stay.

        local, global = halves of MLP(norm(x));   p = sigmoid(MLP(local_i, mean of global))
        training: the K largest of logit p_i + noise_i (the difference of two Gumbel draws);  otherwise of p_i
        ratio loss of an image: 2 (mean_i p_i - K / N)^2

    The original removes nothing while it trains: it masks tokens out of the attention, and so trains no faster. Here
    the tokens are removed. The loss still reaches p, because a kept token is multiplied by p_i / p_i, and only the
    numerator has a gradient: the token stays as it is, and the gradient says whether more of it would have helped. A
    removed token has no gradient, so the noise has to try other tokens. (The original draws for each token whether it
    stays. Here the K best stay, so their number is exact. All images of a step share one draw.) A teacher has no noise.

    What else differs: norm divides a token by its length (root mean square) where the original has a LayerNorm. There
    is one predictor in front of the LLM instead of three between the blocks of a ViT, and not the authors'
    distillation, because slow steps have one of their own.
    """

    def __init__(self, width: int, most: int):
        super().__init__()
        self.within = nn.Linear(width, HIDDEN)
        self.out = nn.Sequential(
            nn.Linear(HIDDEN, HIDDEN // 2), nn.GELU(), nn.Linear(HIDDEN // 2, HIDDEN // 4), nn.GELU(),
            nn.Linear(HIDDEN // 4, 1),
        )  # fmt: skip

    def forward(
        self, features: Tensor, *, most: int, valid: Tensor, counts: Tensor, seed: int, **_
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = F.normalize(features, dim=2) * features.shape[2] ** 0.5
        local, whole = F.gelu(self.within(x)).masked_fill(~valid[:, :, None], 0).chunk(2, dim=2)
        candidates = valid.sum(1)
        mean = whole.sum(1, keepdim=True) / candidates[:, None, None]
        logit = self.out(torch.cat([local, mean.expand_as(local)], dim=2))[:, :, 0]
        score = logit.detach()
        if self.training:
            u = ((noise(torch.arange(valid.shape[1], device=valid.device), seed) >> 40).float() + 0.5) / 2**23
            score = score + torch.log(u) - torch.log1p(-u)  # logistic noise, the difference of two Gumbel draws
        # Rounded, so that equal tokens tie: how a matrix product rounds depends on what else is in the batch.
        score = (score * 2**14).round().masked_fill(~valid, -torch.inf)
        index = score.argsort(dim=1, descending=True, stable=True)[:, :most]
        if not torch.is_grad_enabled():
            return index, None, None
        kept = F.logsigmoid(logit).gather(1, index)
        weight = torch.zeros_like(features[:, :most, :1]).expand(-1, -1, valid.shape[1])
        weight = weight.scatter(2, index[:, :, None], (kept - kept.detach()).exp()[:, :, None])
        p = logit.sigmoid().masked_fill(~valid, 0).sum(1) / candidates
        return index, weight, RATIO * (p - counts / candidates).square()
