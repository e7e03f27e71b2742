"""The command line. Every verb imports what it needs when it is called, so that `--help` is quick.

A mistake of the user's ends with one message and exit code 2; with `--debug` the traceback is shown too. Words after the file
are overrides: `trimtab train ppo.yaml learning_rate=2e-5 seed=1`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from trimtab import __version__
from trimtab.errors import TrimtabError, typed

app = typer.Typer(
    name="trimtab",
    help="RLHF that one engineer can run, read and trust: SFT, reward models and PPO from one YAML file each.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing help in colour costs a third of a second, most of it Markdown's
    context_settings={"help_option_names": ["-h", "--help"]},
)

File = Annotated[Path, typer.Argument(help="a YAML or JSON file, one stage each")]
Words = Annotated[
    list[str] | None, typer.Argument(help="key=value words that win over the file", metavar="[KEY=VALUE]...")
]

_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    """Options of every command."""


@app.command(context_settings=_WORDS)
def train(
    file: File,
    words: Words = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the unfinished run in output_dir")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="resolve the config and stop")] = False,
) -> None:
    """Train the stage that FILE describes: pt, sft, rm or ppo."""
    if dry_run:
        _show_config(file, words)
        return
    from trimtab.pipeline import run_exp

    run_exp(file, overrides=words or [], resume=resume)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--output", help="where the three run folders go")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="seed of all three stages")] = 42,
    anew: Annotated[
        bool, typer.Option("--anew", help="run again what is finished (the old runs are kept aside)")
    ] = False,
) -> None:
    """Run SFT, reward model and PPO on a real model.

    On the example data, with a table of what each stage gained and the plots at the end. A second run skips what is done.
    """
    from trimtab.pipeline import run_demo

    run_demo(folder, seed=seed, anew=anew)


@app.command(context_settings=_WORDS)
def chat(file: File, words: Words = None) -> None:
    """Talk to the model that FILE describes."""
    from trimtab.config import load
    from trimtab.serve.terminal import chat as talk

    talk(load(file, words or []))


@app.command(context_settings=_WORDS)
def predict(file: File, words: Words = None) -> None:
    """Answer (stage rm: score) the evaluation set.

    Writes generated_predictions.jsonl and the match rates into output_dir.
    """
    from trimtab.config import load
    from trimtab.serve.predict import predict as answer

    answer(load(file, words or []))


@app.command(context_settings=_WORDS)
def export(file: File, words: Words = None) -> None:
    """Merge base and adapters into an ordinary model folder."""
    from trimtab.config import load
    from trimtab.serve.export import export as merge

    merge(load(file, words or []))


@app.command(context_settings=_WORDS)
def data(file: File, words: Words = None) -> None:
    """Show what the data of FILE becomes.

    Counts, dropped rows with file and row, lengths, duplicates, and rendered rows with their trained tokens marked.
    """
    from trimtab.config import load
    from trimtab.data.inspect import inspect
    from trimtab.train.assemble import load_text_side

    resolved = load(file, words or [])
    inspect(resolved, *load_text_side(resolved))


@app.command(context_settings=_WORDS)
def config(file: File, words: Words = None) -> None:
    """Show every value of FILE and where it comes from."""
    _show_config(file, words)


@app.command()
def report(folders: Annotated[list[Path], typer.Argument(help="run folders")]) -> None:
    """Sum up runs: figures, warnings, plots."""
    from rich.console import Console

    from trimtab.report.plots import plot_run
    from trimtab.report.tables import stage_table, summarise

    console = Console(highlight=False)
    for folder in folders:
        console.print(summarise(folder))
        for path in plot_run(folder):
            console.print(f"plot: {path}", markup=False, soft_wrap=True)
    if len(folders) > 1:
        console.print(stage_table(folders))


@app.command()
def env() -> None:
    """Show versions, hardware and number types."""
    from rich.console import Console
    from rich.table import Table

    from trimtab.models.packaged import cache_folder
    from trimtab.pipeline import versions
    from trimtab.train.device import cpu_has_bfloat16, hardware, pick_device, pick_dtype

    device = pick_device()
    table = Table(show_header=False, box=None)
    rows = {**versions(), **hardware(device), "cpu bfloat16": cpu_has_bfloat16(), "cache": cache_folder()}
    rows["compute_dtype auto"] = str(pick_dtype("auto", device)[0]).removeprefix("torch.")
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console(highlight=False).print(table)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _show_config(file: Path, words: list[str] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from trimtab.config import explain, load

    resolved = load(file, words or [])
    table = Table("key", "value", "from", "state", box=None, header_style="bold")
    for row in explain(resolved):
        table.add_row(row.key, str(row.value), row.origin, row.state)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for note in resolved.notes:
        console.print(note, markup=False)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. The only place that catches a TrimtabError."""
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        # --key value and --key=value reach the commands as words; typer keeps only what it knows as options
        with typed():
            result = app(args=words, standalone_mode=False)
    except TrimtabError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        trains = words[:1] in (["train"], ["demo"])
        print("\nstopped" + ("; --resume goes on from the last checkpoint" if trains else ""), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (`| head`) has what it wanted; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except typer.Exit as done:
        return done.exit_code
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "exit_code"):
            shown = error.format_message() if hasattr(error, "format_message") else str(error)
            print(f"error: {shown}\n  do:    trimtab --help", file=sys.stderr)
            return 2
        raise
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
