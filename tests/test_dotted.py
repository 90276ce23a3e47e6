from __future__ import annotations

from dppo.dotted import leaves, names

NESTED = {"loss": {"beta": 1, "base": {"nll": "mean"}}, "seeds": [0, 1], "phases": {}, "alpha": None}


def test_names_are_of_branches_and_leaves() -> None:
    assert names(NESTED) == ["loss", "loss.beta", "loss.base", "loss.base.nll", "seeds", "phases", "alpha"]


def test_leaves_keep_lists_empty_mappings_and_nothing() -> None:
    assert leaves(NESTED) == {
        "loss.beta": 1,
        "loss.base.nll": "mean",
        "seeds": [0, 1],
        "phases": {},
        "alpha": None,
    }
