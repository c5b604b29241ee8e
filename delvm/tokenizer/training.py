"""Pictures -> a tokenizer whose codes keep what is in them.

module = TokenizerTraining(TokenizerConfig(), image_size=32)
...                                     # a Trainer runs it for module.num_steps steps
tokenizer = module.finish()
check(measure(tokenizer, batches), config)
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from diffusers import VQModel
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from delvm.errors import UserError
from delvm.tokenizer.adversarial import (
    AdversarialConfig,
    Discriminator,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
)
from delvm.tokenizer.linear_start import start_linear
from delvm.tokenizer.measures import MAX_PSNR, perplexity, psnr, ssim
from delvm.tokenizer.perceptual import MIN_SIDE, Perceptual
from delvm.tokenizer.quantizers import QUANTIZERS, build_quantizer
from delvm.tokenizer.vqgan import Tokenizer

GROUPS = 32  # of GroupNorm, as in every published VQGAN
SHOWN = 8  # pictures in TensorBoard
PASS_PICTURES, PASS_PIXELS = 128, 1 << 20  # at most, in one pass of the network


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
    absolute: float = 0.0  # weight of the absolute error of the pixels, beside the squared one
    perceptual: float = 0.0  # weight of the perceptual distance LPIPS
    perceptual_weights: str = ""  # file of torchvision's VGG16 for it, vgg16-397923af.pth; never downloaded
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    quantizer: str = "ema"  # from delvm.tokenizer.quantizers.QUANTIZERS
    commitment: float = 0.25  # pull of the latents towards their codes
    decay: float = 0.9  # of the codes' moving averages; closer to 1 for longer training
    restart_below: float = 2.0  # uses a batch (moving average); a code with fewer starts anew at a latent
    # fraction of the codes, or of those that so many held-out tokens could show; below it the training counts
    # as collapsed. Lowered, or min_psnr, the same command goes on with the tokenizer that is there
    min_codes_used: float = 0.5
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
        for key in ("warmup_steps", "absolute", "perceptual", "commitment", "restart_below"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}: {getattr(self, key)}, must be at least 0")
        if self.perceptual and not self.perceptual_weights:
            raise ValueError("perceptual_weights: missing, must be torchvision's file vgg16-397923af.pth")
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer: '{self.quantizer}' is unknown; choices: {', '.join(QUANTIZERS)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: {self.learning_rate}, must be above 0")
        if self.quantizer.startswith("cosine") and not self.restart_below:
            # a code that nothing began with is 0, and near every small latent
            raise ValueError(f"restart_below: 0 with quantizer '{self.quantizer}', must be above 0")
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

    With one level it starts as a linear autoencoder of patches, see start_linear; with more, at random.

    Raises ValueError if the sizes do not fit, UserError for pictures too small for one of the losses.
    """
    adversarial = config.adversarial
    if adversarial.weight and image_size < adversarial.min_side:
        raise UserError(
            f"tokenizer.adversarial.layers: {adversarial.layers} need pictures of {adversarial.min_side} px, "
            f"data.image_size is {image_size}"
        )
    if config.perceptual and image_size < MIN_SIDE:
        raise UserError(
            f"tokenizer.perceptual: needs pictures of {MIN_SIDE} px, data.image_size is {image_size}"
        )
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


