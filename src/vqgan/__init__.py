"""VQGAN in JAX and Flax: image tokenizers, priors over their codes, and pictures from both."""

__version__ = "0.1.0"
