"""A model's answers to prompts."""

from dppo.generation.beam import Beam, DiverseBeam
from dppo.generation.compared import OneAnswer, SampledOnce, decoding_of
from dppo.generation.decoding import Decoding, Several
from dppo.generation.greedy import Greedy
from dppo.generation.sampled import Sampled

__all__ = ["Beam", "Decoding", "DiverseBeam", "Greedy", "OneAnswer", "Sampled", "SampledOnce", "Several", "decoding_of"]
