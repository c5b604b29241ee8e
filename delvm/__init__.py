"""Data-efficient distillation of autoregressive vision models.

student = delvm.load("runs/quickstart/export")
picture = student.complete(pairs, query)  # pairs: [(image, annotation), ...]
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from delvm.student import Student

__version__ = "0.1.0"


def load(folder: str | Path, tokenizer: str | Path | None = None) -> "Student":
    """A model and its tokenizer, ready to be prompted: see `delvm.student`, which has the details."""
    from delvm import student  # here, so that `import delvm` costs nothing

    return student.load(folder, tokenizer)
