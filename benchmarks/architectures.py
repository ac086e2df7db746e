"""Every kind of model that transformers has, and some of diffusers, tiny and random: is each right, or refused with advice that
works?

    python benchmarks/architectures.py [--only PATTERN ...] [--every N] [--jobs N] [--name NAME]

A configuration is made small by the names of its numbers, and a batch by what the model's forward takes. Models for which
that does not run are listed as such: nothing was learned of them. For all others: the function is preserved by
``scheme=None``; W8A8 ends as far from the float model as its layers lead to expect; saved and loaded, and by
``from_pretrained``, it gives the same bits.
Exit status 1 if a row is wrong.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import multiprocessing
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import diffusion
import torch
import transformers
from common import record
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import quantkit
from quantkit.discovery.equivalence import relative_error, run_alike

TASKS = (
    "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "CTC",
    "SPEECH_SEQ_2_SEQ", "AUDIO_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
)  # fmt: skip
SMALL: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_or_config_json_file)?|bos_.*vocab.*", 128),
    (r"num_hidden_layers|n_layers?|num_layers|.*coder_layers|num_.*coder_layers|num_blocks|depth", 2),
    (r"num_key_value_heads|num_kv_heads|n_head_kv", 2),
    (r".*attention_heads|n_heads?|num_heads", 4),
    (r"head_dim|d_kv|qk_nope_head_dim|v_head_dim|attention_head_size", 16),
    (r"qk_rope_head_dim", 16),
    (r"rotary_dim", 8),
    (r"num_queries", 10),
    (r"(mamba_)?chunk_size", 8),
    (r"q_lora_rank|kv_lora_rank", 32),
    (r"hidden_size|d_model|n_embd|embed_dim|embedding_size|dim|word_embed_proj_dim|projection_dim|conv_dim|hidden_dim", 64),
    (r".*intermediate_size|.*ffn_dim|d_ff|n_inner|ffn_hidden_size|mlp_dim|moe_.*size", 128),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|num_selected_experts", 2),
    (r"n_shared_experts|n_group|topk_group|num_expert_groups?|moe_num_shared_experts", 1),
    (r"max_position_embeddings|n_positions|max_.*positions", 128),
    (r"image_size|img_size", 64),
    (r"patch_size", 8),
    (r"num_labels", 5),
)
"""What numbers of a configuration become, by their names; the first that matches counts."""
IDS = re.compile(r".*_token_id|.*_token_index|.*_idx|.*_id")
SECONDS = 600
MAX_PARAMETERS = 60e6
SHOWN = ("folding", "sqnr_db", "expected_db", "share", "seconds")


def candidates() -> Iterator[tuple[str, str]]:
    """Pairs of a task and the name of a model class."""
    seen: set[str] = set()
    for task in TASKS:
        for names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).values():
            for name in (names,) if isinstance(names, str) else names:
                if name not in seen:
                    seen.add(name)
                    yield task, name
    yield from (("DIFFUSION", name) for name in diffusion.MODELS)
    for names in modeling_auto.MODEL_MAPPING_NAMES.values():
        for name in (names,) if isinstance(names, str) else names:
            if name not in seen:
                seen.add(name)
                yield "MODEL", name


def small(cls: Any, **more: Any) -> Any:
    """A configuration of this class with small numbers."""
    plain = cls()
    values: dict[str, Any] = {}
    for name, value in plain.to_dict().items():
        if name == "pad_token_id" and value is None:
            values[name] = 0
        if isinstance(value, bool) or name in ("transformers_version", "model_type", "architectures"):
            continue
        if isinstance(value, int):
            known = next((number for pattern, number in SMALL if re.fullmatch(pattern, name)), None)
            if known is not None:
                values[name] = known
            elif IDS.fullmatch(name) and value >= 100:
                values[name] = 3
        elif name in ("depths", "block_sizes"):
            values[name] = [1] * len(value)
        elif name == "image_size" and isinstance(value, (list, tuple)):
            values[name] = [64] * len(value)
    kinds = list(dict.fromkeys(getattr(plain, "layer_types", None) or ()))
    if kinds and "num_hidden_layers" in values:
        values |= {"layer_types": (kinds * 2)[: max(2, len(kinds))], "num_hidden_layers": max(2, len(kinds))}
    if "kv_lora_rank" in values:  # every head has keys of its own, made from the few
        values["num_key_value_heads"] = values["num_attention_heads"]
    rope = getattr(plain, "rope_parameters", None) or getattr(plain, "rope_scaling", None) or {}
    if "mrope_section" in rope:  # of the pairs of channels of a head
        values["rope_parameters"] = rope | {"mrope_section": [2, 3, 3]}
    for name, sub in vars(plain).items():
        if isinstance(sub, transformers.PreTrainedConfig):
            values[name] = small(type(sub)).to_dict()
    accepted = inspect.signature(cls.__init__).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in accepted.values())
    return cls(**{k: v for k, v in (values | more).items() if takes_all or k in accepted})


def batch_for(model: Any) -> dict[str, Tensor]:
    """What the model is called on, by the names of what it takes."""
    random = torch.Generator().manual_seed(1)
    takes, config = inspect.signature(model.forward).parameters, model.config
    text = config.get_text_config()
    ids = torch.randint(4, min(getattr(text, "vocab_size", 128) or 128, 100), (2, 24), generator=random)
    if isinstance(end := getattr(text, "eos_token_id", None), int):
        ids[:, -1] = end  # where some classifiers read
    main = model.main_input_name
    batch: dict[str, Tensor] = {}
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", 32)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        channels = getattr(vision, "num_channels", 3)
        batch["pixel_values"] = torch.randn(2, channels, height, width, generator=random)
        if "input_ids" in takes and takes["input_ids"].default is not None:
            batch["input_ids"] = ids
    elif main == "input_features":
        bins = getattr(config, "num_mel_bins", getattr(config, "feature_size", getattr(config, "input_dim", 80)))
        batch["input_features"] = torch.randn(2, bins, 2 * getattr(config, "max_source_positions", 32), generator=random)
    elif main == "input_values":
        batch["input_values"] = torch.randn(2, 4000, generator=random)
    else:
        batch[main] = ids
    alone = hasattr(model, "classification_head")  # of an encoder and a decoder that read the same
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes and not alone:
        batch["decoder_input_ids"] = ids[:, :8].clone()
    return batch if main == "pixel_values" or "pixel_values" not in takes else with_image(model, batch, random)


def with_image(model: Any, batch: dict[str, Tensor], random: torch.Generator) -> dict[str, Tensor]:
    """``batch`` with an image in each row, if one is found that the model takes. It says how many tokens stand for it."""
    config = model.config
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    vision = getattr(config, "vision_config", None)
    if vision is None or token is None:
        return batch
    side = getattr(vision, "image_size", 32)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    image = {"pixel_values": torch.randn(2, getattr(vision, "num_channels", 3), height, width, generator=random)}
    for _ in range(2):
        try:
            run_alike(copy.deepcopy(model), batch | image)
            return batch | image
        except Exception as error:  # noqa: BLE001  of the model's code, which may raise anything
            features = re.search(r"features:? (\d+)", str(error))
            if features is None:
                break
            tokens = torch.full((2, int(features[1]) // 2), token)
            image["input_ids"] = torch.cat([tokens, batch["input_ids"]], 1)
    return batch


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError if what is inside takes longer: sounds of random lengths may be very long."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"the model itself takes more than {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def build(name: str) -> tuple[nn.Module, dict[str, Tensor], Any] | str:
    """A tiny model, a batch that it runs on and what it says; or why there is none."""
    torch.manual_seed(0)
    if name in diffusion.MODELS:
        import diffusers

        facts, made = diffusion.MODELS[name]
        model, batch = getattr(diffusers, name)(**facts).eval(), made()
        return model, batch, run_alike(model, batch)
    cls = getattr(transformers, name, None)
    if cls is None:
        return "not in this transformers"
    try:
        config = small(cls.config_class)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        if size > MAX_PARAMETERS:
            return f"no small configuration: {size / 1e6:.0f} million parameters"
        model = cls(config).eval()
        for parameter in model.parameters():  # weights large enough for every layer to matter
            if parameter.dim() >= 2 and parameter.numel() and parameter.is_floating_point():
                parameter.data.normal_(std=float(parameter.numel() / len(parameter)) ** -0.5)
        batch = batch_for(model)
        with at_most(60):
            wanted = run_alike(copy.deepcopy(model), batch)  # some write to their weights when they first run
    except Exception as error:  # noqa: BLE001  an automatic configuration need not make sense
        return f"no small configuration: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    if not wanted or not all(bool(t.isfinite().all()) for t in wanted):
        return "no finite floating-point output"
    return model, batch, wanted


def tried(name: str) -> dict[str, Any]:
    """The row of one class."""
    made = build(name)
    if isinstance(made, str):
        return {"status": "not tried", "why": made}
    model, batch, wanted = made
    try:
        return judged(model, batch, wanted)
    except quantkit.QuantkitError as error:
        return refused(name, error)


def refused(name: str, error: quantkit.QuantkitError) -> dict[str, Any]:
    """A row that ended in an error of ours: right only if what it advises works."""
    row = {"status": "wrong", "why": f"{type(error).__name__}: {error}"}
    advice = re.search(r"ignore=(\[[^\]]*\])", str(error))
    if isinstance(error, quantkit.ModelError) and "no linear" in str(error):
        return row | {"status": "refused"}
    if advice and "..." not in advice[1]:
        made = build(name)
        assert not isinstance(made, str)
        again = judged(*made, ignore=[part.strip(" '\"") for part in advice[1].strip("[]").split(",")])
        return row | {"status": "refused" if again["status"] == "right" else "wrong", "followed": again}
    return row


def judged(model: nn.Module, batch: Any, wanted: list[Tensor], **options: Any) -> dict[str, Any]:
    """Whether everything that is promised holds for this model."""
    row: dict[str, Any] = {"status": "right", "parameters": sum(p.numel() for p in model.parameters())}
    folded = quantkit.quantize(copy.deepcopy(model), scheme=None, calibration=[batch], progress=False, **options)
    row["folding"] = relative_error(wanted, run_alike(folded, batch))
    quantized = quantkit.quantize(copy.deepcopy(model), calibration=[batch], progress=False, **options)
    report = quantkit.report(quantized)
    row["int8"] = sum(layer.kind == "int8" for layer in report.layers)
    row["linears"] = len(report.layers)
    row["share"] = report.share([layer for layer in report.layers if layer.kind == "int8"])
    assert report.verification is not None
    row["sqnr_db"], row["expected_db"] = report.verification.sqnr_db, report.verification.expected_db
    got = run_alike(quantized, batch)
    faults = [] if row["folding"] <= 1e-3 else [f"folding changed the model by {row['folding']:.1e}"]
    with tempfile.TemporaryDirectory() as folder:
        ways = {"save and load": _saved} | (
            {} if type(model).__name__ in diffusion.MODELS else {"from_pretrained": _pretrained}
        )
        for how, through in ways.items():
            try:
                row[how] = relative_error(got, run_alike(through(quantized, Path(folder, how), model), batch))
            except quantkit.QuantkitError as refusal:
                row[how] = f"refused: {refusal}"
                continue
            if not row[how] <= 1e-6:
                if how == "save and load":
                    faults.append(f"save and load changed the model by {row[how]:.1e}")
                    continue
                lost = relative_error(wanted, run_alike(_pretrained(model, Path(folder, "float"), model), batch))
                if lost <= 1e-6:
                    faults.append(f"from_pretrained changed the model by {row[how]:.1e}")
                else:
                    row[how] = f"the float model does not survive it either: {lost:.1e}"
    return row | ({"status": "wrong", "why": "; ".join(faults)} if faults else {})


def _saved(model: Any, folder: Path, original: Any) -> Any:
    fresh = copy.deepcopy(original) if type(original).__name__ in diffusion.MODELS else None
    return quantkit.load(quantkit.save(model, folder), model=fresh)


def _pretrained(model: Any, folder: Path, original: Any) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def _work(name: str, answer: Any) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    start = time.perf_counter()
    try:
        answer.send(tried(name) | {"seconds": round(time.perf_counter() - start, 1)})
    except BaseException as error:  # noqa: BLE001  it is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        answer.send({"status": "wrong", "why": f"{type(error).__name__} at {where}: {str(error)[:300]}"})


def apart(names: Sequence[str], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """:func:`tried` for each name, in processes of their own, which may crash or hang; as they end."""
    context = multiprocessing.get_context("fork")  # which is safe without threads, and has imported everything
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(name, send))
            process.start()
            send.close()
            running[receive] = name, process, time.monotonic()
        for receive in wait(running, timeout=1):
            name, process, _ = running.pop(receive)
            try:
                row = receive.recv()
            except EOFError:
                process.join()
                row = {"status": "wrong", "why": f"the process ended with {process.exitcode}"}
            process.join()
            yield name, row
        for receive, (name, process, since) in list(running.items()):
            if time.monotonic() - since > SECONDS:
                process.kill()
                process.join()
                del running[receive]
                yield name, {"status": "wrong", "why": f"no answer within {SECONDS} s"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="globs over the names of classes")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th class")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time, of one thread each")
    parser.add_argument("--name", default="architectures", help="of the result")
    args = parser.parse_args()
    wanted = [(t, n) for t, n in candidates() if any(fnmatch(n, pattern) for pattern in args.only)][:: args.every]
    torch.set_num_threads(1)
    tried("LlamaModel")  # imports what every process needs
    tasks = {name: task for task, name in wanted}
    rows: list[dict[str, Any]] = []
    for name, found in apart(list(tasks), args.jobs):
        rows.append(row := {"model": name, "task": tasks[name], **found})
        facts = [f"{key} {row[key]:.3g}" for key in SHOWN if row.get(key) is not None]
        print(f"{row['status']:10} {name:45} {', '.join(facts)} {row.get('why', '')}", flush=True)
        record(args.name, sorted(rows, key=lambda row: list(tasks).index(row["model"])))
    counts = {status: sum(row["status"] == status for row in rows) for status in ("right", "refused", "wrong", "not tried")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    sys.exit(counts["wrong"] > 0)


if __name__ == "__main__":
    main()