class TokenizerTraining(pl.LightningModule):
    """Trains a tokenizer: the error of its pictures, plus a pull of the latents towards their codes.

    The error is the squared one of the pixels, and where the config gives them weight their absolute error
    and the perceptual distance. The codes start at the k-means of the first batch, and start anew at a latent
    of the batch when they fall out of use. They live in a quantizer (see QUANTIZERS) until finish() copies
    them into the tokenizer.

    With `config.adversarial.weight` a discriminator learns to tell the pictures from true ones, and the
    tokenizer to deceive it (Esser et al. 2021). Both learn in one step, from the same pictures, each from a
    loss whose gradient does not reach the other. One optimizer does what one for each would do: AdamW steps
    every weight by itself.

    A batch: uint8 (batch, 2, H, W, 3), (image, annotation) pairs, or (batch, H, W, 3), pictures.
    Everything a resumed run needs is in the state dict: the draws of k-means and of codes that start anew
    depend on a stored seed and the step alone. A step returns loss (of both networks), psnr (dB), and of its
    codes codes_used (distinct ones) and codebook_perplexity; with a discriminator also the two losses,
    adversarial (before its weight) and discriminator, 0 before it starts.
    """

    seed: Tensor
    steps_done: Tensor

    def __init__(self, config: TokenizerConfig, image_size: int) -> None:
        """Raises UserError for sizes that do not fit and for perceptual weights that cannot be read."""
        super().__init__()
        self.config = config
        self.tokenizer = build(config, image_size)
        self.tokenizer.codebook.requires_grad_(False)  # finish() sets it
        self.quantizer = build_quantizer(
            config.quantizer,
            num_codes=config.num_codes,
            code_dim=config.code_dim,
            commitment=config.commitment,
            decay=config.decay,
            restart_below=config.restart_below,
        )
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        judge = config.adversarial
        self.discriminator = Discriminator(judge.channels, judge.layers) if judge.weight else None
        self.perceptual = (
            Perceptual(Path(config.perceptual_weights).expanduser()) if config.perceptual else None
        )
        self.gradient_norm: Tensor | None = None
        self._seen: Tensor | None = None

    @property
    def num_steps(self) -> int:
        return self.config.steps

    def training_step(self, batch: Tensor, batch_index: int = 0) -> dict[str, Tensor]:
        pictures = to_pictures(batch)
        latents = self.tokenizer.to_latents(pictures)
        with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
            torch.manual_seed(int(self.seed) + int(self.steps_done))
            codes, ids, commitment = self._quantized(latents)
        reconstructed = self.tokenizer.from_latents(codes).float()
        error = self._error(reconstructed, pictures)
        loss = error + commitment
        judged: dict[str, Tensor] = {}
        if self.discriminator is not None:
            contest, judged = self._contest(self.discriminator, reconstructed, pictures, error)
            loss = loss + contest
        counts = torch.bincount(ids.flatten(), minlength=self.config.num_codes)
        self.steps_done += 1
        self._seen = pictures[:SHOWN]
        return {
            "loss": loss,
            "psnr": psnr(reconstructed.detach(), pictures).mean(),
            "codes_used": (counts > 0).sum().float(),
            "codebook_perplexity": perplexity(counts),
            **judged,
        }

    def _error(self, reconstructed: Tensor, pictures: Tensor) -> Tensor:
        # 4 and 2: errors in the -1..1 of the network, the scale of its latents, which the commitment goes by
        error = 4.0 * F.mse_loss(reconstructed, pictures)
        if self.config.absolute:
            error = error + self.config.absolute * 2.0 * F.l1_loss(reconstructed, pictures)
        if self.perceptual is not None:
            error = error + self.config.perceptual * self.perceptual(reconstructed, pictures).mean()
        return error

    def _contest(
        self, discriminator: Discriminator, reconstructed: Tensor, pictures: Tensor, error: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What tokenizer and discriminator lose against each other, as one loss and by name."""
        config = self.config.adversarial
        if int(self.steps_done) < config.start:
            # several processes wait for the gradient of every weight
            nothing = 0.0 * torch.stack([weight.sum() for weight in discriminator.parameters()]).sum()
            return nothing, {"adversarial": nothing, "discriminator": nothing}
        adversarial = adversarial_loss(discriminator.judge(reconstructed))
        last_layer = self.tokenizer.vqgan.decoder.conv_out.weight
        weight = config.weight * adaptive_weight(error, adversarial, last_layer)
        own = discriminator_loss(discriminator(pictures), discriminator(reconstructed.detach()))
        return weight * adversarial + own, {"adversarial": adversarial, "discriminator": own}

    def _quantized(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, ids and commitment, in float32: rounded latents would choose, and move, other codes."""
        with torch.autocast(latents.device.type, enabled=False):
            codes, ids, commitment = self.quantizer(latents.float())
        return codes, ids, commitment

    @torch.no_grad()
    def diagnose(self) -> dict[str, float] | None:
        """SSIM of the last step's first pictures; they go to TensorBoard, over what their codes keep."""
        if self._seen is None:
            return None
        self.quantizer.eval()  # or it would learn from them
        codes = self._quantized(self.tokenizer.to_latents(self._seen))[0]
        self.quantizer.train()
        kept = self.tokenizer.from_latents(codes).clamp(0.0, 1.0)
        if isinstance(self.logger, TensorBoardLogger):
            sheet = torch.cat([self._seen, kept], dim=2).permute(1, 2, 0, 3).flatten(2)
            self.logger.experiment.add_image("reconstructions", sheet, self.global_step)
        return {"ssim": float(ssim(kept, self._seen).mean())}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # each network by its own norm, or the one with the larger gradient would slow down the other
        if gradient_clip_val:
            norms = [
                torch.nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)
                for group in optimizer.param_groups
            ]
            self.gradient_norm = norms[0]

    def configure_optimizers(self) -> Any:
        """AdamW; a short warm-up, then a cosine to a hundredth of the rate over config.steps."""
        config, discriminator = self.config, self.discriminator
        theirs = set(discriminator.parameters()) if discriminator is not None else set()
        own = [weight for weight in self.parameters() if weight.requires_grad and weight not in theirs]
        groups: list[dict[str, Any]] = [{"params": own}]
        if discriminator is not None:
            groups.append(
                {"params": list(discriminator.parameters()), "lr": config.adversarial.learning_rate}
            )
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
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


