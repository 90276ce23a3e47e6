"""A model's answers to prompts."""

from dppo.generation.beam import Beam, DiverseBeam
from dppo.generation.compared import OneAnswer, OwnAnswer, SampledOnce, decoding_in_training, decoding_of
from dppo.generation.decoding import Decoding, Several
from dppo.generation.greedy import Greedy
from dppo.generation.sampled import Sampled
from dppo.generation.vllm import VLLM

__all__ = [
    "VLLM",
    "Beam",
    "Decoding",
    "DiverseBeam",
    "Greedy",
    "OneAnswer",
    "OwnAnswer",
    "Sampled",
    "SampledOnce",
    "Several",
    "decoding_in_training",
    "decoding_of",
]
