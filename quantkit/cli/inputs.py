"""What the commands give to models: texts, devices and batches, each refused in one line where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.data import packed_text, self_sampled
from quantkit.core.errors import CalibrationError, ModelError
from quantkit.core.text import read_text


def text_of(file: Path) -> str:
    """What a text file holds."""
    return read_text(file, 2**32, CalibrationError)


def device_called(name: str) -> torch.device:
    """The device of this name, which is there."""
    try:
        return torch.empty(0, dtype=torch.float32, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ModelError(f"--device {name}: {str(error).splitlines()[0]}") from None


def windows_for(net: Any, tokenizer: Any, text: str) -> list[Any]:
    """Calibration batches of a text. Encoder-decoders read it on both sides."""
    if tokenizer is None:
        raise CalibrationError(f"{type(net).__name__} comes without a tokenizer: quantize it in Python, with batches")
    return [batch_of(net, ids.to(net.device)) for ids in packed_text([text], tokenizer)]


def writes_text(net: Any) -> bool:
    """Whether a model of transformers is a causal language model."""
    return getattr(net, "can_generate", lambda: False)() and not net.config.is_encoder_decoder


def batch_of(net: Any, ids: torch.Tensor) -> Any:
    """Tokens as a model takes them."""
    return {"input_ids": ids, "decoder_input_ids": ids} if net.config.is_encoder_decoder else ids


def example_for(net: Any) -> Any:
    """A short text to look at a model with: its own where it can write one, and random otherwise."""
    if writes_text(net):
        return self_sampled(net, sequences=1, length=16, progress=False)[0]
    vocabulary = getattr(net.config, "vocab_size", None)
    if vocabulary is None:
        raise CalibrationError(f"{type(net).__name__} reads no text: use quantkit.discover(model, batch) in Python")
    random = torch.Generator().manual_seed(0)
    return batch_of(net, torch.randint(vocabulary, (1, 16), generator=random, dtype=torch.int64, device="cpu"))
