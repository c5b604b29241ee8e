import pytest
import torch

from delvm.tokenizer.linear_start import patch_frequencies
from delvm.tokenizer.measures import psnr
from delvm.tokenizer.training import TokenizerConfig, build


def test_it_keeps_pictures():
    torch.manual_seed(0)
    tokenizer = build(TokenizerConfig(), 32)
    corners = torch.rand(16, 3, 2, 2)
    pictures = torch.nn.functional.interpolate(corners, size=32, mode="bilinear", align_corners=True)
    pictures[:, :, 9:15, 5:11] = torch.rand(16, 3, 1, 1)
    with torch.no_grad():
        kept = tokenizer.from_latents(tokenizer.to_latents(pictures))
    assert psnr(kept, pictures).mean() > 18


@pytest.mark.parametrize(("patch", "code_dim", "size"), [(1, 64, 8), (2, 4, 16)])
def test_fewer_channels_or_pixels_than_latents(patch, code_dim, size):
    tokenizer = build(TokenizerConfig(patch=patch, channels=32, code_dim=code_dim), size)
    pictures = torch.full((1, 3, size, size), 0.5)
    with torch.no_grad():
        assert tokenizer.to_latents(pictures).shape == (1, code_dim, 8, 8)


def test_patch_frequencies():
    rows = patch_frequencies(4, 16)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[0], torch.full((48,), 48**-0.5))
