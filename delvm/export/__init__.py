"""A model and its tokenizer -> a folder that another program loads."""

from delvm.export.folder import FORMATS, export

__all__ = ["FORMATS", "export"]
