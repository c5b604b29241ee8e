"""Pictures -> grids of codes, and back: the tokenizer users hold, over diffusers.VQModel.

tokenizer = delvm.tokenizer.load("run/tokenizer")
codes = tokenizer.encode(images)        # (batch, 3, H, W) in 0..1 -> (batch, tokens) int64
pictures = tokenizer.decode(codes)      # back to (batch, 3, H, W) in 0..1
"""

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from delvm.errors import UserError

MODEL_CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WRAPPER_CONFIG = "delvm_tokenizer.json"
HASHED = {
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "act_fn", "latent_channels", "sample_size", "num_vq_embeddings", "norm_num_groups",
    "vq_embed_dim", "scaling_factor", "norm_type", "mid_block_add_attention", "lookup_from_codebook",
    "force_upcast",
}  # fmt: skip
"""Settings of VQModel that the hash always covers; one that diffusers adds later only where it is set."""


class Tokenizer(nn.Module):
    """A VQGAN whose codes are read in raster order: the image's rows from the top, each from the left.

    With patch > 1 every patch x patch square of pixels becomes one pixel of 3 * patch**2 channels before the
    network (pixel-unshuffle) and is spread out again behind it: several times cheaper than a stem of strided
    convolutions.
    """

    def __init__(
        self,
        vqgan: VQModel,
        patch: int,
        image_size: int,
        pixel_range: Sequence[float] = (-1.0, 1.0),
        unit_codes: bool = False,
    ) -> None:
        """vqgan: in_channels = out_channels = 3 * patch**2; image_size: side in pixels, a multiple of the
        downsampling factor, patch * 2**(levels - 1); pixel_range: what the network reads for 0..1;
        unit_codes: the codes have length 1, and latents are brought to it before the nearest is looked for.

        Raises ValueError where these do not fit together.
        """
        super().__init__()
        config = vqgan.config
        if isinstance(patch, bool) or not isinstance(patch, int) or patch < 1:
            raise ValueError(f"patch: {patch!r}, must be a whole number of pixels, at least 1")
        for key in ("in_channels", "out_channels"):
            if config[key] != 3 * patch**2:
                raise ValueError(f"{key}: {config[key]}, patch {patch} needs 3 * {patch}**2 = {3 * patch**2}")
        factor = patch * 2 ** (len(config["block_out_channels"]) - 1)
        if (
            isinstance(image_size, bool)
            or not isinstance(image_size, int)
            or image_size < 1
            or image_size % factor
        ):
            raise ValueError(f"image_size: {image_size!r}, must be a positive multiple of {factor} pixels")
        if len(pixel_range) != 2 or not pixel_range[0] < pixel_range[1]:
            raise ValueError(f"pixel_range: {pixel_range!r}, must be two numbers, the lower first")
        if not isinstance(unit_codes, bool):
            raise ValueError(f"unit_codes: {unit_codes!r}, must be true or false")
        # decode() hands over ids, which diffusers looks up only with this set
        vqgan.register_to_config(lookup_from_codebook=True)
        self.vqgan = vqgan
        self.patch = patch
        self.factor = factor
        self.image_size = image_size
        self.pixel_range = (float(pixel_range[0]), float(pixel_range[1]))
        self.unit_codes = unit_codes

    @property
    def num_codes(self) -> int:
        return int(self.vqgan.config["num_vq_embeddings"])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of one picture of image_size x image_size."""
        return self.image_size // self.factor, self.image_size // self.factor

    @property
    def num_tokens(self) -> int:
        """Codes of one picture of image_size x image_size."""
        return self.grid[0] * self.grid[1]

    @property
    def codebook(self) -> Tensor:
        """(num_codes, code_dim) float: the vectors the codes stand for."""
        return self.vqgan.quantize.embedding.weight

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that change with any weight or setting; the same on every device.

        Reads all weights, so keep the result where it is needed often.
        """
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for name, tensor in sorted(self.vqgan.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _settings(self) -> dict[str, Any]:
        known = inspect.signature(type(self.vqgan).__init__).parameters
        vqgan = {
            key: value
            for key, value in self.vqgan.config.items()
            # keys that begin with _ are diffusers' own: its version, where the model was loaded from
            if not key.startswith("_")
            # a setting that a release adds makes no other tokenizer of those that were there before
            and (key in HASHED or key not in known or _json(value) != _json(known[key].default))
        }
        return {"vqgan": vqgan, **self._wrapper_settings()}

    def _wrapper_settings(self) -> dict[str, Any]:
        settings = {
            "patch": self.patch,
            "image_size": self.image_size,
            "pixel_range": list(self.pixel_range),
        }
        # left out where it is not set: the hash of a tokenizer without it is older than the setting
        return {**settings, "unit_codes": True} if self.unit_codes else settings

    def to_latents(self, images: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(batch, 3, H, W) float in 0..1 -> (batch, code_dim, rows, columns) float, not yet codes.

        Differentiable. Raises ValueError for another shape, size, type or range. grid: see encode.
        """
        self._check_images(images, self._check_grid(grid))
        low, high = self.pixel_range
        pixels = (images * (high - low) + low).to(self.codebook.dtype)
        latents = self.vqgan.encode(F.pixel_unshuffle(pixels, self.patch)).latents
        return F.normalize(latents, dim=1) if self.unit_codes else latents

    def from_latents(self, latents: Tensor) -> Tensor:
        """(batch, code_dim, rows, columns) vectors of codes -> (batch, 3, H, W) float about 0..1.

        Differentiable, so not clamped.
        """
        decoded = self.vqgan.decoder(self.vqgan.post_quant_conv(latents))
        return self._to_unit(decoded)

    def _to_unit(self, decoded: Tensor) -> Tensor:
        low, high = self.pixel_range
        return (F.pixel_shuffle(decoded, self.patch) - low) / (high - low)

    @torch.no_grad()
    def encode(self, images: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(batch, 3, H, W) float in 0..1 -> (batch, tokens) int64 in 0..num_codes-1.

        Each place gets the nearest code (L2). grid: rows and columns of codes of pictures of another size
        than image_size, (H / factor, W / factor); the network is convolutional and takes any.
        Raises ValueError for another shape, size, type or range.
        """
        rows, columns = self._check_grid(grid)
        # under autocast the latents are bfloat16, in which many codes are as near as one another
        latents = self.to_latents(images, grid).to(self.codebook.dtype)
        return self.vqgan.quantize(latents)[2][2].view(len(images), rows * columns)

    @torch.no_grad()
    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(batch, tokens) int64 in 0..num_codes-1 -> (batch, 3, H, W) float in 0..1.

        grid: as it was given to encode. Raises ValueError for another shape, another type or an id that is
        no image code.
        """
        rows, columns = self._check_grid(grid)
        if ids.ndim != 2 or ids.shape[1] != rows * columns:
            raise ValueError(f"ids: shape {tuple(ids.shape)}, must be (batch, {rows * columns})")
        if ids.dtype != torch.int64:
            raise ValueError(f"ids: {ids.dtype}, must be torch.int64")
        if ids.numel() and (ids.min() < 0 or ids.max() >= self.num_codes):
            raise ValueError(
                f"ids: from {int(ids.min())} to {int(ids.max())}, image codes are 0..{self.num_codes - 1} "
                "(special tokens are no pictures)"
            )
        shape = (len(ids), rows, columns, self.codebook.shape[1])
        decoded = self.vqgan.decode(ids, force_not_quantize=True, shape=shape).sample
        return self._to_unit(decoded).float().clamp(0.0, 1.0)

    def forward(self, images: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Pictures as the codes keep them: decode(encode(images))."""
        return self.decode(self.encode(images, grid), grid)

    def _check_grid(self, grid: tuple[int, int] | None) -> tuple[int, int]:
        if grid is None:
            return self.grid
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid: {grid!r}, must be rows and columns of codes, at least 1 each")
        return grid

    def _check_images(self, images: Tensor, grid: tuple[int, int]) -> None:
        expected = (3, grid[0] * self.factor, grid[1] * self.factor)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images: shape {tuple(images.shape)}, must be (batch, {', '.join(map(str, expected))})"
            )
        if not images.is_floating_point():
            raise ValueError(f"images: {images.dtype}, must be floating-point in 0..1 (divide uint8 by 255)")
        # a little beyond the range is what resampling leaves; far beyond it the 0..255 were not divided
        if images.numel() and not (images.amin() >= -0.1 and images.amax() <= 1.1):
            raise ValueError(f"images: from {images.amin():.4g} to {images.amax():.4g}, must lie in 0..1")

    def save(self, folder: str | Path) -> None:
        """Write a folder that diffusers.VQModel.from_pretrained loads too, plus delvm_tokenizer.json.

        Writes straight into the folder: for an all-or-nothing result hand over a new one and rename it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.vqgan.save_pretrained(folder, safe_serialization=True)
        (folder / WRAPPER_CONFIG).write_text(
            json.dumps(self._wrapper_settings(), indent=2) + "\n", encoding="utf-8"
        )

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """The tokenizer that save() wrote, in evaluation mode, on the CPU; published.load takes others too.

        Reads safetensors and JSON, no pickle. Raises UserError for a missing folder or file and for a file
        that cannot be read.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; a tokenizer is a folder with {', '.join(_FILES)}")
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: no {', '.join(missing)}; a tokenizer folder has {', '.join(_FILES)}")
        wrapper = read_json(folder / WRAPPER_CONFIG)
        try:
            vqgan = VQModel.from_config(read_json(folder / MODEL_CONFIG))
            tokenizer = Tokenizer(
                vqgan,
                wrapper["patch"],
                wrapper["image_size"],
                wrapper["pixel_range"],
                wrapper.get("unit_codes", False),
            )
        except KeyError as error:
            raise UserError(f"{folder / WRAPPER_CONFIG}: no key {error}") from error
        except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{folder}: the settings describe no tokenizer: {one_line(error)}") from error
        try:
            # from_pretrained would start missing tensors at random with only a warning
            vqgan.load_state_dict(load_file(folder / WEIGHTS), strict=True)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise UserError(
                f"{folder / WEIGHTS}: damaged, or not the weights of {MODEL_CONFIG}: {one_line(error)}"
            ) from error
        return tokenizer.eval()


_FILES = (MODEL_CONFIG, WEIGHTS, WRAPPER_CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    """A file of settings. Raises UserError if it cannot be read or is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object of settings")
    return content


def _json(value: Any) -> str:
    return json.dumps(value, default=str)  # as it is after being saved: a tuple is a list


def one_line(error: Exception, limit: int = 200) -> str:
    """What an error says, on one line of at most `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."
