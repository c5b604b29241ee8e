"""Pictures and what a tokenizer keeps of them -> how different the two look: LPIPS."""

from pathlib import Path

import torch
import torchmetrics
from torch import Tensor
from torch.nn import functional as F

from delvm.errors import UserError

HEADS = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
"""The published weights of the channels, which come with torchmetrics."""
LAYERS = (3, 8, 15, 22, 29)  # of VGG16: the last ReLU before each pooling
MIN_SIDE = 16  # pixels: the fifth layer has a sixteenth of them
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of what the network has learnt from, in 0..1


class Perceptual:
    """The perceptual distance LPIPS (Zhang et al. 2018), with VGG16, as a loss.

    No nn.Module: what holds it has the frozen network in no optimizer and no checkpoint.
    """

    def __init__(self, file: Path) -> None:
        """file: torchvision's weights of VGG16, `vgg16-397923af.pth`.

        Raises UserError if it cannot be read or holds something else.
        """
        from torchvision.models import vgg16  # type: ignore[import-untyped]

        with torch.device("meta"):
            network = vgg16(weights=None).features[: LAYERS[-1] + 1]
        prefix, expected = "features.", network.state_dict()
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
            weights = {key: found[prefix + key] for key in expected}
            network.load_state_dict(weights, assign=True)
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise UserError(
                f"tokenizer.perceptual_weights: '{file}' is not torchvision's VGG16, vgg16-397923af.pth "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
        self.network = network.requires_grad_(False).eval()
        heads = torch.load(HEADS, map_location="cpu", weights_only=True)
        self.heads = [heads[f"lin{place}.model.1.weight"] for place in range(len(LAYERS))]

    def __call__(self, reconstructed: Tensor, pictures: Tensor) -> Tensor:
        """The distance of each picture: (batch,), 0 for equal ones; differentiable.

        Both (batch, 3, H, W) in 0..1, H and W at least MIN_SIDE.
        """
        self.network.to(pictures.device)
        with torch.no_grad():
            seen = self._features(pictures)
        distance = torch.zeros(len(pictures), device=pictures.device)
        for found, true, head in zip(self._features(reconstructed), seen, self.heads, strict=True):
            weighed = F.conv2d((found - true).square(), head.to(pictures.device))
            distance = distance + weighed.mean(dim=(1, 2, 3))
        return distance

    def _features(self, pictures: Tensor) -> list[Tensor]:
        """What the network has at LAYERS, every place of it brought to length 1."""
        mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        values, found = (pictures - mean) / std, []
        for place, layer in enumerate(self.network):
            values = layer(values)
            if place in LAYERS:
                # not F.normalize: its gradient at a place where all is 0 has no bound
                found.append(values / (values.square().sum(dim=1, keepdim=True) + 1e-8).sqrt())
        return found
