"""Codes or pictures -> features: the hidden states of a model, and the controls beside them."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from delvm.errors import UserError
from delvm.tokenizer.training import to_pictures

POSITIONS = 8  # rows and columns of codebook vectors, at most

Readout = Callable[[int, int], Tensor]


def mean(rows: int, columns: int) -> Tensor:
    """(1, tokens): all of the picture alike."""
    return torch.full((1, rows * columns), 1 / (rows * columns))


def quadrants(rows: int, columns: int) -> Tensor:
    """(4, tokens): the mean of each quarter of the picture, in raster order."""
    down, across = torch.arange(rows) * 2 // rows, torch.arange(columns) * 2 // columns
    member = F.one_hot((2 * down[:, None] + across).flatten(), 4).T.float()
    return member / member.sum(1, keepdim=True).clamp(min=1)  # a single row has no lower half


def last(rows: int, columns: int) -> Tensor:
    """(1, tokens): the last token, which alone has seen the whole picture."""
    return F.one_hot(torch.tensor([rows * columns - 1]), rows * columns).float()


READOUTS: dict[str, Readout] = {"quadrants": quadrants, "mean": mean, "last": last}
"""How the tokens of a picture become features: each is a (regions, tokens) average."""


class Reader(Protocol):
    """What features are read with. Its device is that of the batch it is given."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the kinds of features that it reads of a picture."""
        ...

    def __call__(self, batch: Tensor) -> Tensor:
        """(n, tokens) int64 codes, or (n, H, W, 3) uint8 pictures -> (n, layers, width) float."""
        ...


class HiddenStates:
    """The hidden states of a LLaMA that reads BOS (if it has one) and the codes of one picture.

    The last layer's are those after the final norm, as the head sees them.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        grid: tuple[int, int],
        *,
        layers: Sequence[int] = (),
        readout: str = "quadrants",
        every_token: bool = False,
        precision: str = "32-true",
    ) -> None:
        """
        Args:
            model: in evaluation mode, where it is to run.
            grid: rows and columns of codes of a picture.
            layers: from 1 to the model's number; none: all.
            readout: of `READOUTS`; the regions of a layer stand one behind the other.
            every_token: instead, the mean over the layers of each token: (n, tokens, hidden size).
            precision: `32-true` or `bf16-mixed`.

        Raises:
            UserError: a layer that the model has not; a picture that it is too short for.
        """
        depth, length = model.config.num_hidden_layers, math.prod(grid)
        if wrong := [layer for layer in layers if not 1 <= layer <= depth]:
            raise UserError(f"layers: {wrong[0]}, the model has 1 to {depth}")
        self.bos = model.config.bos_token_id
        positions = model.config.max_position_embeddings
        if length + (self.bos is not None) > positions:
            raise UserError(f"a picture has {length} tokens, the model takes {positions}")
        self.model, self.every_token, self.precision = model.model, every_token, precision
        places = list(layers) or list(range(1, depth + 1))
        blocks = [*model.model.layers[:-1], model.model.norm]
        self.blocks: list[nn.Module] = [blocks[place - 1] for place in places]
        self.layers = tuple(map(str, range(length) if every_token else places))
        self.weights = READOUTS[readout](*grid)

    def __call__(self, batch: Tensor) -> Tensor:
        """(n, tokens) int64 -> (n, layers, regions * hidden size)."""
        if self.bos is not None:
            batch = F.pad(batch, (1, 0), value=self.bos)
        found: dict[int, Tensor] = {}
        weights = self.weights.to(batch.device)

        def keep(place: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                tokens = output[:, -weights.shape[1] :].float()  # without BOS
                with torch.autocast(tokens.device.type, enabled=False):  # a mean is taken in float32
                    found[place] = tokens if self.every_token else (weights @ tokens).flatten(1)

            return hook

        # pooled where they arise: all layers' hidden states at once would be most of the memory
        handles = [block.register_forward_hook(keep(place)) for place, block in enumerate(self.blocks)]
        try:
            mixed = self.precision == "bf16-mixed"
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=mixed):
                self.model(batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        read = torch.stack([found[place] for place in range(len(self.blocks))], dim=1)
        return read.mean(1) if self.every_token else read


@dataclass(frozen=True)
class TokenCounts:
    """How often each code stands in a picture: a bag of tokens."""

    num_codes: int
    layers: tuple[str, ...] = ("",)

    def __call__(self, batch: Tensor) -> Tensor:
        """(n, tokens) int64 -> (n, 1, codes), shares of the picture's tokens."""
        counts = torch.zeros(len(batch), self.num_codes, device=batch.device)
        counts.scatter_add_(1, batch, torch.ones_like(batch, dtype=counts.dtype))
        return counts[:, None] / batch.shape[1]


@dataclass(frozen=True)
class CodebookVectors:
    """The codes' vectors, each at its place; a grid beyond 8x8 is averaged to that."""

    codebook: Tensor
    grid: tuple[int, int]
    layers: tuple[str, ...] = ("",)

    def __call__(self, batch: Tensor) -> Tensor:
        """(n, tokens) int64 -> (n, 1, places * code_dim)."""
        planes = F.embedding(batch, self.codebook).transpose(1, 2).unflatten(2, self.grid)
        size = (min(POSITIONS, self.grid[0]), min(POSITIONS, self.grid[1]))
        return F.adaptive_avg_pool2d(planes, size).flatten(1)[:, None]


@dataclass(frozen=True)
class Pixels:
    """The picture itself at 16x16."""

    layers: tuple[str, ...] = ("",)

    def __call__(self, batch: Tensor) -> Tensor:
        """(n, H, W, 3) uint8 -> (n, 1, 768)."""
        return F.adaptive_avg_pool2d(to_pictures(batch), 16).flatten(1)[:, None]


class Timm:
    """A model of timm with its own pooling, on pictures of the size and colours that it was trained with."""

    layers: tuple[str, ...] = ("",)

    def __init__(self, model: nn.Module) -> None:
        """model: of `timm.create_model(..., num_classes=0)`, in evaluation mode, where it is to run."""
        import timm

        config = timm.data.resolve_model_data_config(model)
        self.model, self.size = model, int(config["input_size"][-1])
        self.mean, self.std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))

    def __call__(self, batch: Tensor) -> Tensor:
        """(n, size, size, 3) uint8 -> (n, 1, width)."""
        pictures = to_pictures(batch)
        return self.model((pictures - self.mean.to(batch.device)) / self.std.to(batch.device))[:, None]


def check_timm(name: str) -> None:
    """Refuse a name that timm has no pretrained model of; those of a hub (`hf-hub:...`) are not looked up.

    Raises:
        UserError: with the nearest names.
    """
    import timm

    _, _, plain = name.rpartition("/")
    if ":" in name or timm.models.is_model_pretrained(plain):
        return
    near = difflib.get_close_matches(plain, timm.list_models(pretrained=True), n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise UserError(f"probe.timm: '{name}' is no pretrained model of timm{hint}")


def load_timm(name: str) -> nn.Module:
    """A pretrained model of timm without its head, in evaluation mode, on the CPU.

    Raises:
        UserError: an unknown name, or weights that cannot be had.
    """
    import timm

    try:
        return timm.create_model(name, pretrained=True, num_classes=0).eval()
    except Exception as error:  # timm and the hub have many kinds
        raise UserError(
            f"probe.timm: '{name}' cannot be had: {' '.join(str(error).split())[:200]}"
        ) from error
