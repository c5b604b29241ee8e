"""A tokenizer's pictures and true ones -> a discriminator between them, and what it teaches."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

GROUPS = 32  # of GroupNorm
MAX_WEIGHT = 1e4  # where the discriminator has no gradient to speak of


@dataclass
class AdversarialConfig:
    """Off by default: pictures get sharper, at the cost of PSNR."""

    weight: float = 0.0
    """Of the discriminator's gradient beside that of the reconstruction, at the decoder's last layer; 0 has
    none. Esser et al. have 0.8."""
    start: int = 0
    """The first step with a discriminator: late enough that there are pictures to tell apart."""
    channels: int = 64
    """Of its first layer, a multiple of 32; doubled with each of the next, up to eight times."""
    layers: int = 3
    """That halve the side. 3: it judges patches of 70 x 70 pixels, 2: 34 x 34, 1: 16 x 16."""
    learning_rate: float = 1e-4
    """Of the discriminator; it follows the tokenizer's schedule."""

    def __post_init__(self) -> None:
        for key in ("weight", "start"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"adversarial.{key}: {getattr(self, key)}, must be at least 0")
        if self.channels < GROUPS or self.channels % GROUPS:
            raise ValueError(f"adversarial.channels: {self.channels}, must be a multiple of {GROUPS}")
        if self.layers < 1:
            raise ValueError(f"adversarial.layers: {self.layers}, must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"adversarial.learning_rate: {self.learning_rate}, must be above 0")

    @property
    def min_side(self) -> int:
        """Pixels that a picture needs for the discriminator to have one judgement of it."""
        return 3 * 2**self.layers


class Discriminator(nn.Module):
    """Judges patches of pictures (PatchGAN; Isola et al. 2017): above 0 where they look true.

    GroupNorm in the place of BatchNorm: what it says of a picture depends on that picture alone.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            stride = 2 if layer < layers else 1
            parts += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(GROUPS, widths[layer]),
                nn.LeakyReLU(0.2),
            ]
        self.network = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """(batch, 3, H, W) in 0..1 -> (batch, 1, rows, columns) judgements."""
        return self.network(2.0 * pictures - 1.0)

    def judge(self, pictures: Tensor) -> Tensor:
        """As `forward`, for what is to please it: the gradient reaches the pictures and not its weights."""
        weights = {name: weight.detach() for name, weight in self.named_parameters()}
        return functional_call(self, weights, (pictures,))


def discriminator_loss(of_true: Tensor, of_made: Tensor) -> Tensor:
    """The hinge loss (Lim and Ye 2017): 0 where true patches are judged 1 or more, made ones -1 or less."""
    return 0.5 * (F.relu(1.0 - of_true).mean() + F.relu(1.0 + of_made).mean())


def adversarial_loss(of_made: Tensor) -> Tensor:
    """What the tokenizer gives for its pictures being judged true."""
    return -of_made.mean()


def adaptive_weight(error: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The weight at which the adversarial loss asks as much of the decoder as the error does.

    The ratio of the norms of their gradients with respect to `last_layer`, its last weights (Esser et al.
    2021, equation 7). A scalar from 0 to MAX_WEIGHT, without gradient.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (error, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=MAX_WEIGHT).detach()
