"""Reinforcement fine-tuning of flow-matching vision-language-action policies in JAX."""

__version__ = "0.1.0"
