"""The page: one HTML file without a network, whose texts are data and never markup."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dppo import __version__
from dppo.report.answers import Answers
from dppo.report.panel import Panel
from dppo.report.studies import StudyPart
from dppo.report.table import Table, number_of
from dppo.report.text import visible


@dataclass(frozen=True)
class Card:
    """One number at the top of the page."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True)
class Settings:
    """The settings that differ: ``values`` (L, K) of ``labels`` (L) at ``keys`` (K), None where there is none."""

    labels: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[tuple[str | None, ...], ...]
    second: int  # the label to compare the first one with


@dataclass(frozen=True)
class Page:
    """``panels`` come with their drawn figures, (wide or narrow, svg)."""

    title: str
    subtitle: tuple[str, ...]
    warnings: tuple[str, ...]
    cards: tuple[Card, ...]
    panels: tuple[tuple[Panel, tuple[tuple[str, str], ...]], ...]
    studies: tuple[StudyPart, ...]
    comparisons: tuple[Table, ...]
    runs: Table
    left_out: Table
    answers: Answers
    settings: Settings
    settings_table: Table
    commands: tuple[tuple[str, str], ...]
    footer: str

    def tables(self) -> list[Table]:
        """Every table of the page, for files of their own."""
        found = [table for panel, _ in self.panels for table in panel.tables]
        found += [study.table for study in self.studies if study.table is not None]
        found += [*self.comparisons, self.runs, self.settings_table]
        return [*found, self.left_out] if self.left_out.rows else found


def render(page: Page) -> str:
    """The HTML of a page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    files = resources.files("dppo.report") / "templates"
    css, js, html = ((files / name).read_text("utf-8") for name in ("page.css", "page.js", "page.html.j2"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = lambda text: visible(str(text))
    links = [(panel.name, panel.title) for panel, _ in page.panels]
    links += [(study.anchor, f"Search {study.name}") for study in page.studies]
    links += [
        ("configurations", "Configurations"),
        ("runs", "Runs"),
        ("samples", "Answers"),
        ("differences", "Settings"),
    ]
    links += [("reproduce", "Reproduce")]
    return environment.from_string(html).render(
        version=__version__,
        title=page.title,
        subtitle=page.subtitle,
        warnings=page.warnings,
        cards=page.cards,
        links=links,
        panels=page.panels,
        studies=page.studies,
        comparisons=page.comparisons,
        runs=page.runs,
        statuses=sorted({str(row[2]) for row in page.runs.rows}),
        left_out=page.left_out,
        samples_note=page.answers.note(),
        settings=page.settings_table,
        commands=page.commands,
        footer=page.footer,
        data=_json(_data(page)),
        # jinja2 would escape a style too; nothing in it comes from a run.
        css=Markup(css),
        js=js,
        script_hash=_hash(js),
        number_of=number_of,
        numeric=lambda table, at: any(number_of(row[at]) is not None for row in table.rows),
    )


def _data(page: Page) -> dict[str, Any]:
    return {
        "samples": {"models": page.answers.models, "prompts": page.answers.prompts},
        "settings": {
            "labels": page.settings.labels,
            "keys": page.settings.keys,
            "values": page.settings.values,
            "second": page.settings.second,
        },
    }


def _json(value: Any) -> str:
    """JSON that ends no script element, whatever its texts hold."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    """What a content security policy knows the page's own script by: no other one runs."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
