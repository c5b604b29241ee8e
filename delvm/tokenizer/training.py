"""Pictures -> a tokenizer whose codes keep what is in them.

module = TokenizerTraining(TokenizerConfig(), image_size=32)
...                                     # a Trainer runs it for module.num_steps steps
tokenizer = module.finish()
check(measure(tokenizer, batches), config)
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import VQModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from delvm.errors import UserError
from delvm.tokenizer.vqgan import Tokenizer

MAX_PSNR = 60.0  # dB: an all but exact picture (flat black) must not outweigh the others in a mean
GROUPS = 32  # of GroupNorm, as in every published VQGAN
CONSTANT = 8.0  # in the linear start: the latents of a black patch of 4 x 4 have the length 7


@dataclass
class TokenizerConfig:
    """A tokenizer and its training.

    A picture has (image_size / factor)**2 codes, factor = patch * 2**(levels - 1).
    """

    folder: str = ""  # take this tokenizer instead of training one; all settings below are then ignored
    num_codes: int = 256
    code_dim: int = 16
    patch: int = 4  # pixels; folded into channels before the network
    channels: int = 64  # of the finest level, a multiple of 32
    channel_multipliers: list[int] = field(default_factory=lambda: [1])  # one a level, each half the side
    layers: int = 1  # residual blocks a level
    attention: bool = False  # in the middle of encoder and decoder
    steps: int = 120
    batch_size: int = 32  # pictures a step; half as many (image, annotation) pairs
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    commitment: float = 0.25  # pull of the latents towards their codes
    decay: float = 0.9  # of the codes' moving averages; closer to 1 for longer training
    restart_below: float = 2.0  # uses a batch (moving average); a code with fewer starts anew at a latent
    min_codes_used: float = 0.5  # fraction of the codes; below it the training counts as collapsed
    min_psnr: float = 18.0  # dB

    def __post_init__(self) -> None:
        if not self.channel_multipliers or any(multiplier < 1 for multiplier in self.channel_multipliers):
            raise ValueError(
                f"channel_multipliers: {self.channel_multipliers}, must be whole numbers from 1, one a level"
            )
        if self.channels < GROUPS or self.channels % GROUPS:
            raise ValueError(f"channels: {self.channels}, must be a multiple of {GROUPS}")
        for key in ("num_codes", "batch_size"):
            if getattr(self, key) < 2:
                raise ValueError(f"{key}: {getattr(self, key)}, must be at least 2")
        for key in ("code_dim", "patch", "layers", "steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}, must be at least 1")
        for key in ("warmup_steps", "commitment", "restart_below"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}: {getattr(self, key)}, must be at least 0")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: {self.learning_rate}, must be above 0")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: {self.decay}, must be at least 0 and below 1")
        if not 0 <= self.min_codes_used <= 1:
            raise ValueError(f"min_codes_used: {self.min_codes_used}, must be a fraction from 0 to 1")
        if not 0 <= self.min_psnr < MAX_PSNR:
            raise ValueError(f"min_psnr: {self.min_psnr}, must be in dB, at least 0 and below {MAX_PSNR:g}")

    @property
    def factor(self) -> int:
        """Side of the square of pixels that one code stands for."""
        return self.patch * 2 ** (len(self.channel_multipliers) - 1)


def build(config: TokenizerConfig, image_size: int) -> Tokenizer:
    """An untrained tokenizer for pictures of image_size x image_size.

    Raises ValueError if the sizes do not fit.
    With one level it starts as a linear autoencoder of patches, see start_linear; with more, at random.
    """
    levels = len(config.channel_multipliers)
    vqgan = VQModel(
        in_channels=3 * config.patch**2,
        out_channels=3 * config.patch**2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels * multiplier for multiplier in config.channel_multipliers),
        layers_per_block=config.layers,
        latent_channels=config.code_dim,
        vq_embed_dim=config.code_dim,
        num_vq_embeddings=config.num_codes,
        norm_num_groups=1 if levels == 1 else GROUPS,
        mid_block_add_attention=config.attention,
        lookup_from_codebook=True,
        sample_size=image_size // config.patch,
    )
    tokenizer = Tokenizer(vqgan, config.patch, image_size)
    if levels == 1:
        start_linear(vqgan, config.patch)
    return tokenizer


def num_parameters(config: TokenizerConfig, image_size: int) -> int:
    """Parameters, counted on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config, image_size).parameters())


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


