"""Pictures -> classes: the blocks of a LLaMA that read codes or patches, with a class read-out.

predictor = delvm.finetune.load("runs/x/finetune/student")
predictor.classify(["cat.jpg"])        # ["tabby"]
"""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import PatchEmbed
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from delvm.errors import UserError
from delvm.evaluate.features import Listing, Pictures
from delvm.stages import write_atomic
from delvm.tokenizer import Tokenizer
from delvm.tokenizer import load as load_tokenizer
from delvm.tokenizer.training import to_pictures
from delvm.tokens.encoder import Encoder, TokensConfig

INPUTS = ("tokens", "patches")
MASKS = ("causal", "bidirectional")
READOUTS = ("class", "last", "mean")
CONFIG, WEIGHTS, TOKENIZER = "classifier.json", "model.safetensors", "tokenizer"


@dataclass(frozen=True)
class Form:
    """What a classifier is beside its LLaMA's configuration."""

    classes: tuple[str, ...]
    image_size: int
    """Side of a picture in pixels."""
    grid: int
    """Rows, and columns, of codes or patches."""
    input: str = "tokens"
    """`tokens`: a tokenizer's codes; `patches`: pixels, square by square."""
    num_codes: int = 0
    """Of the tokenizer; 0 for patches."""
    begins: bool = True
    """Whether what stood before the first code of a sentence, BOS, stands before the picture."""
    mask: str = "causal"
    """`causal`: each place sees what stands before it; `bidirectional`: all."""
    readout: str = "class"
    """`class`: a learned place behind the picture, the one that sees all of it causally (iLLaMA, Wang et al.
    2024, arXiv 2404.06773); `last`: the picture's last place; `mean`: the mean of the picture's places."""

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.image_size // self.grid

    @property
    def places(self) -> int:
        """What the blocks read of a picture: codes or patches, what stands before it, the class's place."""
        return self.grid**2 + self.begins + (self.readout == "class")


