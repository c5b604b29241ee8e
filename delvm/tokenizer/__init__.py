"""Pictures <-> token grids."""

from delvm.tokenizer.published import load
from delvm.tokenizer.vqgan import Tokenizer

__all__ = ["Tokenizer", "load"]
