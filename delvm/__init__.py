"""Data-efficient distillation of autoregressive vision models."""

__version__ = "0.1.0"
