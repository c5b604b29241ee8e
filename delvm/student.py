"""Pictures -> the pictures that a model draws after them.

    student = delvm.load("runs/quickstart/export")
    picture = student.complete([("cat.jpg", "cat-edges.png"), ("owl.jpg", "owl-edges.png")], "fox.jpg")

Pictures go in as paths, PIL images or (H, W, 3) uint8 arrays of any size: they become what the model was
trained on, the shorter side scaled to the tokenizer's size and the centre kept. They come out as PIL images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import LlamaForCausalLM

from delvm import llama
from delvm.errors import UserError
from delvm.generation import complete_by_token, complete_queries, complete_sequences
from delvm.images.augment import view
from delvm.images.files import Sample, read_picture
from delvm.images.folders import one_size
from delvm.tokenizer import Tokenizer
from delvm.tokenizer import load as load_tokenizer

PictureLike = str | Path | Image.Image | np.ndarray
"""A file, an image, or (H, W, 3) uint8 RGB."""

Example = Sequence[PictureLike]
"""An image and its annotation, or its annotations by several tasks; all of one size."""

BATCH = 8  # pictures that are encoded or decoded side by side
UNDRAWN = (128, 128, 128)


@dataclass(frozen=True)
class Student:
    """A model and the tokenizer whose codes it writes, on one device.

    Where nothing else is said, of every method: `temperature` 0 takes the most likely code each time, above 0
    draws from the smallest set of codes that holds `top_p` of the probability, the same for the same `seed`.
    With `nearest`, colours of annotations are labels: where annotations are scaled, colours never mix.
    Mistakes end in a ValueError of one line: a picture that cannot be read, an annotation that has not the
    size of its image, more than the model's positions hold, a setting out of range.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer

    @property
    def bos(self) -> int | None:
        """The id that a sentence begins with."""
        found: int | None = self.model.config.bos_token_id
        return found

    @property
    def room(self) -> int:
        """Pictures that fit into the model's positions."""
        positions = self.model.config.max_position_embeddings - (self.bos is not None)
        return int(positions // self.tokenizer.num_tokens)

    def max_shots(self, annotations: int = 1) -> int:
        """Examples of so many annotations each that fit beside a query and its result."""
        return max(0, self.room // (1 + annotations) - 1)

    # --- by example ---

    def complete(
        self,
        pairs: Sequence[Example],
        query: PictureLike,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        nearest: bool = False,
    ) -> Image.Image:
        """The annotation of `query` as the pairs (image, annotation) show it: analogy (Bai et al. 2024)."""
        _check_pairs(pairs)
        found = self.complete_many(
            pairs, [query], temperature=temperature, top_p=top_p, seed=seed, nearest=nearest
        )
        return found[0][0][0]

    def complete_by_row(
        self,
        pairs: Sequence[Example],
        query: PictureLike,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        nearest: bool = False,
    ) -> Iterator[Image.Image]:
        """What `complete` returns while it is drawn: the picture after each row of codes, grey below.

        The last is the whole one. A row may still change a little as those below it come, since the
        tokenizer's decoder looks around. What cannot be shown is refused at once, not with the first row.
        """
        _check_pairs(pairs)
        shown = self._encode_examples(pairs, nearest)
        prompt = torch.cat([shown, self.encode([self.fit([query], "query")[0]])[0]])
        codes = complete_by_token(
            self.model, prompt[None], self.tokenizer.num_tokens, self.tokenizer.num_codes,
            temperature=temperature, top_p=top_p, seed=seed,
        )  # fmt: skip
        return self._rows(codes)

    def complete_many(
        self,
        examples: Sequence[Example],
        queries: Sequence[PictureLike],
        *,
        candidates: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        nearest: bool = False,
    ) -> list[list[list[Image.Image]]]:
        """The annotations of many queries by the same examples, which the model reads once.

        Returns, for each query, `candidates` answers (several need a temperature): the query's annotations
        in the order that the examples have them. Examples of more than one annotation are a compositional
        prompt: the model does the tasks one after the other, seeing what it has drawn.
        """
        shown = self._encode_examples(examples, nearest)
        fitted = [self.fit([query], f"queries[{place}]")[0] for place, query in enumerate(queries)]
        if not fitted:
            raise UserError("queries: none")
        annotations, tokens = len(examples[0]) - 1, self.tokenizer.num_tokens
        codes = complete_queries(
            self.model, shown, self.encode(fitted), annotations * tokens, self.tokenizer.num_codes,
            candidates=candidates, temperature=temperature, top_p=top_p, seed=seed,
        ).unflatten(2, (annotations, tokens))  # fmt: skip
        return [[self.decode(answer) for answer in of_query] for of_query in codes]

    # --- in sequence ---

    def continue_frames(
        self,
        frames: Sequence[PictureLike],
        count: int,
        *,
        candidates: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[Image.Image]]:
        """The next `count` frames, `candidates` times: sequential prompting (Bai et al. 2024).

        Each is drawn after as many of the last frames, given and drawn, as leave it room, `room - 1`.
        """
        if self.room < 2:
            raise UserError(f"frames: the model's positions hold {self.room} pictures, not one and the next")
        if not frames:
            raise UserError("frames: none; at least one is continued")
        if candidates < 1:
            raise UserError(f"candidates: {candidates}, must be at least 1")
        if candidates > 1 and temperature == 0:
            raise UserError(f"candidates: {candidates} would be equal at temperature 0")
        first = max(0, len(frames) - self.room + 1)  # what is before slides out unread
        shown = [self.fit([frames[n]], f"frames[{n}]")[0] for n in range(first, len(frames))]
        codes = complete_sequences(
            self.model, self.encode(shown).expand(candidates, -1, -1), count, self.tokenizer.num_codes,
            bos=self.bos, temperature=temperature, top_p=top_p, seed=seed,
        )  # fmt: skip
        return [self.decode(sequence) for sequence in codes]

    # --- pictures and codes ---

    def fit(self, pictures: Example, name: str, *, nearest: bool = False) -> Sample:
        """An image and its annotations as the model sees them, each (size, size, 3) uint8.

        `name` says in errors whose they are.
        """
        names = [name] if len(pictures) == 1 else [f"{name}[{place}]" for place in range(len(pictures))]
        places = [str(p) if isinstance(p, str | Path) else n for p, n in zip(pictures, names, strict=True)]
        sample = one_size([_read(*each) for each in zip(pictures, places, strict=True)], places)
        annotated, size = [place > 0 for place in range(len(sample))], self.tokenizer.image_size
        return view(sample, annotated, policy="none", size=size, nearest=nearest, seed=(0,))

    def encode(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """n pictures (size, size, 3) uint8 -> (n, tokens) int64 on the CPU."""
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
        device = self.tokenizer.codebook.device
        return torch.cat([self.tokenizer.encode(part.to(device)).cpu() for part in pixels.split(BATCH)])

    def decode(self, codes: Tensor, rows: int | None = None) -> list[Image.Image]:
        """(n, tokens) int64 -> n pictures; of `rows` rows of codes, or of all."""
        grid = (rows or self.tokenizer.grid[0], self.tokenizer.grid[1])
        device = self.tokenizer.codebook.device
        pixels = torch.cat(
            [self.tokenizer.decode(part.to(device), grid).cpu() for part in codes.split(BATCH)]
        )
        arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return [Image.fromarray(array) for array in arrays]

    def _encode_examples(self, examples: Sequence[Example], nearest: bool) -> Tensor:
        """(tokens,) int64: BOS, where there is one, and the examples. Refuses what makes no prompt."""
        if not examples:
            raise UserError("pairs: none; at least one shows the task")
        for place, example in enumerate(examples):
            if isinstance(example, PictureLike) or len(example) < 2:
                raise UserError(f"pairs[{place}]: one picture, must be an image and its annotation")
            if len(example) != len(examples[0]):
                raise UserError(f"pairs[{place}]: {len(example)} pictures, pairs[0] has {len(examples[0])}")
        fitting = self.max_shots(len(examples[0]) - 1)
        if len(examples) > fitting:
            raise UserError(
                f"pairs: {len(examples)}, but beside a query and its result {fitting} fit into the model's"
                f" {self.model.config.max_position_embeddings} positions"
            )
        shown = [self.fit(each, f"pairs[{n}]", nearest=nearest) for n, each in enumerate(examples)]
        codes = self.encode([picture for sample in shown for picture in sample]).flatten()
        return codes if self.bos is None else torch.cat([torch.tensor([self.bos]), codes])

    def _rows(self, codes: Iterator[Tensor]) -> Iterator[Image.Image]:
        columns, size = self.tokenizer.grid[1], self.tokenizer.image_size
        drawn: list[Tensor] = []
        for code in codes:
            drawn.append(code)
            if len(drawn) % columns == 0:
                picture = Image.new("RGB", (size, size), UNDRAWN)
                picture.paste(self.decode(torch.stack(drawn, 1), len(drawn) // columns)[0])
                yield picture


def load(folder: str | Path, tokenizer: str | Path | None = None) -> Student:
    """A model and its tokenizer, on the GPU where there is one, in the precision that they are saved in.

    Args:
        folder: an export, a run's `student/` or `teacher/`, or any model that `delvm.llama.load` reads.
        tokenizer: its tokenizer's folder or file; by default `tokenizer/` in the folder, or beside it.

    Raises:
        UserError: a folder that is not there or cannot be read, no tokenizer, two that do not fit together.
    """
    folder = Path(folder)
    if tokenizer is None:
        places = [folder / "tokenizer", folder.absolute().parent / "tokenizer"]
        tokenizer = next((place for place in places if place.is_dir()), None)
    config = llama.load_config(folder)
    if tokenizer is None:
        raise UserError(f"{folder}: no tokenizer/ in it or beside it; name the folder of its tokenizer")
    vqgan = load_tokenizer(tokenizer)
    if not llama.codes_fit(config, vqgan.num_codes):
        raise UserError(f"{tokenizer}: has {vqgan.num_codes} codes; {folder} {llama.what_it_reads(config)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Student(llama.load(folder, num_codes=vqgan.num_codes).to(device), vqgan.to(device))


def _check_pairs(pairs: Sequence[Example]) -> None:
    """Refuse examples of several annotations where one picture is drawn."""
    if pairs and not isinstance(pairs[0], PictureLike) and len(pairs[0]) > 2:
        raise UserError(f"pairs[0]: {len(pairs[0])} pictures, must be two; complete_many draws several")


def _read(picture: PictureLike, place: str) -> np.ndarray:
    """(H, W, 3) uint8; `place` is its name in errors."""
    if isinstance(picture, str | Path):
        return read_picture(Path(picture).expanduser())
    if isinstance(picture, Image.Image):
        if picture.mode[0] in "IF":
            raise UserError(f"{place}: mode {picture.mode}, more than 8 bits a channel")
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    if not isinstance(picture, np.ndarray):
        raise UserError(f"{place}: {type(picture).__name__}, must be a path, an image or an array")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise UserError(f"{place}: {picture.dtype} {picture.shape}, must be uint8 (H, W, 3)")
    return picture
