"""dppo: hyperparameter sweeps over preference optimisation of language models."""

__version__ = "0.1.0"