def pass_pictures(image_size: int) -> int:
    """How many pictures of image_size x image_size go through the network at once."""
    return min(PASS_PICTURES, max(1, PASS_PIXELS // image_size**2))


@torch.no_grad()
def measure(tokenizer: Tokenizer, pictures: Iterable[Tensor]) -> dict[str, float]:
    """What the codes keep of pictures, given in batches like those of the training.

    A pass of the network has as many pictures as their size allows, see `pass_pictures`.

    Returns psnr (dB, each at most 60) and ssim, means over pictures; codes_used (distinct codes) and
    codebook_perplexity, over all of their `tokens`.
    Raises ValueError if there is no picture.
    """
    size = pass_pictures(tokenizer.image_size)
    ratios: list[Tensor] = []
    similarities: list[Tensor] = []
    counts = torch.zeros(tokenizer.num_codes, dtype=torch.int64)
    for part in (part for batch in pictures for part in batch.flatten(0, -4).split(size)):
        images = to_pictures(part.to(tokenizer.codebook.device))
        ids = tokenizer.encode(images)
        kept = tokenizer.decode(ids)
        ratios.append(psnr(kept, images).cpu())
        similarities.append(ssim(kept, images).cpu())
        counts += torch.bincount(ids.flatten().cpu(), minlength=tokenizer.num_codes)
    if not ratios:
        raise ValueError("pictures: none, the tokenizer is measured on at least one batch")
    return {
        "psnr": float(torch.cat(ratios).mean()),
        "ssim": float(torch.cat(similarities).mean()),
        "codes_used": int((counts > 0).sum()),
        "codebook_perplexity": float(perplexity(counts)),
        "tokens": int(counts.sum()),
    }


def check(metrics: dict[str, float], config: TokenizerConfig) -> None:
    """Raise UserError if the tokenizer of these metrics (see measure) collapsed or blurs beyond use."""
    tokens = metrics.get("tokens", math.inf)  # older runs do not say how many
    # of so many tokens, had all codes the same share: a few pictures cannot show thousands of codes
    shown = config.num_codes * (1 - (1 - 1 / config.num_codes) ** tokens)
    used, needed = metrics["codes_used"], config.min_codes_used * shown
    if used < needed:
        by = f" by {tokens:,} tokens" if "tokens" in metrics else ""
        raise UserError(
            f"the tokenizer collapsed: {used:g} of {config.num_codes} codes in use{by}, min_codes_used "
            f"{config.min_codes_used:g} asks for {math.ceil(needed)}; more steps, a higher restart_below, "
            "a lower learning_rate or fewer num_codes help; a lower min_codes_used takes it as it is"
        )
    # "not >=" also catches NaN
    if not metrics["psnr"] >= config.min_psnr:
        raise UserError(
            f"the tokenizer blurs: PSNR {metrics['psnr']:.1f} dB, min_psnr asks for {config.min_psnr:g} dB; "
            "more steps, more channels, a smaller patch or more num_codes help; "
            "a lower min_psnr takes it as it is"
        )
