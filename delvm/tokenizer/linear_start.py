"""An untrained one-level VQGAN -> a linear autoencoder of patches, to train on from."""

import math

import torch
from diffusers import VQModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

CONSTANT = 8.0  # the latents of a black patch of 4 x 4 have the length 7


@torch.no_grad()
def start_linear(vqgan: VQModel, patch: int) -> None:
    """Set a one-level VQGAN to keep about the lowest frequencies of each patch, one a latent channel.

    A random start spends its first hundreds of steps on finding about this. A value x travels as the pair
    of channels (x, -x), because silu(x) - silu(-x) = x; one more pair, (CONSTANT, -CONSTANT), keeps
    GroupNorm (one group) from scaling pictures of little contrast up. Residual blocks start as the
    identity, spare channels at random.
    """
    encoder, decoder = vqgan.encoder, vqgan.decoder
    channels, code_dim = encoder.conv_in.out_channels, decoder.conv_in.in_channels
    size = min(code_dim, channels // 2 - 1, 3 * patch**2)
    frequencies, identity = patch_frequencies(patch, size), torch.eye(size, code_dim)
    for module in vqgan.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    for convolution, rows in ((encoder.conv_in, frequencies), (decoder.conv_in, identity)):
        weight, bias = convolution.weight, convolution.bias
        weight.mul_(0.1)
        bias.zero_()
        weight[: 2 * size + 2] = 0
        weight[: 2 * size : 2, :, 1, 1] = rows
        weight[1 : 2 * size : 2, :, 1, 1] = -rows
        bias[2 * size], bias[2 * size + 1] = CONSTANT, -CONSTANT
    for convolution, columns in ((encoder.conv_out, identity.T), (decoder.conv_out, frequencies.T)):
        weight, bias = convolution.weight, convolution.bias
        weight.mul_(0.1)
        bias.zero_()
        weight[:, : 2 * size + 2] = 0
        weight[:, : 2 * size : 2, 1, 1] = columns
        weight[:, 1 : 2 * size : 2, 1, 1] = -columns
    for norm in (encoder.conv_norm_out, decoder.conv_norm_out):
        # undoes the division by the root mean square, where the latents' squares sum to about 16
        norm.weight.fill_(math.sqrt(2 * (CONSTANT**2 + 16.0) / channels))
    for mixing in (vqgan.quant_conv, vqgan.post_quant_conv):
        nn.init.dirac_(mixing.weight)
        nn.init.zeros_(mixing.bias)


def patch_frequencies(patch: int, num: int) -> Tensor:
    """The num lowest frequencies of a colour patch: (num, 3 * patch**2) orthonormal rows over (colour, y, x).

    Cosines in both directions times brightness and two differences of colour, as in JPEG.
    """
    steps = torch.arange(patch)
    cosines = F.normalize(torch.cos(math.pi / patch * steps[:, None] * (steps + 0.5)), dim=1)
    colours = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]), dim=1)
    waves = torch.einsum("ac,uy,vx->auvcyx", colours, cosines, cosines).reshape(-1, 3 * patch**2)
    # photographs vary less in colour than in brightness
    order = torch.tensor([1.0, 4.0, 6.0])[:, None, None] * (1 + steps[:, None] ** 2 + steps**2)
    return waves[order.flatten().argsort(stable=True)[:num]]
