"""A part of ``benchmarks/architectures.py``: kinds of models of transformers, tiny and random, are right from end to end.

Those are here that showed a fault, and one of each kind that has a form of its own.
"""

from __future__ import annotations

import pytest
from architectures import tried

KINDS = (
    "DogeForCausalLM",
    "FunnelForMaskedLM",  # initializes whatever is called a linear
    "Llama4ForCausalLM",  # experts joined in a form of their own
    "Molmo2TextModel",  # files join three weights in one
    "PaliGemmaForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration",  # experts in a part of the model, whose names are not those of the files
    "RwkvForCausalLM",  # writes to its weights in its forward
    "T5ForConditionalGeneration",  # reads the dtype of a weight
    "ViTForImageClassification",
    "Wav2Vec2ForCTC",  # weights that are computed from others
)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_right(name: str) -> None:
    row = tried(name)
    assert row["status"] == "right", row
    assert row["int8"]
    assert row["sqnr_db"] >= row["expected_db"] - 3, row