class TokenizerTraining(pl.LightningModule):
    """Trains a tokenizer: squared error of its pixels, plus a pull of the latents towards their codes.

    The codes are moving averages of the latents they stand for (van den Oord 2017, appendix A.1), start at
    the k-means of the first batch, and start anew at a latent of the batch when they fall out of use; so
    there is no codebook loss. They live in a quantizer of vector_quantize_pytorch until finish() copies them
    into the tokenizer.

    A batch: uint8 (batch, 2, H, W, 3), (image, annotation) pairs, or (batch, H, W, 3), pictures.
    Everything a resumed run needs is in the state dict: the draws of k-means and of codes that start anew
    depend on a stored seed and the step alone. A step returns loss, psnr (dB) and codebook_perplexity.
    """

    seed: Tensor
    steps_done: Tensor

    def __init__(self, config: TokenizerConfig, image_size: int) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = build(config, image_size)
        self.tokenizer.codebook.requires_grad_(False)  # finish() sets it
        self.quantizer = VectorQuantize(
            dim=config.code_dim,
            codebook_size=config.num_codes,
            decay=config.decay,
            kmeans_init=True,
            threshold_ema_dead_code=config.restart_below,
            commitment_weight=config.commitment,
            rotation_trick=False,
            accept_image_fmap=True,
        )
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))

    @property
    def num_steps(self) -> int:
        return self.config.steps

    def training_step(self, batch: Tensor, batch_index: int = 0) -> dict[str, Tensor]:
        pictures = to_pictures(batch)
        latents = self.tokenizer.to_latents(pictures)
        with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
            torch.manual_seed(int(self.seed) + int(self.steps_done))
            codes, ids, commitment = self.quantizer(latents)
        reconstructed = self.tokenizer.from_latents(codes).float()
        # 4: squared error in the -1..1 of the network, the scale of its latents, which the commitment goes by
        loss = 4.0 * F.mse_loss(reconstructed, pictures) + commitment
        counts = torch.bincount(ids.flatten(), minlength=self.config.num_codes)
        self.steps_done += 1
        return {
            "loss": loss,
            "psnr": psnr(reconstructed.detach(), pictures).mean(),
            "codebook_perplexity": perplexity(counts),
        }

    def configure_optimizers(self) -> Any:
        """AdamW; a short warm-up, then a cosine to a hundredth of the rate over config.steps."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int) -> float:
        warmup = min(self.config.warmup_steps, self.config.steps // 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.config.steps - warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    @torch.no_grad()
    def finish(self) -> Tokenizer:
        """The trained tokenizer, in evaluation mode, with the quantizer's codes as its codebook.

        Raises UserError if the training diverged.
        """
        finite = all(bool(value.isfinite().all()) for value in self.state_dict().values())
        if not finite:
            raise UserError(
                f"tokenizer.learning_rate: training diverged at {self.config.learning_rate:g}: "
                "weights or codes are not finite; try a third of it"
            )
        self.tokenizer.codebook.copy_(self.quantizer.codebook)
        return self.tokenizer.eval()


def to_pictures(batch: Tensor) -> Tensor:
    """uint8 (batch, 2, H, W, 3) pairs or (batch, H, W, 3) pictures -> (pictures, 3, H, W) float32 in 0..1."""
    if batch.dtype != torch.uint8 or batch.ndim not in (4, 5) or batch.shape[-1] != 3:
        raise ValueError(
            f"pictures: {batch.dtype} {tuple(batch.shape)}, must be torch.uint8 (batch, H, W, 3) "
            "or (batch, 2, H, W, 3)"
        )
    return batch.flatten(0, -4).permute(0, 3, 1, 2).float().div_(255.0)


def psnr(reconstructed: Tensor, pictures: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture: (batch,) in dB, at most MAX_PSNR.

    Both (batch, 3, H, W) in 0..1.
    """
    error = (reconstructed - pictures).square().flatten(1).mean(dim=1)
    return -10.0 * error.clamp(min=10 ** (-MAX_PSNR / 10)).log10()


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of how often the codes are used.

    counts: (num_codes,). The result is num_codes where all are used alike, 1 where only one is.
    """
    frequencies = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(frequencies).sum().exp()


@torch.no_grad()
def measure(tokenizer: Tokenizer, pictures: Iterable[Tensor]) -> dict[str, float]:
    """What the codes keep of pictures, given in batches like those of the training.

    Returns psnr (dB, mean over pictures, each at most 60), codes_used (distinct codes), codebook_perplexity.
    Raises ValueError if there is no picture.
    """
    ratios: list[Tensor] = []
    counts = torch.zeros(tokenizer.num_codes, dtype=torch.int64)
    for batch in pictures:
        images = to_pictures(batch.to(tokenizer.codebook.device))
        ids = tokenizer.encode(images)
        ratios.append(psnr(tokenizer.decode(ids), images).cpu())
        counts += torch.bincount(ids.flatten().cpu(), minlength=tokenizer.num_codes)
    if not ratios:
        raise ValueError("pictures: none, the tokenizer is measured on at least one batch")
    return {
        "psnr": float(torch.cat(ratios).mean()),
        "codes_used": int((counts > 0).sum()),
        "codebook_perplexity": float(perplexity(counts)),
    }


def check(metrics: dict[str, float], config: TokenizerConfig) -> None:
    """Raise UserError if the tokenizer of these metrics (see measure) collapsed or blurs beyond use."""
    used, needed = metrics["codes_used"], config.min_codes_used * config.num_codes
    if used < needed:
        raise UserError(
            f"the tokenizer collapsed: {used:g} of {config.num_codes} codes in use, min_codes_used "
            f"{config.min_codes_used:g} asks for {math.ceil(needed)}; more steps, a higher restart_below, "
            "a lower learning_rate or fewer num_codes help"
        )
    # "not >=" also catches NaN
    if not metrics["psnr"] >= config.min_psnr:
        raise UserError(
            f"the tokenizer blurs: PSNR {metrics['psnr']:.1f} dB, min_psnr asks for {config.min_psnr:g} dB; "
            "more steps, more channels, a smaller patch or more num_codes help"
        )