class Classifier(nn.Module):
    """A LLaMA's blocks between what reads a picture and what says its class.

    Of the head's weights all are 0 at first, so that no class comes before another and the first loss is
    log(classes).
    """

    def __init__(self, config: LlamaConfig, form: Form) -> None:
        """config: its vocabulary and special ids are not used."""
        super().__init__()
        self.form, self.config = form, copy.deepcopy(config)
        self.config.vocab_size, self.config.pad_token_id = 1, None
        self.config.max_position_embeddings = max(form.places, self.config.max_position_embeddings)
        self.config.is_causal = form.mask == "causal"
        self.blocks = LlamaModel(self.config)
        self.blocks.set_input_embeddings(nn.Identity())
        for layer in self.blocks.layers:  # whose SDPA asks them, where there is no mask
            layer.self_attn.is_causal = self.config.is_causal
        width = self.config.hidden_size
        self.stem: nn.Module = nn.Embedding(form.num_codes, width)
        if form.input == "patches":
            self.stem = PatchEmbed(form.image_size, form.patch_size, 3, width)
        self.begin = nn.Parameter(torch.zeros(width)) if form.begins else None
        self.query = nn.Parameter(torch.zeros(width)) if form.readout == "class" else None
        self.head = nn.Linear(width, len(form.classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.goes_on = False
        """Whether an earlier training has left it, so that none of its parts are new."""
        self.scales: Tensor | None = None
        """(n, 2 * layers) float: what the blocks' branches are multiplied by in training."""
        for place, layer in enumerate(self.blocks.layers):
            layer.self_attn.register_forward_hook(self._scale(2 * place))
            layer.mlp.register_forward_hook(self._scale(2 * place + 1))

    @classmethod
    def of(cls, model: LlamaForCausalLM, form: Form, *, seed: int) -> "Classifier":
        """The classifier that has a LLaMA's blocks, its codes' vectors and that of BOS, in float32.

        What a LLaMA has not, patches and the class's place, is drawn by the seed, as large as codes' vectors.
        """
        model = model.float()
        made = cls(model.config, form)
        vectors = model.model.embed_tokens.weight.detach()
        size = float(vectors.std())
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights = {k: v for k, v in model.model.state_dict().items() if not k.startswith("embed_tokens")}
            made.blocks.load_state_dict(weights)
            if isinstance(made.stem, nn.Embedding):
                made.stem.weight.copy_(vectors[: form.num_codes])
            else:  # pixels in -1..1 are about 1/2 in the mean square
                patches = made.stem.get_submodule("proj")
                assert isinstance(patches, nn.Conv2d)
                assert patches.bias is not None
                nn.init.normal_(patches.weight, std=size / math.sqrt(0.5 * 3 * form.patch_size**2))
                nn.init.zeros_(patches.bias)
            if made.begin is not None:
                made.begin.copy_(vectors[model.config.bos_token_id])
            if made.query is not None:
                nn.init.normal_(made.query, std=size)
        return made

    def forward(self, inputs: Tensor, *, future: float = 0.0) -> Tensor:
        """Class logits, (n, classes).

        Args:
            inputs: (n, tokens) int64 codes, or (n, 3, H, W) float pixels in -1..1.
            future: weight, 0..1, that later places have in attention: 0 is the causal mask, 1 none. The soft
                mask of iLLaMA; there it is multiplied by after the softmax and attention's sum falls below 1,
                here before, so that causal is what the model was trained with.
        """
        picture = self.stem(inputs)
        parts = [picture]
        if self.begin is not None:
            parts.insert(0, self.begin.to(picture).expand(len(picture), 1, -1))
        if self.query is not None:
            parts.append(self.query.to(picture).expand(len(picture), 1, -1))
        places = torch.cat(parts, dim=1)
        mask = soft_mask(places.shape[1], future).to(places) if future else None
        seen = self.blocks(inputs_embeds=places, attention_mask=mask, use_cache=False).last_hidden_state
        if self.form.readout == "mean":
            return self.head(seen[:, self.form.begins :].mean(1))
        return self.head(seen[:, -1])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters are how deep, as timm's learning rates by layer ask it; the rest is the head's.

        Patches and the class's place, where they are new to a pretrained model, learn as fast as the head.
        """
        first = r"^begin" if self.form.input == "patches" else r"^(?:begin|stem)"
        if self.goes_on:
            first = r"^(?:begin|stem|query)"
        return {
            "stem": first,
            "blocks": [(r"^blocks\.layers\.(\d+)", None), (r"^blocks\.norm", (99999,))],
        }

    def _scale(self, place: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if self.scales is None or not self.training:
                return None
            scale = self.scales[:, place, None, None]
            if isinstance(output, tuple):
                return (output[0] * scale.to(output[0].dtype), *output[1:])
            return output * scale.to(output.dtype)

        return hook


def soft_mask(length: int, future: float) -> Tensor:
    """(1, 1, length, length) float32 to add to attention's scores: 0, and log(future) for later places."""
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.zeros(length, length).masked_fill(later, math.log(future))[None, None]


class Read:
    """(n, H, W, 3) uint8 pictures -> what a classifier reads of them, where they are."""

    def __init__(self, form: Form, tokenizer: Tokenizer | None, config: TokensConfig | None = None) -> None:
        """tokenizer: of the codes, None for patches. config: how these are encoded."""
        assert (tokenizer is None) == (form.input == "patches")
        self.encoder = Encoder(tokenizer.eval(), config) if tokenizer else None

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        if self.encoder is None:
            return to_pictures(pictures) * 2 - 1
        return self.encoder.to(pictures.device)(pictures[:, None])[:, 0].clone()


class Predictor:
    """A trained classifier with all that it needs: pictures in, classes out."""

    def __init__(
        self, classifier: Classifier, tokenizer: Tokenizer | None, config: TokensConfig | None = None
    ):
        self.classifier, self.tokenizer = classifier.eval(), tokenizer
        self.read = Read(classifier.form, tokenizer, config)

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the logits."""
        return self.classifier.form.classes

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(n, H, W, 3) uint8 of the classifier's size, where it is -> (n, classes) float32 logits."""
        return self.classifier(self.read(pictures)).float()

    def classify(self, files: Sequence[str | Path]) -> list[str]:
        """The likeliest class of each picture, which is scaled and cropped to its centre.

        Raises:
            UserError: a picture that cannot be read.
        """
        size, device = self.classifier.form.image_size, next(self.classifier.parameters()).device
        listing = Listing([str(file) for file in files], torch.zeros(len(files)).long().numpy(), self.classes)
        seen = Pictures(listing, size, mirrored=False)
        return [self.classes[int(self(seen[place].to(device)).argmax())] for place in range(len(files))]

    def save(self, folder: Path) -> None:
        """Write classifier.json, model.safetensors and, for codes, tokenizer/ into a folder that is there.

        Raises:
            OSError: they do not fit on the disk.
        """
        classifier = self.classifier
        weights = {
            name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()
        }
        try:
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk reaches us under this name
            raise OSError(f"{folder}: the classifier could not be written: {error}") from error
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER)
        said = {"form": asdict(classifier.form), "llama": classifier.config.to_dict()}
        write_atomic(folder / CONFIG, json.dumps(said, indent=2, default=str) + "\n")


def load_form(folder: Path) -> Form:
    """What a saved classifier is; its weights need be there and are not read. Raises as `load`."""
    with _readable(folder):
        (folder / WEIGHTS).stat()
    return _read_config(folder)[0]


def load_classifier(folder: Path, form: Form | None = None) -> Classifier:
    """A saved classifier without its tokenizer, perhaps for pictures of another size. Raises as `load`.

    Of the weights none depends on the size: a larger picture is more codes or patches, each as large as
    before. Positions are counted on, row by row, beyond those that were trained.

    Args:
        folder: what `Predictor.save` has written.
        form: the saved one but for size and grid; None: that itself.
    """
    saved, config = _read_config(folder)
    with _readable(folder):
        classifier = Classifier(config, form or saved)
        classifier.load_state_dict(load_file(folder / WEIGHTS))
    return classifier


def load(folder: str | Path) -> Predictor:
    """What `Predictor.save` has written, on the CPU, in evaluation mode.

    Raises:
        UserError: no such folder, or files that are damaged or do not fit together.
    """
    place = Path(folder)
    classifier = load_classifier(place)
    reads_codes = classifier.form.input == "tokens"
    return Predictor(classifier, load_tokenizer(place / TOKENIZER) if reads_codes else None)


def _read_config(folder: Path) -> tuple[Form, LlamaConfig]:
    with _readable(folder):
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        form = Form(**{**said["form"], "classes": tuple(said["form"]["classes"])})
        # transformers warns of the model's special ids, which a vocabulary of 1 has not
        return form, LlamaConfig(**{**said["llama"], "bos_token_id": None, "eos_token_id": None})


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What may be wrong with a classifier's files, as a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: holds no classifier, {Path(error.filename or WEIGHTS).name} is missing"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable classifier: {' '.join(str(error).split())[:200]}") from error
