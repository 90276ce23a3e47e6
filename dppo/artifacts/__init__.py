"""Stages are computed once: fingerprints, manifests, atomic commits, locks and growing stores."""

from dppo.artifacts.cache import Cache
from dppo.artifacts.fingerprint import fingerprint, short
from dppo.artifacts.manifest import Damaged, Manifest
from dppo.artifacts.slots import Build, Slot
from dppo.artifacts.stores import MissingRows, Store, Tokens, require_rows

__all__ = [
    "Build",
    "Cache",
    "Damaged",
    "Manifest",
    "MissingRows",
    "Slot",
    "Store",
    "Tokens",
    "fingerprint",
    "require_rows",
    "short",
]
