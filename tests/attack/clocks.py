"""Small inputs of strangers that could take for ever or fill the memory: recipes, expressions, configurations, with a clock."""

from __future__ import annotations

import functools
import json
import logging
import random
import tempfile
from pathlib import Path
from typing import Any

import isolated
from helpers import llama, quantized
from mutations import mutated, sign
from torch import nn

import quantkit
from quantkit import QuantkitError, Recipe
from quantkit.core.text import LONGEST
from quantkit.integrations.compressed.layout import METHOD, parse

OUTCOMES = ("refused", "taken")
PIECES = (
    ".", "a", r"\w", "[a-z]", "(a|a)", "(.|.|m)", r"(\w+)", "(?=.*)", "(?:)", "model", r"\.", "(a(b(c)))", "x{1,50}",
    ".?", ".*", ".+", "*", "+", "?", "{2}", "{1000}", "{1,1000}", "|", r"\1", "(", ")", "[", "(?P<n>.)", "(?i)", "^", "$",
)  # fmt: skip
YAML = (
    "method: rtn\n", "method: [smoothquant, gptq]\n", "a: &a [x, x]\n", "b: &b [*a, *a, *a]\n", "- ",
    "[", "{", "]", "}", "!!python/object:os.system ", "!!binary ", "seed: ", "1e999\n", "0x" + "f" * 1000 + "\n",
    "scheme: w8a8\n", "? ", ": ", "|\n", "\t", "---\n", "...\n", "%YAML 9.9\n", "'", '"', "\x00", "é", "\n", "  ", "null\n",
)  # fmt: skip


def attack(count: int, seed: int = 0) -> dict[str, Any]:
    """Try so many of them."""
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as place:
        base = quantkit.save(quantized(llama(num_hidden_layers=1), "rtn"), Path(place, "base"))
        return isolated.run_all(count, functools.partial(one, Path(place), (base / "config.json").read_text(), seed), OUTCOMES)


def one(place: Path, config: str, seed: int, case: int) -> str:
    dice = random.Random(f"{seed} {case}")
    try:
        (expression, recipe, configuration)[case % 3](place, config, dice)
    except QuantkitError as error:
        return "refused" if len(str(error)) <= 2 * LONGEST else f"a message of {len(str(error))} characters"
    return "taken"


def expression(place: Path, config: str, dice: random.Random) -> None:
    """As a target and as something to ignore, of a hundred layers."""
    text = "".join(dice.choice(PIECES) * dice.choice((1, 1, 1, 2, 30)) for _ in range(dice.randrange(1, 30)))
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear", f"re:{text}"],
        "weights": {**number, "strategy": "channel"},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    meaning = parse({"quant_method": METHOD, "config_groups": {"group_0": group}, "ignore": [f"re:{text}[XY]"]})
    linear = nn.Linear(1, 1)
    for i in range(100):
        meaning.scheme_of({f"model.layers.{i}.self_attn.q_proj": None}, linear)


def recipe(place: Path, config: str, dice: random.Random) -> None:
    file = place / f"recipe{dice.choice(('.yaml', '.json'))}"
    parts = [dice.choice(YAML) * dice.choice((1, 1, 1, 3, 2000)) for _ in range(dice.randrange(1, 12))]
    text = "".join(parts) if dice.random() < 0.7 else json.dumps(mutated({"method": [{"name": "rptq"}], "seed": 1}, dice))
    file.write_text(text, encoding="utf-8")
    Recipe.read(file)


def configuration(place: Path, config: str, dice: random.Random) -> None:
    """Of a checkpoint with one layer: what has numbers gets others, large ones above all."""
    base, body = place / "base", json.loads(config)
    for _ in range(dice.choice((1, 1, 2, 4))):
        key = dice.choice(sorted(body))
        large = isinstance(body[key], int) and dice.random() < 0.7
        body[key] = dice.choice((10**4, 10**5, 10**6, 10**9, 10**12, 10**30, -1)) if large else mutated(body[key], dice)
    (base / "config.json").write_text(json.dumps(body))
    sign(base, random.Random(1))
    quantkit.load(base)
