"""Stages are computed once: fingerprints, manifests, atomic commits, locks and growing stores."""

from dppo.artifacts.cache import Cache, ReadOnly
from dppo.artifacts.fingerprint import fingerprint, short
from dppo.artifacts.manifest import Damaged, Manifest
from dppo.artifacts.slots import Build, Slot
from dppo.artifacts.stores import MissingRows, Store, Tokens, require_rows
from dppo.artifacts.token_ids import IdRow

__all__ = [
    "Build",
    "Cache",
    "Damaged",
    "IdRow",
    "Manifest",
    "MissingRows",
    "ReadOnly",
    "Slot",
    "Store",
    "Tokens",
    "fingerprint",
    "require_rows",
    "short",
]
