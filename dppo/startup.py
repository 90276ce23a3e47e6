"""Garbage collection waits until a run has started.

Importing torch and transformers and composing configurations makes half a million objects that all stay. Looking
through them again and again for garbage is an eighth of what starting costs.
"""

from __future__ import annotations

import gc


def begin() -> None:
    """Collect nothing until ``end``."""
    gc.disable()


def end() -> None:
    """Collect again, but never look at what is there already. Does nothing unless start-up is going on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
