"""``python -m dppo.methods [NAME ...]``: every loss and penalty as it is, from its docstring and its YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import yaml

from dppo.command_line import Parser, command
from dppo.config import CONF_DIR, SWEEPS_DIR
from dppo.errors import UserError
from dppo.losses import pairwise, penalised, penalties, ranked, unpaired

# The facts of a docstring, in the order of the page; `dppo.losses` says what they mean.
LABELS = (
    "Paper",
    "Formula",
    "Length",
    "At policy = reference",
    "Bounds",
    "Elsewhere",
    "Rewards",
    "Metrics",
    "State",
)
_NOTATION = (pairwise, ranked, unpaired, penalised, penalties)
_SHARED = (pairwise.LogitLoss, pairwise.SftWeighted, penalised.PenalisedLoss)
_WIDTH = 100


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's error."""
    parser = Parser(prog="python -m dppo.methods", description=__doc__.replace("``", ""))
    parser.add_argument("names", nargs="*", metavar="NAME", help="an option of group loss or penalty (default: all)")
    parser.add_argument("--markdown", action="store_true", help="as docs/methods.md")
    arguments = parser.parse_args(argv)
    known = {option.name: option for option in options()}
    for name in arguments.names:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"{name}: there is no such method.{hint} Known: {', '.join(known)}")
    if arguments.markdown and not arguments.names:
        lines = page()
    else:
        show = markdown if arguments.markdown else plain
        lines = [line for name in arguments.names or known for line in show(known[name])]
    print("\n".join(lines).rstrip("\n"))
    return 0


# --- what is known about an option --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A key of a method as a user types it, its default as written, and the comment beside it."""

    name: str
    default: str
    comment: str


@dataclass(frozen=True)
class Docstring:
    """A docstring in parts: its first line, the labelled facts, and the paragraphs without a label."""

    title: str
    facts: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """An option of group ``loss`` or ``penalty``; ``cls`` is None for ``none``, which trains nothing."""

    group: str
    name: str
    cls: type[Any] | None
    keys: tuple[Key, ...]
    docstring: Docstring

    @cached_property
    def default(self) -> Any:
        """The loss or penalty with the defaults of its file."""
        assert self.cls is not None
        fields = {}
        for key in self.keys:
            nested = key.name in ("loss/base", "penalty")
            group = "penalty" if key.name == "penalty" else "loss"
            value = read(group, key.default).default if nested else yaml.safe_load(key.default)
            fields[re.split(r"[./]", key.name)[-1]] = value
        return self.cls(**fields)

    @property
    def data(self) -> str:
        """What an example must hold."""
        if self.cls is None:
            return "-"
        shape, roles = str(self.default.trains_on), self.default.uses_roles
        if shape != "pairs":
            return f"{shape} answers or pairs"
        if "rejected" not in roles:
            return "pairs, of which the chosen answer"
        return "pairs and y_gen" if "generated" in roles else "pairs"

    @property
    def reference(self) -> str:
        """Whether the reference's log-probs are needed: yes, no, or as the base says."""
        if self.cls is None:
            return "-"
        needed = {self.default.uses_reference}
        if issubclass(self.cls, penalised.PenalisedLoss):
            needed.add(dataclasses.replace(self.default, base=read("loss", "simpo").default).uses_reference)
        return "by base" if len(needed) > 1 else "yes" if needed == {True} else "no"

    @property
    def statistics(self) -> str:
        """What is gathered before a step, and over which examples; empty for nothing."""
        if self.cls is None or not self.default.uses_statistics:
            return ""
        scope = self.default.statistics_scope.replace("_", " ")
        return f"statistics of the {' and '.join(self.default.statistics_roles)} answers of the {scope}"


def options() -> list[Option]:
    """Every option of groups ``loss`` and ``penalty``, in the order of their names."""
    return [
        read(group, path.stem) for group in ("loss", "penalty") for path in sorted((CONF_DIR / group).glob("*.yaml"))
    ]


@cache
def read(group: str, name: str) -> Option:
    """One option, from its file and the class that this names."""
    text = (CONF_DIR / group / f"{name}.yaml").read_text(encoding="utf-8")
    if found := re.search(r"^  - base@_here_: (\w+)$", text, re.MULTILINE):
        text = (CONF_DIR / group / "base" / f"{found[1]}.yaml").read_text(encoding="utf-8")
    target = re.search(r"^_target_: ([\w.]+)\.(\w+)$", text, re.MULTILINE)
    if target is None:
        return Option(group, name, None, (), Docstring(text.splitlines()[0].lstrip("# "), {}, ()))
    cls = getattr(importlib.import_module(target[1]), target[2])
    return Option(group, name, cls, tuple(_keys(group, text)), docstring(cls.__doc__))


def _keys(group: str, text: str) -> Iterator[Key]:
    if found := re.search(r"^  - base: (\w+) +# (.*)$", text, re.MULTILINE):
        yield Key("loss/base", found[1], found[2])
    for name, default, comment in re.findall(r"^(\w+): ([^#\n]+?) *(?:# (.*))?$", text, re.MULTILINE):
        if searched := re.fullmatch(r"\$\{oc\.select:(\w+),(.*)\}", default):
            yield Key(searched[1], searched[2], comment)
        elif default == "${penalty}":
            pattern = r"^  - override /penalty@_global_\.penalty: (\w+)$"
            own = re.search(pattern, text, re.MULTILINE)
            root = re.search(r"^  - penalty: (\w+)$", (CONF_DIR / "config.yaml").read_text(), re.MULTILINE)
            assert root is not None
            yield Key("penalty", (own or root)[1], comment)
        elif name != "_target_":
            yield Key(f"{group}.{name}", default, comment)


