"""Quantizing gives the bits that it gave when record.json was made, for every model, method and scheme in there.

A difference that is wanted goes into explained.json, as ``"model/method/scheme/what": {"reason": "...", "sha256": "..."}``.
There, *what* is ``state``, ``reference``, ``cpu`` or ``error`` as in the failure, and the digest is the new one (or null, where
there is none any more). It then has to be exactly that.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from digests import foreign
from pinned import run
from record import MODELS, combinations, tensors_of

import quantkit

HERE = Path(__file__).parent
RECORD: dict[str, Any] = json.loads((HERE / "record.json").read_text(encoding="utf-8"))
EXPLAINED: dict[str, dict[str, Any]] = json.loads((HERE / "explained.json").read_text(encoding="utf-8"))
WHAT = ("error", "state", "reference", "cpu")
OUTPUTS = {"reference": "outputs of the backend 'reference'", "cpu": "outputs of the backend 'cpu'"}
MOST_NAMES = 12
FIRST = "llama"
"""The model of the suite, a minute on one core; ``make bits`` looks at the others too."""


def differences(model: str, wanted: dict[str, Any], got: dict[str, Any], explained: dict[str, dict[str, Any]]) -> list[str]:
    """Everything in which two records of one model differ, one line each, but for what is explained."""
    lines = []
    for what in ("state", "logits"):
        if wanted["float"][what] != got["float"][what]:
            why = (
                "its weights are others, before quantkit saw it" if what == "state" else "and so does all that follows from it"
            )
            lines.append(f"{model}: the float model differs in its {what}: {why}")
    for key in sorted(wanted["results"].keys() | got["results"].keys()):
        old, new = (record["results"].get(key, {}) for record in (wanted, got))
        for what in WHAT:
            name = f"{model}/{key}/{what}"
            entry = explained.get(name)
            right = old.get(what) if entry is None else entry["sha256"]
            if new.get(what) == right:
                continue
            source = "record.json" if entry is None else "explained.json"
            line = f"{name}: {new.get(what)} in place of {right}, which {source} has"
            if what == "state" and old and new:
                line += f"; buffers that differ: {_named(tensors_of(wanted, key), tensors_of(got, key))}"
            elif what in OUTPUTS:
                line += f"; {OUTPUTS[what]} differ"
            lines.append(line)
    return lines


def _named(old: dict[str, str], new: dict[str, str]) -> str:
    """Names of the tensors that differ, by the module that holds them."""
    found: dict[str, list[str]] = {}
    for name in sorted(name for name in old | new if old.get(name) != new.get(name)):
        mark = "+" if name not in old else "-" if name not in new else ""
        module, _, leaf = name.rpartition(".")
        found.setdefault(module, []).append(mark + leaf)
    texts = [f"{module}: {' '.join(leaves)}" for module, leaves in found.items()]
    more = [f"and {len(texts) - MOST_NAMES} modules more"] if len(texts) > MOST_NAMES else []
    return "; ".join(texts[:MOST_NAMES] + more) or "none of those that the record lists"


@pytest.mark.parametrize("model", MODELS if os.environ.get("QUANTKIT_BITS") == "all" else [FIRST])
def test_same_bits(model: str, tmp_path: Path) -> None:
    got, said = run("record.py", Path(quantkit.__file__).parent, tmp_path / "record.json", "--models", model)
    wanted = RECORD["models"][model]
    lines = differences(model, wanted, got["models"][model], EXPLAINED)
    if not lines:
        return
    versions = [
        f"{name} is {got['made_with'][name]} here and was {RECORD['made_with'][name]} in the record"
        for name in ("torch", "transformers", "capability")
        if got["made_with"][name] != RECORD["made_with"][name]
    ]
    crashes = [said] if "Traceback" in said else []
    again = f"python tests/bits/record.py --models {model} --only 'METHOD/SCHEME' runs one of them"
    head = [f"{len(lines)} differences from the record of {RECORD['made_with']['commit']}; {again}"]
    pytest.fail("\n".join(foreign(RECORD["arithmetic"], got["arithmetic"]) + versions + head + lines + crashes), pytrace=False)


def test_the_record_holds_every_combination() -> None:
    wanted = {f"{method}/{scheme}" for method, scheme in combinations()}
    assert {name: set(record["results"]) for name, record in RECORD["models"].items()} == dict.fromkeys(MODELS, wanted)


def test_explanations_name_what_exists() -> None:
    known = {f"{m}/{key}/{what}" for m, record in RECORD["models"].items() for key in record["results"] for what in WHAT}
    assert set(EXPLAINED) <= known
    assert all(set(entry) == {"reason", "sha256"} and entry["reason"] for entry in EXPLAINED.values())


def test_a_difference_is_named_and_may_be_explained() -> None:
    def record(state: str, tensors: str, cpu: str) -> dict[str, Any]:
        result = {"state": state, "tensors": tensors, "reference": "r", "cpu": cpu}
        return {"float": {"state": "s", "logits": "l"}, "names": ["up.bias", "up.weight"], "results": {"rtn/w8a8": result}}

    old, new = record("1", "aaaabbbb", "c"), record("2", "aaaacccc", "d")
    assert differences("m", old, old, {}) == []
    state, cpu = differences("m", old, new, {})
    assert state == "m/rtn/w8a8/state: 2 in place of 1, which record.json has; buffers that differ: up: weight"
    assert cpu == "m/rtn/w8a8/cpu: d in place of c, which record.json has; outputs of the backend 'cpu' differ"
    why = {"m/rtn/w8a8/state": {"reason": "a test", "sha256": "2"}}
    assert differences("m", old, new, why) == [cpu]
    assert [line.split(":")[0] for line in differences("m", old, old, why)] == ["m/rtn/w8a8/state"]  # it holds no longer
    refused = record("1", "aaaabbbb", "c") | {"results": {"rtn/w8a8": {"error": "MethodError"}}}
    assert [line.split(":")[0].rpartition("/")[2] for line in differences("m", old, refused, {})] == list(WHAT)
