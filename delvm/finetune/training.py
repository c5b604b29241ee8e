"""A model and pictures of classes -> a classifier, by cross-entropy over all its weights."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torch.optim import Optimizer

from delvm.finetune.classifier import INPUTS, MASKS, READOUTS, Classifier, Read
from delvm.finetune.views import ViewsConfig
from delvm.pretrain import OptimizerConfig, learning_rate_factor

STARTS = ("pretrained", "random")
RANDOM = "random"


@dataclass
class FinetuneConfig(OptimizerConfig):
    """Which models become classifiers, of which pictures, and how."""

    train: str = ""
    """Folder with one folder of pictures a class, as ImageNet's."""
    validation: str = ""
    """The same for the pictures that are scored; their labels serve for nothing else."""
    samples: int = 0
    """The first training pictures, of every class as even as they go; 0: all."""
    validation_samples: int = 0
    roles: list[str] = field(default_factory=list)
    """Which of the run's own models; empty: the last, its student or else its teacher."""
    models: dict[str, str] = field(default_factory=dict)
    """Further models by name: folders that `delvm.llama.load` takes, or that a fine-tuning has left; such a
    classifier goes on as what it is, with all its weights, perhaps at another image_size."""
    starts: list[str] = field(default_factory=lambda: list(STARTS))
    """`pretrained`: from the weights of each model; `random`: the last model's architecture with fresh
    weights, the control, `random` in the table."""

    input: str = "tokens"
    """`tokens`: codes of the tokenizer, which stays as it is and encodes every view in passing; `patches`:
    pixels through a new patch embedding, without a tokenizer."""
    image_size: int = 224
    """patches: side of a picture in pixels. Codes are of pictures of their tokenizer's size. A classifier
    that goes on may have learnt from pictures of another size, in patches as large as here."""
    patch_size: int = 16
    """patches: side of a patch in pixels."""
    mask: str = "causal"
    """`causal` attention, as the model was trained with, or `bidirectional`."""
    anneal: float = 0.0
    """causal: share of the steps in which what stands later fades from view, the soft mask of iLLaMA (Wang
    et al. 2024, arXiv 2404.06773); 0: causal from the first step."""
    readout: str = "class"
    """`class`: a learned place behind the picture; `last`: its last place; `mean`: the mean of its places."""

    epochs: int = 30
    batch_size: int = 128
    """Pictures a step, over all processes."""
    learning_rate: float = 1e-3
    """Highest learning rate, of the head; deeper layers have less, see `layer_decay`."""
    random_learning_rate: float = 0.0
    """The same of the random start; 0: as learning_rate."""
    layer_decay: float = 0.75
    """The learning rate of each layer is so many times that of the layer above (Bao et al. 2021, BEiT); 1:
    all alike, as a random start always has it."""
    final: float = 0.01
    weight_decay: float = 0.05
    beta2: float = 0.999
    drop_path: float = 0.0
    """Chance that a branch of the last layer is left out of a picture's way, less below in proportion:
    stochastic depth (Huang et al. 2016)."""
    averaging: float = 0.0
    """Decay of the weights' moving average, which is then what is scored and saved, such as 0.999; 0 takes
    none. It stands for `trainer.averaging` here."""
    views: ViewsConfig = field(default_factory=ViewsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("train", "validation"):
            if not getattr(self, key):
                raise ValueError(f"{key}: missing, give a folder with one folder of pictures a class")
        if self.train == self.validation:
            raise ValueError(f"validation: '{self.validation}' is train; it must hold other pictures")
        for key, choices in (("input", INPUTS), ("mask", MASKS), ("readout", READOUTS)):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: '{getattr(self, key)}' is unknown; choices: {', '.join(choices)}")
        for start in self.starts:
            if start not in STARTS:
                raise ValueError(f"starts: '{start}' is unknown; choices: {', '.join(STARTS)}")
        if not self.starts or len(set(self.starts)) < len(self.starts):
            raise ValueError(f"starts: {self.starts} must be one or both of {', '.join(STARTS)}")
        for key, least in (("samples", 0), ("validation_samples", 0), ("epochs", 1), ("batch_size", 1),
                           ("image_size", 1), ("patch_size", 1)):  # fmt: skip
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least {least}")
        if self.input == "patches" and self.image_size % self.patch_size:
            raise ValueError(
                f"image_size: {self.image_size} must be a multiple of patch_size, {self.patch_size}"
            )
        for key in ("anneal", "layer_decay"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)} must lie in 0..1")
        if self.anneal and self.mask == "bidirectional":
            raise ValueError(f"anneal: {self.anneal} fades into the causal mask, but mask is bidirectional")
        if not self.layer_decay:
            raise ValueError("layer_decay: 0.0 must be above 0")
        for key in ("drop_path", "averaging"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must lie in 0..1, 1 excluded")
        if not 0 <= self.random_learning_rate < float("inf"):
            raise ValueError(
                f"random_learning_rate: {self.random_learning_rate} must be at least 0 and finite"
            )
        for name in self.models:
            if name == RANDOM or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(
                    f"models.{name}: a name may hold letters, digits, '_' and '-', and not be {RANDOM}"
                )

    def steps(self, num_pictures: int) -> int:
        """Optimizer steps of the whole training; the last may begin another epoch."""
        return -(-self.epochs * num_pictures // self.batch_size)


class Finetune(pl.LightningModule):
    """Cross-entropy between class logits and targets, all weights trained.

    Batches: what `Views.collate` makes, `pictures` in passing become what the classifier reads.
    """

    def __init__(
        self,
        classifier: Classifier,
        read: Read,
        config: FinetuneConfig,
        steps: int,
        *,
        start: str = "pretrained",
    ) -> None:
        """read: kept out of the module's weights. start: of STARTS, for the learning rates."""
        super().__init__()
        self.classifier, self.config, self.steps, self.start = classifier, config, steps, start
        self.read = read
        self.loss = SoftTargetCrossEntropy()
        self.gradient_norm: Tensor | None = None
        """Of the last step, before clipping."""

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        return {**batch, "inputs": self.read(batch["pictures"])}

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        # they stay until the next step: recomputed activations ask for them in the backward pass
        self.classifier.scales = branch_scales(batch["draws"], self.config.drop_path)
        logits = self.classifier(batch["inputs"], future=self.future(self.global_step)).float()
        right = (logits.argmax(-1) == batch["labels"]).float().mean()
        return {"loss": self.loss(logits, batch["targets"]), "accuracy": right.detach()}

    def future(self, step: int) -> float:
        """Weight of later places at a step of 0..steps-1: from 1 to 0 over `anneal` of them, linearly."""
        fading = self.config.anneal * self.steps
        return max(0.0, 1 - step / fading) if fading else 0.0

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # as in Pretrain: Lightning does not clip under a fused optimizer in mixed precision
        if gradient_clip_val:
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> Any:
        config, random = self.config, self.start == RANDOM
        rate = (random and config.random_learning_rate) or config.learning_rate
        groups = layer_groups(
            self.classifier, rate, config.weight_decay, 1.0 if random else config.layer_decay
        )
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(config.beta1, config.beta2), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.steps, config)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def branch_scales(draws: Tensor, rate: float) -> Tensor | None:
    """(n, branches) numbers in 0..1 -> what each picture's branches are multiplied by, 0 or 1 / (1 - chance).

    The chance rises linearly from 0 in the first layer, of two branches, to `rate` in the last. None at 0.
    """
    if not rate:
        return None
    chances = torch.linspace(0, rate, draws.shape[1] // 2, device=draws.device).repeat_interleave(2)
    return (draws >= chances) / (1 - chances)


def layer_groups(
    classifier: Classifier, rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with `lr` and `weight_decay`, the head's first.

    The head and the class's place have `rate`, layer l of L (from 1) and what is below, layer 0, that times
    layer_decay ** (L + 1 - l); the last norm goes with layer L. The class's place of a classifier that goes
    on is below. No decay for norms, biases and embeddings.
    """
    groups = param_groups_layer_decay(
        classifier, weight_decay, no_weight_decay_list=["stem.weight"], layer_decay=layer_decay
    )
    made = [{**group, "lr": rate * group["lr_scale"]} for group in groups]
    return sorted(made, key=lambda group: -group["lr_scale"])  # the first is the one that is logged