def docstring(text: str | None) -> Docstring:
    """Take a docstring apart."""
    title, _, rest = inspect.cleandoc(text or "").partition("\n")
    facts: dict[str, str] = {}
    notes = []
    for paragraph in re.split(r"\n\n+", rest.strip("\n")):
        parts = re.split(rf"^({'|'.join(LABELS)}):\s", paragraph, flags=re.MULTILINE)
        if parts[0].strip():
            notes.append(_joined(parts[0]))
        facts |= {
            label: inspect.cleandoc(fact) if label == "Formula" else _joined(fact)
            for label, fact in zip(parts[1::2], parts[2::2], strict=True)
        }
    return Docstring(title, facts, tuple(notes))


def _joined(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Grid:
    """A search grid: the sweep's name, its values as a user would type them, and what its file says of them."""

    name: str
    words: tuple[str, ...]
    comment: str


def grid(name: str) -> Grid | None:
    """The search grid of a loss, or None."""
    path = SWEEPS_DIR / "sweep" / f"{name}_grid.yaml"
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    head = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    return Grid(
        path.stem,
        tuple(f"{key}={values}" for key, values in params.items()),
        " ".join(line for line in head if not line.startswith(("@package", "python -m"))),
    )


def _facts(option: Option) -> Iterator[tuple[str, str]]:
    """What is said of an option besides title, formula, notes, keys and grid."""
    facts = option.docstring.facts
    if "Paper" in facts:
        yield "paper", facts["Paper"]
    if option.cls is not None and option.group == "loss":
        parts = [option.data, f"reference: {option.reference}", option.statistics]
        yield "needs", "; ".join(part for part in parts if part)
        if option.reference == "no":
            facts = {**facts, "At policy = reference": "no constant, the reference is not in it"}
    for label in LABELS:
        if label in facts and label not in ("Paper", "Formula"):
            yield label[0].lower() + label[1:], facts[label]


# --- as text and as Markdown ---------------------------------------------------------------------------------------


def plain(option: Option) -> list[str]:
    """An option for a terminal."""
    lines = [f"{option.group}={option.name}: {option.docstring.title}".replace("``", ""), ""]
    if "Formula" in option.docstring.facts:
        lines += [*(f"    {line}" for line in option.docstring.facts["Formula"].splitlines()), ""]
    entries = list(_facts(option))
    if found := grid(option.name):
        entries.append(("grid", f"{' '.join(found.words)} (-m +sweep={found.name}). {found.comment}"))
    for label, text in entries:
        lines += textwrap.wrap(
            f"{label}: {text}".replace("``", ""), _WIDTH, initial_indent="  ", subsequent_indent="      "
        )
    for note in option.docstring.notes:
        lines += ["", *textwrap.wrap(note.replace("``", ""), _WIDTH, initial_indent="  ", subsequent_indent="  ")]
    if option.keys:
        width = max(len(f"{key.name}={key.default}") for key in option.keys)
        lines += ["", *(f"  {f'{key.name}={key.default}':{width}}  {key.comment}".rstrip() for key in option.keys)]
    return [*lines, ""]


def markdown(option: Option) -> list[str]:
    """An option as a section of the page."""
    lines = [f"## {option.group}={option.name}", "", _code(option.docstring.title), ""]
    if "Formula" in option.docstring.facts:
        lines += ["```text", *option.docstring.facts["Formula"].splitlines(), "```", ""]
    if facts := [f"- {label}: {_code(text)}" for label, text in _facts(option)]:
        lines += [*facts, ""]
    for note in option.docstring.notes:
        lines += [_code(note), ""]
    if option.keys:
        lines += ["| key | default | |", "|---|---|---|"]
        lines += [f"| `{key.name}` | `{key.default}` | {_cell(key.comment)} |" for key in option.keys]
        lines.append("")
    if found := grid(option.name):
        words = " ".join(f"`{word}`" for word in found.words)
        lines += [f"Search grid, `python -m dppo -m +sweep={found.name}`: {words}. {found.comment}", ""]
    return lines


def page() -> list[str]:
    """The page of all methods."""
    known = options()
    lines = [
        "# The methods",
        "",
        "Written by `python -m dppo.methods --markdown` from the docstrings in `dppo/losses`, and from `conf` and "
        "`sweeps`. One method in the terminal: `python -m dppo.methods dpo`.",
        "",
        "| loss | data | reference | normalised by length |",
        "|---|---|---|---|",
    ]
    for option in known:
        if option.group == "loss":
            length = _cell(option.docstring.facts.get("Length", "-"))
            link = f"[`{option.name}`](#loss{option.name})"
            lines.append(f"| {link} | {option.data} | {option.reference} | {length} |")
    lines += ["", "## Notation", ""]
    lines += [f"- `{module.__name__}`: {_code(_joined(module.__doc__ or ''))}" for module in _NOTATION]
    lines += ["", "## What several share", ""]
    for cls in _SHARED:
        names = ", ".join(option.name for option in known if option.cls and issubclass(option.cls, cls))
        lines.append(f"- `{cls.__name__}` ({names}): {_code(_joined(cls.__doc__ or ''))}")
    lines.append("")
    return [*lines, *(line for option in known for line in markdown(option))]


def _code(text: str) -> str:
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return _code(text).replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
