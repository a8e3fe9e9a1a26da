"""A runtime for exported models, which needs numpy, onnxruntime and tokenizers, but not torch and transformers."""

from hyperadapters.runtime.runtime import Prediction, Runtime

__all__ = ["Prediction", "Runtime"]
