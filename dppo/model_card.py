"""The card of an exported model, in the format of the Hugging Face Hub, filled from the run that made it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import yaml

from dppo.config import shown
from dppo.dotted import leaves
from dppo.errors import UserError, first_line
from dppo.evaluation.runs import Run
from dppo.hub import local_folder
from dppo.methods import docstring

Who = Literal["policy", "reference"]
_MEAN = ("value", "ci_low", "ci_high")
_PRECISION = "95 % intervals over prompts"


def model_card(run: Run, who: Who, name: str) -> str:
    """README.md of the policy or the SFT model (``reference``) of a complete run.

    Licence and languages are not known to a run: the licence is said to be unknown, for the user to replace. Raises
    UserError if what the run recorded is not what a run writes.
    """
    try:
        return _card(run, who, name)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{run.path}: its result.json or config.yaml is not as a run writes it ({type(error).__name__}: "
            f"{first_line(error)}); run it again"
        ) from None


def _card(run: Run, who: Who, name: str) -> str:
    phases = _phases(run.settings) if who == "policy" else []
    sections = [
        _front_matter(run, who, name, [loss for _, loss, _ in phases]),
        f"# {_plain(name)}\n\n{_summary(run, who, [loss for _, loss, _ in phases])}",
        f"## Results\n\n{_results(run, who)}",
        *(f"## {_heading(phase, loss, len(phases))}\n\n{_method(loss)}" for phase, loss, _ in phases),
        f"## Data\n\n{_data(run, who)}",
        f"## Training\n\n{_training(run, phases)}",
        f"## Use\n\n{_USE}",
        f"## Made by\n\n{_made_by(run)}",
    ]
    return "\n\n".join(sections) + "\n"


_USE = """The folder holds weights, tokenizer, chat template and generation settings:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
chat = [{"role": "user", "content": "Hello!"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt)[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```"""


# --- parts of the text ------------------------------------------------------------------------------------------------


def _front_matter(run: Run, who: Who, name: str, losses: Sequence[Mapping[str, Any]]) -> str:
    model, data = run.settings.get("model") or {}, run.settings.get("dataset") or {}
    base = _repository(model.get("name_or_path"))
    sources = [_repository(value) for key, value in data.items() if key.endswith("path")]
    datasets = list(dict.fromkeys(source for source in sources if source is not None))
    front: dict[str, Any] = {
        **({"base_model": base} if base else {}),
        **({"datasets": datasets} if datasets else {}),
        "library_name": "transformers",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["dppo", "sft", *["preference-optimisation"] * bool(losses), *map(_name, losses)])),
    }
    if who == "policy":
        rate = run.result["win_rate"]
        task = {"type": "text-generation", "name": "Text Generation"}
        title = f"{_class(data)}, {run.result['split']}, scored by {_class(run.settings.get('reward'))}"
        source = {"type": datasets[0] if datasets else _class(data).lower(), "name": title}
        told = f"win rate against the SFT model, ties 1/2 (n = {rate['n']}, 95 % interval {_bounds(rate)})"
        metric = {"type": "win_rate", "value": round(rate["value"], 4), "name": told}
        front["model-index"] = [{"name": name, "results": [{"task": task, "dataset": source, "metrics": [metric]}]}]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)}---"


def _summary(run: Run, who: Who, losses: Sequence[Mapping[str, Any]]) -> str:
    model = run.settings.get("model") or {}
    base = next((f"`{_plain(str(model[key]))}`" for key in ("name_or_path", "file") if model.get(key)), _class(model))
    trained = (run.settings.get("sft") or {}).get("train") is not None and run.settings.get("init_from") is None
    tuned = "fine-tuned on demonstrations (SFT)" if trained else "without further fine-tuning"
    if who == "reference":
        return f"{base}, {tuned}: the reference model of the run below, by dppo."
    if not losses:
        return f"{base}, {tuned}, by dppo; no preference training."
    names = ", then ".join(f"`{_name(loss)}`" for loss in losses)
    return f"{base}, {tuned}, then trained on preferences with {names}, by dppo."


def _results(run: Run, who: Who) -> str:
    found, reward = run.result, _class(run.settings.get("reward"))
    rate, means, length = found["win_rate"], found["reward"], found["length"]
    rows: list[tuple[str, ...]] = [("", "policy", "SFT model")]
    rows.append(("win rate against the SFT model, ties 1/2", _interval(rate), "0.5 by definition"))
    strict = {key: rate[name] for key, name in zip(_MEAN, ("strict", "strict_ci_low", "strict_ci_high"), strict=True)}
    rows.append(("win rate, ties lose", _interval(strict), "0 by definition"))
    rows.append(("mean reward", _interval(means["policy"]), _interval(means["reference"])))
    rows.append(("reward gain", _interval(means["delta"], "+"), ""))
    share = means["negative_share"]
    rows.append(("negative rewards", f"{share['policy']:.1%}", f"{share['reference']:.1%}"))
    for key, title, form in (("tokens", "answer tokens", ".1f"), ("end_of_turn_rate", "ended by itself", ".1%")):
        rows.append((title, *(f"{length[one][key]:{form}}" for one in ("policy", "reference"))))
    kl = found["kl"]
    told = f"{kl['nats_per_token']:.4f} nats a token, {kl['nats_per_answer']:.3f} an answer (n = {kl['n_answers']})"
    rows.append(("KL to the SFT model, on own answers", told, "0"))
    answers = "Greedy answers" if run.decoding == "greedy" else f"Answers, {run.decoding},"
    lead = (
        f"{answers} to {rate['n']:,} {found['split']} prompts ({rate['wins']:,} won, {rate['ties']:,} tied), "
        f"scored by `{reward}`; {_PRECISION}. It is no human judgement."
    )
    lead += _of_the_reward(found)
    if who == "reference":
        lead = f"This model is the column on the right. {lead}"
    return f"{lead}\n\n{_table(rows)}"


def _of_the_reward(found: Mapping[str, Any]) -> str:
    """What the run knows of the reward that scored its answers."""
    told = ""
    if (judge := found.get("judge")) and judge["position_consistency"] is not None:
        told += (
            f" The judge gave the same verdict in both orders on {judge['position_consistency']:.1%} of "
            f"{judge['n_read']:,} pairs; {judge['unparsable_share']:.1%} of its replies could not be read."
        )
    for split, measured in (found.get("reward_model") or {"splits": {}})["splits"].items():
        told += (
            f" The reward model, trained by the same run, ranks {_interval(measured['reward_model'])} of "
            f"{measured['n_pairs']:,} {split} pairs right (prompts: {measured['n_prompts']:,}; more characters: "
            f"{_interval(measured['length'])})."
        )
    return told


def _heading(phase: str, loss: Mapping[str, Any], n: int) -> str:
    return f"Method: {_name(loss)}" if n == 1 else f"Method of phase {phase}: {_name(loss)}"


def _method(loss: Mapping[str, Any]) -> str:
    cls = _located(loss)
    if cls is None:
        return f"`{loss.get('_target_')}`"
    found = docstring(cls.__doc__)
    parts = [found.title.replace("``", "`")]
    if "Formula" in found.facts:
        parts.append(f"```text\n{found.facts['Formula']}\n```")
    if "Paper" in found.facts:
        parts.append(f"Paper: {found.facts['Paper']}")
    if base := _located(loss.get("base")):
        parts.append(f"Base: `{getattr(base, 'name', base.__name__)}`")
        base_facts = docstring(base.__doc__).facts
        if "Formula" in base_facts:
            parts.append(f"```text\n{base_facts['Formula']}\n```")
    return "\n\n".join(parts)


def _data(run: Run, who: Who) -> str:
    data = run.settings.get("dataset") or {}
    rows: list[Sequence[str]] = [("stage", "examples", "optimiser steps")]
    if who == "policy":
        for phase, counts in (run.result.get("training") or {}).items():
            rows.append((f"preferences, phase {phase}", f"{counts['n_examples']:,}", f"{counts['steps']:,}"))
    sft = (run.settings.get("sft") or {}).get("train") or {}
    if sft:
        asked = "all" if sft.get("n_examples") is None else f"at most {sft['n_examples']:,}"
        steps = f"{sft['steps']:,}" if sft.get("steps") else f"{sft.get('epochs')} epochs"
        rows.insert(1, ("demonstrations (SFT)", asked, steps))
    sources = _pairs((key, value) for key, value in leaves(data).items() if key != "_target_" and value is not None)
    told = f"`{_class(data)}`: trained on its training split, evaluated on its {run.result['split']} split."
    if rounds := run.result.get("on_policy"):
        source, ranker = _class(data.get("source")), _class(data.get("ranker") or run.settings.get("reward"))
        told = (
            f"Preferences are the model's own answers to prompts of `{source}`, ranked by `{ranker}`: "
            + "; ".join(
                f"{name.replace('_', ' ')}, {counts['n_examples']:,} of {counts['n_prompts']:,} prompts"
                for name, counts in rounds.items()
            )
            + f". Evaluated on the {run.result['split']} split of `{source}`."
        )
    return f"{told}\n\n{_table(rows)}\n\n{sources}"


def _training(run: Run, phases: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> str:
    parts = []
    if sft := (run.settings.get("sft") or {}).get("train"):
        parts.append(f"SFT, seed {run.settings['sft'].get('seed')}:\n\n{_pairs(leaves(sft).items())}")
    for phase, loss, train in phases:
        keys = [*((f"loss.{key}", value) for key, value in leaves(loss).items()), *leaves(train).items()]
        parts.append(f"Phase {phase}, seed {run.seed}:\n\n{_pairs(keys)}")
    return "\n\n".join(parts) or "None."


def _made_by(run: Run) -> str:
    parts = [f"```sh\n{run.result['command']}\n```"]
    try:
        versions = json.loads((run.path / "versions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return parts[0]
    return "\n\n".join([*parts, _pairs((key, value) for key, value in versions.items() if value not in (None, []))])


# --- small parts ------------------------------------------------------------------------------------------------------


def _phases(settings: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(name, loss, train) of each preference phase of a run's configuration."""
    phases = settings.get("phases") or {}
    if not phases and settings.get("loss"):
        phases = {"main": settings}
    return [(str(name), phase["loss"], phase.get("train") or {}) for name, phase in phases.items()]


def _located(part: object) -> type[Any] | None:
    """The class of a loss of this package; None for one of another."""
    target = str(part.get("_target_", "")) if isinstance(part, Mapping) else ""
    if not target.startswith("dppo.losses."):
        return None
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    return found if isinstance(found, type) else None


def _name(loss: Mapping[str, Any]) -> str:
    return str(getattr(_located(loss), "name", _class(loss).lower()))


def _class(part: object) -> str:
    target = part.get("_target_") if isinstance(part, Mapping) else None
    return str(target).rpartition(".")[2] if target else "unknown"


def _repository(value: object) -> str | None:
    """A repository of the Hub; None for a local path, which says nothing elsewhere."""
    if not isinstance(value, str):
        return None
    try:
        return value if local_folder(value, "path") is None else None
    except UserError:
        return None


def _bounds(found: Mapping[str, float]) -> str:
    return f"{found['ci_low']:.3f} to {found['ci_high']:.3f}"


def _interval(found: Mapping[str, float], sign: str = "") -> str:
    value, low, high = (found[key] for key in _MEAN)
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(_plain, row))} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def _pairs(items: Iterable[tuple[str, Any]]) -> str:
    rows = [f"| `{_plain(str(key))}` | `{_plain(shown(value))}` |" for key, value in items]
    return "\n".join(["| key | value |", "|---|---|", *rows])


def _plain(text: str) -> str:
    """Text within a line of Markdown: a path or a name can't end a cell, a span or a line."""
    return " ".join(text.split()).replace("|", r"\|").replace("`", "'")
