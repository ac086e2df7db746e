"""How far a causal language model is from the floating-point model that it was made from.

Three measures on windows of text: the perplexity of each model; the KL divergence between what both predict for the next
token, at every position; and how often both have the same favourite. KL divergence sees a difference long before perplexity
does, since it looks at all probabilities and not only at that of the token which follows. The difference in log-likelihood
comes with the standard error of the paired difference, so that one can tell whether it is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import CalibrationError
from quantkit.core.progress import Progress, tracked
from quantkit.model.modules import call, evaluating


def windows_of(tokenizer: Any, text: str, length: int, count: int) -> Tensor:
    """The first ``count`` non-overlapping windows ``[count, length]`` of a text, without special tokens."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64, device="cpu")
    count = min(count, len(ids) // length)
    if not count:
        raise CalibrationError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    return ids[: count * length].view(count, length)


def logits_of(model: nn.Module, window: Tensor) -> Tensor:
    """Next-token logits ``[length, vocabulary]`` float32 of one window ``[length]``."""
    out = call(model, window[None])
    logits: Tensor = out.logits if hasattr(out, "logits") else out[0] if isinstance(out, tuple) else out
    return logits[0].float()


def compare(
    model: nn.Module, windows: Tensor, reference: nn.Module | Sequence[Tensor] | None = None, *, progress: Progress = None
) -> dict[str, float | int]:
    """Score a model on windows of text.

    Args:
        model: a causal language model.
        windows: token ids ``[n, length]``.
        reference: the float model, or its log-probabilities for each window (from :func:`log_probabilities`).
        progress: show progress; None decides by the terminal.

    Returns:
        ``perplexity`` over the tokens of each window but its first, and ``tokens``, the number of all. With a reference also
        ``reference_perplexity``; ``kl``, the mean of KL(reference || model) over all positions, in nats; ``top1``, the share of
        positions with the same most likely token; ``nll_difference``, the mean difference of negative log-likelihoods of a
        token, in nats; and ``nll_difference_se``, its standard error.
    """
    nll, base_nll, kl, top1 = [], [], [], []
    with evaluating(model):
        for index, window in enumerate(tracked(windows, "evaluating", progress, "window")):
            ours = logits_of(model, window).log_softmax(-1)
            nll.append(_nll(ours, window))
            if reference is None:
                continue
            base = reference[index].float() if not isinstance(reference, nn.Module) else log_probabilities(reference, window)
            base_nll.append(_nll(base, window))
            kl.append((base.exp() * (base - ours)).sum(-1).double().mean())
            top1.append((base.argmax(-1) == ours.argmax(-1)).double().mean())
    result: dict[str, float | int] = {"perplexity": float(torch.cat(nll).mean().exp()), "tokens": windows.numel()}
    if reference is not None:
        difference = torch.cat(nll) - torch.cat(base_nll)
        result |= {
            "reference_perplexity": float(torch.cat(base_nll).mean().exp()),
            "kl": float(torch.stack(kl).mean()),
            "top1": float(torch.stack(top1).mean()),
            "nll_difference": float(difference.mean()),
            "nll_difference_se": float(difference.std() / math.sqrt(len(difference))),
        }
    return result


def log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """Log-probabilities of the next token, ``[length, vocabulary]`` float32, at each position of one window ``[length]``."""
    with evaluating(model):
        return logits_of(model, window).log_softmax(-1)


def _nll(log_probs: Tensor, window: Tensor) -> Tensor:
    """Negative log-likelihoods ``[length - 1]`` float64 of the tokens that follow the first."""
    return -log_probs[:-1].gather(1, window[1:, None])[:, 0].double()
