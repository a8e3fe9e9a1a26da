"""A runtime for exported models that needs numpy, onnxruntime and tokenizers only, and neither torch nor transformers."""

from hyperadapters.runtime.runtime import Prediction, Runtime

__all__ = ["Prediction", "Runtime"]
