"""One part of a report: a figure that is drawn for any width, what it shows in words, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dppo.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """``draw`` makes the figure for a width in inches; None: there is nothing to draw, and ``missing`` says why.

    ``name`` is that of its files, ``lead`` what is to be seen (with n), ``alt`` the same for those who cannot see it.
    ``missing`` names what would complete the part, and ``command`` runs it; both may be there beside a figure.
    """

    name: str
    title: str
    lead: str = ""
    draw: Callable[[float], Figure] | None = None
    alt: str = ""
    tables: tuple[Table, ...] = ()
    missing: str = ""
    command: str = ""
