"""Pictures as a browser sends them -> a prompt, what models draw after it, and code that does so again."""

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from PIL import Image

from delvm.errors import UserError
from delvm.images.files import SUFFIXES, Sample, decode_picture
from delvm.images.folders import one_size
from delvm.student import Student


@dataclass(frozen=True)
class Model:
    """A model with what its code has to name."""

    student: Student
    folder: Path
    tokenizer: Path | None = None
    """Where it was said; else it is the one that `delvm.load` finds."""

    @property
    def size(self) -> str:
        """Parameters, and megabytes of them in the precision that they have here."""
        parameters = list(self.student.model.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        num_bytes = sum(parameter.nbytes for parameter in parameters)
        return f"{count / 1e6:,.2f}M parameters, {num_bytes / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Upload:
    """A file on the server, and its name on the user's side."""

    path: Path
    name: str


@dataclass(frozen=True)
class Settings:
    """See `delvm.student.Student`."""

    temperature: float
    top_p: float
    seed: int
    nearest: bool

    def __post_init__(self) -> None:
        for key in ("temperature", "top_p"):
            if not isinstance(getattr(self, key), int | float):  # a field that was left empty
                raise UserError(f"{key}: must be a number")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UserError("seed: must be a whole number, at least 0")


@dataclass(frozen=True)
class Prompt:
    """Solved pairs, a query, and how its annotation is drawn. No two files have the same name."""

    pairs: list[tuple[Upload, Upload]]
    query: Upload
    settings: Settings

    @property
    def uploads(self) -> list[Upload]:
        """Every file, in the order that the model sees them."""
        return [*(upload for pair in self.pairs for upload in pair), self.query]


@dataclass(frozen=True)
class Drawing:
    """How far a model has come."""

    model: str
    picture: Image.Image
    seconds: float
    """Of this model alone, from reading the prompt on; each row was decoded to be shown."""


def read_prompt(slots: Sequence[Upload | None], query: Upload | None, settings: Settings) -> Prompt:
    """image, annotation, image, annotation ... as they stand on the page, empty pairs between them.

    Raises UserError for half a pair, for no pair and for no query.
    """
    pairs = []
    for number, (image, annotation) in enumerate(zip(slots[::2], slots[1::2], strict=True), 1):
        if image and annotation:
            pairs.append((image, annotation))
        elif image or annotation:
            there, missing = ("image", "annotation") if image else ("annotation", "image")
            raise UserError(f"pair {number}: an {there} without its {missing}")
    if not pairs:
        raise UserError("no pair of an image and its annotation: at least one shows the task")
    if query is None:
        raise UserError("no query: the picture to be annotated")
    taken: set[str] = set()
    *named, query = [_named(u, taken) for u in (*(u for pair in pairs for u in pair), query)]
    return Prompt(list(zip(named[::2], named[1::2], strict=True)), query, settings)


def _named(upload: Upload, taken: set[str]) -> Upload:
    """Under a name that is not taken: phones call every picture `image.jpg`."""
    name, number = Path(upload.name), 1
    unique = name.name
    while unique in taken:
        number += 1
        unique = f"{name.stem}-{number}{name.suffix}"
    taken.add(unique)
    return Upload(upload.path, unique)


def read_uploads(uploads: Sequence[Upload]) -> Sample:
    """An image and its annotation, (H, W, 3) uint8 each; or a picture alone.

    Raises UserError that names the file: not a picture, not of its image's size.
    """
    names = [upload.name for upload in uploads]
    return one_size([decode_picture(upload.path, upload.name) for upload in uploads], names)


def draw(models: Mapping[str, Model], prompt: Prompt) -> Iterator[Drawing]:
    """What every model draws, in turn a row of codes each: of the same prompt, with the same seed.

    Raises ValueError of one line for what cannot be shown.
    """
    pairs, [query] = [read_uploads(pair) for pair in prompt.pairs], read_uploads([prompt.query])
    how = prompt.settings
    rows, seconds = {}, {}
    for name, model in models.items():
        start = time.perf_counter()
        rows[name] = model.student.complete_by_row(
            pairs, query, temperature=how.temperature, top_p=how.top_p, seed=how.seed, nearest=how.nearest
        )
        seconds[name] = time.perf_counter() - start
    while rows:
        for name in list(rows):
            start = time.perf_counter()
            picture = next(rows[name], None)
            seconds[name] += time.perf_counter() - start
            if picture is None:
                del rows[name]
            else:
                yield Drawing(name, picture, seconds[name])


# --- code that does it again ---


def python_code(model: Model, prompt: Prompt) -> str:
    """Three lines of Python, to be run where the files are."""
    how = prompt.settings
    folders = [str(model.folder), *([str(model.tokenizer)] if model.tokenizer else [])]
    pairs = ", ".join(f"({_quoted(image.name)}, {_quoted(note.name)})" for image, note in prompt.pairs)
    settings = f"temperature={how.temperature}, top_p={how.top_p}, seed={how.seed}"
    return (
        "import delvm\n"
        f"student = delvm.load({', '.join(map(_quoted, folders))})\n"
        f"picture = student.complete([{pairs}], {_quoted(prompt.query.name)}, {settings}"
        f"{', nearest=True' if how.nearest else ''})\n"
    )


def shell_code(model: Model, prompt: Prompt) -> str:
    """The command line of delvm.prompt, and before it those that lay the files out for it."""
    how, lines = prompt.settings, ["mkdir -p pairs/images pairs/annotations"]
    for number, pair in enumerate(prompt.pairs, 1):
        for upload, folder in zip(pair, ("images", "annotations"), strict=True):
            suffix = Path(upload.name).suffix
            kept = suffix if suffix.lower() in SUFFIXES else ".png"  # a picture is known by what is in it
            lines.append(shlex.join(["cp", upload.name, f"pairs/{folder}/{number:02}{kept}"]))
    words = ["python", "-m", "delvm.prompt", str(model.folder)]
    words += ["--tokenizer", str(model.tokenizer)] if model.tokenizer else []
    words += ["--pairs", "pairs", "--query", prompt.query.name, "--out", "drawn"]
    words += ["--temperature", str(how.temperature), "--top-p", str(how.top_p), "--seed", str(how.seed)]
    words += ["--nearest"] if how.nearest else []
    return "\n".join([*lines, shlex.join(words)]) + "\n"


def write_zip(file: Path, prompt: Prompt) -> None:
    """The pictures under the names that the code has for them, each as it was sent."""
    with ZipFile(file, "w") as archive:
        for upload in prompt.uploads:
            archive.write(upload.path, upload.name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
