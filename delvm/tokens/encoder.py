"""Pictures -> codes, in one of two precisions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from delvm import training
from delvm.tokenizer import Tokenizer
from delvm.tokenizer.training import pass_pictures, to_pictures


@dataclass
class TokensConfig:
    """How pictures become codes."""

    precision: str = "32-true"
    """`32-true`, the reference; or `bf16-mixed`: convolutions in bfloat16 and channels last, for a GPU or a
    processor that has bfloat16; one that has not is slower by it. Some codes are then others."""
    compile: bool = False
    """Compile the encoder: a minute or so at the start."""

    def __post_init__(self) -> None:
        if self.precision not in (choices := training.CHOICES["precision"]):
            raise ValueError(f"precision: '{self.precision}' is unknown; choices: {', '.join(choices)}")


class Encoder(pl.LightningModule):
    """Pictures -> codes.

    A pass of the network has as many pictures as their size allows, whatever the batch: kernels may round
    differently for another number of them, and where two codes are nearly as close, that would show.
    """

    def __init__(self, tokenizer: Tokenizer, config: TokensConfig | None = None) -> None:
        """tokenizer: in evaluation mode; set up here as config says, its weights keep names and values."""
        super().__init__()
        config = config or TokensConfig()
        self.tokenizer = tokenizer
        self.mixed, self.one_shape = config.precision == "bf16-mixed", config.compile
        self.pass_pictures = pass_pictures(tokenizer.image_size)
        if self.mixed:
            tokenizer.to(memory_format=torch.channels_last)
        if config.compile:
            tokenizer.vqgan.encoder.compile(dynamic=False, backend=training.COMPILE_BACKEND)

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """(batch, images, H, W, 3) uint8 -> (batch, images, tokens) int64."""
        parts = pictures.flatten(0, 1).split(self.pass_pictures)
        with self._kernels():
            return torch.cat([self._encode(part) for part in parts]).view(*pictures.shape[:2], -1)

    def step(self, num_images: int) -> int:
        """Views of so many pictures that make a pass, at least one."""
        return max(1, self.pass_pictures // num_images)

    def predict_step(self, batch: tuple[int, Tensor], batch_idx: int) -> Tensor:
        """A block of `Blocks` -> its codes."""
        return self(batch[1])

    def _encode(self, pictures: Tensor) -> Tensor:
        missing = self.pass_pictures - len(pictures) if self.one_shape else 0
        codes = self.tokenizer.encode(to_pictures(F.pad(pictures, (0, 0) * 3 + (0, missing))))
        return codes[: len(pictures)]

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """One precision whatever the surroundings; on a GPU no TensorFloat-32, which is not the reference."""
        kind = self.tokenizer.codebook.device.type
        with (
            torch.autocast(kind, torch.bfloat16, enabled=self.mixed),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            yield
