"""Pictures and what a tokenizer keeps of them -> PSNR, SSIM; counts of codes -> perplexity."""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

MAX_PSNR = 60.0  # dB: an all but exact picture (flat black) must not outweigh the others in a mean


def psnr(reconstructed: Tensor, pictures: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture: (batch,) in dB, at most MAX_PSNR.

    Both (batch, 3, H, W) in 0..1.
    """
    error = (reconstructed - pictures).square().flatten(1).mean(dim=1)
    return -10.0 * error.clamp(min=10 ** (-MAX_PSNR / 10)).log10()


def ssim(reconstructed: Tensor, pictures: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al. 2004): (batch,), 1 for equal ones.

    The mean over channels and pixels, each in a Gaussian window (sigma 1.5, 11 x 11) over a mirrored border.
    Both (batch, 3, H, W) in 0..1, H and W at least 6.
    """
    similarity = structural_similarity_index_measure(
        reconstructed, pictures, data_range=1.0, reduction="none"
    )
    assert isinstance(similarity, Tensor)  # of one alone: no map of it was asked for
    return similarity.view(len(pictures))


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of how often the codes are used.

    counts: (num_codes,). The result is num_codes where all are used alike, 1 where only one is.
    """
    frequencies = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(frequencies).sum().exp()
