import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from delvm.tokenizer.measures import perplexity, psnr, ssim


def test_psnr():
    black = torch.zeros(2, 3, 4, 4)
    off = black.clone()
    off[1] += 0.1
    assert psnr(off, black).tolist() == pytest.approx([60.0, 20.0], abs=1e-4)


def window(values):
    """Mean in a Gaussian window of 11 x 11, over a mirrored border."""
    return gaussian_filter(values, 1.5, mode="mirror", truncate=3.5, axes=(0, 1))


def similarity(one, two):
    """SSIM of two (H, W, 3) pictures in 0..1, by the formula of Wang et al. 2004."""
    mean_one, mean_two = window(one), window(two)
    variance_one, variance_two = window(one**2) - mean_one**2, window(two**2) - mean_two**2
    covariance = window(one * two) - mean_one * mean_two
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_one * mean_two + c1) / (mean_one**2 + mean_two**2 + c1)
    return (luminance * (2 * covariance + c2) / (variance_one + variance_two + c2)).mean()


def test_ssim_is_its_formula():
    rng = np.random.default_rng(0)
    true = gaussian_filter(rng.random((3, 8, 20, 3)), (0, 1, 1, 0))
    found = np.clip(true + rng.normal(0, [[[[0.0]]], [[[0.05]]], [[[0.3]]]], true.shape), 0, 1)
    expected = [similarity(one, two) for one, two in zip(found, true, strict=True)]
    pictures = [torch.from_numpy(values).permute(0, 3, 1, 2) for values in (found, true)]
    assert ssim(*pictures).tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[0] == pytest.approx(1.0)
    assert expected[2] < 0.3 < expected[1] < 0.99
    assert ssim(pictures[0][:1], pictures[1][:1]).tolist() == pytest.approx([1.0])


def test_perplexity():
    assert perplexity(torch.tensor([5, 5, 5, 5])).item() == pytest.approx(4.0)
    assert perplexity(torch.tensor([9, 0, 0, 0])).item() == pytest.approx(1.0)
    assert perplexity(torch.tensor([2, 1, 1, 0])).item() == pytest.approx(2**1.5)
