"""A model -> a classifier of pictures, trained whole."""

from delvm.finetune.classifier import Classifier, Predictor, load

__all__ = ["Classifier", "Predictor", "load"]
