"""Pictures <-> token grids."""

from delvm.tokenizer.vqgan import Tokenizer, load

__all__ = ["Tokenizer", "load"]
