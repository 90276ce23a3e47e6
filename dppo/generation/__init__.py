"""A model's answers to prompts."""

from dppo.generation.greedy import Greedy

__all__ = ["Greedy"]
