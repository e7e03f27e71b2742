"""The command line. Every verb imports what it needs when it is called, so that `--help` is quick.

A mistake of the user's ends with one message and exit code 2; with `--debug` the traceback is shown too. Words after the file
are overrides: `trimtab train ppo.yaml learning_rate=2e-5 seed=1`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check config, data, model folder and adapters, show the plan, and stop")
    ] = False,
) -> None:
    """Train the stage that FILE describes."""
    if dry_run:
        from trimtab.config import load
        from trimtab.dry_run import dry_run as rehearse

        rehearse(load(file, words or []))
        return
    from trimtab.pipeline import run_exp

    run_exp(file, overrides=words or [], resume=resume)


@app.command(context_settings=_WORDS)
def plan(
    file: File,
    words: Words = None,
    device: Annotated[
        str | None, typer.Option("--device", help="another machine: cuda:24GB, rtx-4090, h100, cpu:16GB ...")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="rows of the training set, if it is not here")
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option("--prompt-tokens", min=1, help="tokens of a row (of a prompt), if it is not here")
    ] = None,
) -> None:
    """Show memory by phase and role, tokens a second and hours of FILE.

    Before anything runs: no weights are read. A model that is not on this machine is planned by its name if it is well known.
    """
    from trimtab.config import load
    from trimtab.dry_run import plan as show

    show(load(file, words or []), device=device, rows=rows, prompt=prompt_tokens)


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


@app.command("eval", context_settings=_WORDS)
def evaluate(
    file: Annotated[
        Path,
        typer.Argument(
            help="a YAML or JSON file, a run folder, or a file of predictions (.jsonl); two of them: compared"
        ),
    ],
    words: Words = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="predictions: a metric, several times; else all of text")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="predictions, a run folder, or two targets: write the figures into this new .json file"
        ),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="predictions: the set they are about, as trimtab sql build has written it")
    ] = "",
    dataset_dir: DatasetDir = "data",
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=0, help="a model on rows with databases: so many sampled answers to each, for pass@k"
        ),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of sampled answers and of bootstrap intervals")] = 0,
) -> None:
    """Measure a model on held-out rows, or predictions; compare two.

    A config gives loss, perplexity and its eval_tasks (stage rm: accuracy and calibration). generated_predictions.jsonl gives
    exact and normalised match, BLEU-4 and ROUGE. Where rows have databases (trimtab sql build), all but reward models give
    execution accuracy, with intervals, by class and verdict (docs/sql.md). A run folder is measured by its predictions if it has
    some, else as its config (a reward model's: trimtab rm report). trimtab eval A B: a paired test of their execution accuracy.
    """
    from trimtab.serve.execution import Asked

    asked = Asked(data=data, dataset_dir=dataset_dir, samples=samples, seed=seed)
    words = words or []
    if words and "=" not in words[0]:
        _show_comparison((file, Path(words[0])), words[1:], task, asked, output)
    elif file.is_dir():
        _show_run(file, words, task, output, asked)
    elif file.suffix == ".jsonl":
        _show_predictions(file, words, task or (), output, asked)
    else:
        _show_measured(file, words, task, output, asked)


@app.command()
def prove(
    full: Annotated[bool, typer.Option("--full", help="whole training runs too: a quarter of an hour")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="write claims and numbers here as JSON")] = None,
) -> None:
    """Show that the algorithms are what their papers say.

    Expected gradients, KL estimators and preference optima by enumeration; with --full, runs on problems whose optimum is known.
    The exit code is 1 if a claim does not hold (docs/proofs.md).
    """
    from trimtab.proofs import prove as measure
    from trimtab.proofs import table
    from trimtab.rundir import write_json

    claims = measure(full=full)
    print(table(claims))
    if output is not None:
        write_json(output, {"claims": [claim.record() for claim in claims]})
    if not all(claim.held for claim in claims):
        raise typer.Exit(1)


rm_app = typer.Typer(help="Look at a reward model.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(rm_app, name="rm")


@rm_app.command("report", context_settings=_WORDS)
def rm_report(
    source: Annotated[Path, typer.Argument(help="scores (.jsonl), a run folder, or a YAML file of stage rm")],
    words: Words = None,
) -> None:
    """Accuracy by margin and length, calibration, score histogram of a reward model.

    Scores that are there are used; a config, or a run without scores, is scored first: on its held-out pairs, else on all it has,
    and the title says which.
    """
    from rich.console import Console

    from trimtab.report.rewards import table, write_report
    from trimtab.serve.scores import scores_of

    found, paths = write_report(scores_of(source, words or []))
    console = Console(highlight=False)
    console.print(table(found))
    for path in paths:
        console.print(f"written: {path}", markup=False, soft_wrap=True)


@app.command(context_settings=_WORDS)
def export(file: File, words: Words = None) -> None:
    """Merge base and adapters into an ordinary model folder."""
    from trimtab.config import load
    from trimtab.serve.export import export as merge

    merge(load(file, words or []))


class _DataGroup(typer.core.TyperGroup):
    """`trimtab data FILE` shows a config's data; the other verbs are named."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = not args or args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else ["show", *args])


data_app = typer.Typer(
    cls=_DataGroup,
    help="Show the data of FILE; clean, convert, split data.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")

Source = Annotated[str, typer.Argument(help="a data file, or a name in dataset_info.json", metavar="FILE")]
DatasetDir = Annotated[str, typer.Option("--dataset-dir", help="folder of dataset_info.json")]
Format = Annotated[
    str | None,
    typer.Option("--format", help="format of FILE: alpaca, sharegpt, openai, text; else its entry, or a guess"),
]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="MEANING=NAME of a column, as prompt=问题; several times")
]
Ranking = Annotated[bool | None, typer.Option("--ranking/--no-ranking", help="rows are preferences; else a guess")]


@data_app.command("show", context_settings=_WORDS)
def data_show(file: File, words: Words = None) -> None:
    """Show what the data of FILE becomes.

    Counts, dropped rows with file and row, lengths, duplicates, and rendered rows with their trained tokens marked.
    """
    from trimtab.config import load
    from trimtab.data.inspect import inspect
    from trimtab.train.assemble import load_text_side

    resolved = load(file, words or [])
    inspect(resolved, *load_text_side(resolved))


@data_app.command("clean")
def data_clean(
    file: Source,
    output: Annotated[
        Path | None, typer.Option("--output", help="the cleaned file; else NAME.clean beside FILE")
    ] = None,
    held_out: Annotated[str | None, typer.Option("--held-out", help="the held-out file or set, to find leaks")] = None,
    model: Annotated[str | None, typer.Option("--model", help="model folder, to count tokens")] = None,
    template: Annotated[str | None, typer.Option("--template", help="chat template, to count tokens")] = None,
    cutoff_len: Annotated[int, typer.Option("--cutoff-len", min=1, help="most tokens of a row")] = 2048,
    sql: Annotated[bool | None, typer.Option("--sql/--no-sql", help="answers are SQL; else a guess")] = None,
    dialect: Annotated[str | None, typer.Option("--dialect", help="SQL dialect: mysql, sqlite, postgres ...")] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.5, max=1, help="similarity of near-duplicates")
    ] = 0.8,
    keep_conflicts: Annotated[bool, typer.Option("--keep-conflicts", help="report conflicts, keep their rows")] = False,
    dataset_dir: DatasetDir = "data",
    format: Format = None,
    column: Columns = None,
    ranking: Ranking = None,
) -> None:
    """Write a cleaned copy of FILE, what was removed, and a report.

    Looks for unreadable and empty rows, duplicates and near-duplicates, conflicting answers, rows that are too long, SQL that does
    not parse, and leaks from the held-out set. FILE itself is not touched.
    """
    from trimtab.data import commands

    commands.clean(
        file, output=output, held_out=held_out, model=model, template=template, cutoff_len=cutoff_len, sql=sql, dialect=dialect,
        threshold=threshold, conflicts=not keep_conflicts, dataset_dir=dataset_dir, formatting=format, columns=column or (),
        ranking=ranking,
    )  # fmt: skip


@data_app.command("convert")
def data_convert(
    file: Source,
    to: Annotated[str, typer.Option("--to", help="alpaca, sharegpt or openai")],
    output: Annotated[Path, typer.Option("--output", help="a .json, .jsonl, .csv, .tsv or .parquet file")],
    dataset_dir: DatasetDir = "data",
    format: Format = None,
    column: Columns = None,
    ranking: Ranking = None,
) -> None:
    """Write FILE in another format, and print the dataset_info.json entry that reads it."""
    from trimtab.data import commands

    commands.convert(
        file, to=to, output=output, dataset_dir=dataset_dir, formatting=format, columns=column or (), ranking=ranking
    )


@data_app.command("split")
def data_split(
    file: Source,
    val: Annotated[float, typer.Option("--val", min=0, help="held-out rows: a number, or a share below 1")] = 0.1,
    test: Annotated[float, typer.Option("--test", min=0, help="test rows, the same way")] = 0.0,
    by: Annotated[
        str, typer.Option("--by", help="groups that stay whole: random, template, or a column's name")
    ] = "random",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 42,
    output: Annotated[Path | None, typer.Option("--output", help="folder of the parts; else that of FILE")] = None,
    dataset_dir: DatasetDir = "data",
    format: Format = None,
    column: Columns = None,
    ranking: Ranking = None,
) -> None:
    """Write FILE as train, val and test parts, no group and no question in two of them."""
    from trimtab.data import commands

    commands.split(
        file, val=val, test=test, by=by, seed=seed, output=output, dataset_dir=dataset_dir, formatting=format,
        columns=column or (), ranking=ranking,
    )  # fmt: skip


sql_app = typer.Typer(
    help="Databases for text-to-SQL rows, and what is judged on them.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(sql_app, name="sql")


@sql_app.command("build")
def sql_build(
    file: Annotated[
        str, typer.Argument(help="a data file, names in dataset_info.json (A,B), or a training YAML", metavar="FILE")
    ],
    output: Annotated[Path | None, typer.Option("--output", help="a new folder; else NAME.databases here")] = None,
    dialect: Annotated[
        str | None,
        typer.Option(
            "--dialect", help="sqlite, postgres, mysql, oracle, tsql; else the entry's sql_dialect, else sqlite"
        ),
    ] = None,
    ddl: Annotated[
        Path | None, typer.Option("--ddl", help="a .sql file, or a .json list of schemas that rows name in a column")
    ] = None,
    spider: Annotated[
        Path | None, typer.Option("--spider", help="a Spider or BIRD folder: tables.json, database/ID/ID.sqlite")
    ] = None,
    schema_column: Annotated[
        str | None,
        typer.Option("--schema-column", help="column with the schema's name (or its DDL); else schema, or db_id"),
    ] = None,
    instances: Annotated[int, typer.Option("--instances", min=1, max=16, help="databases of each schema")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    dataset_dir: Annotated[
        str, typer.Option("--dataset-dir", "--dataset_dir", help="folder of dataset_info.json")
    ] = "data",
    format: Format = None,
    column: Columns = None,
) -> None:
    """Make databases that tell right queries from wrong ones for the rows of FILE.

    The schema is taken from --spider, --ddl, the prompts, or inferred from the gold queries. OUTPUT gets the rows with their databases
    and what a verdict on them is worth, the instances, a dataset_info.json and a report. FILE itself is not touched.
    """
    from trimtab.databases import build_databases

    build_databases(
        file, output=output, dialect=dialect, ddl=ddl, spider=spider, schema_column=schema_column, instances=instances, seed=seed,
        dataset_dir=dataset_dir, formatting=format, columns=column or (),
    )  # fmt: skip


@sql_app.command("explain")
def sql_explain(
    file: Annotated[Path, typer.Argument(help="a data file that `trimtab sql build` wrote")],
    row: Annotated[int, typer.Argument(help="the number of a row, from 1")],
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="generated_predictions.jsonl for the rows of FILE")
    ] = None,
    answer: Annotated[str | None, typer.Option("--answer", help="the answer to judge")] = None,
) -> None:
    """Show a row's question and gold, the verdict on a prediction, both results, and what the databases cannot tell."""
    from trimtab.databases import explain_row

    explain_row(file, row, predictions=predictions, answer=answer)


@data_app.command("prefer", context_settings=_WORDS)
def data_prefer(
    file: File,
    words: Words = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="the new data set; else prefer.json in FILE's dataset_dir")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=2, help="answers to each prompt")] = 8,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="most pairs of a prompt")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of the answers")] = 0,
) -> None:
    """Make preference data for a reward model from the answers of FILE's model, judged by execution.

    The prompts are those of its data set, whose rows have databases (trimtab sql build). Right answers are preferred to queries
    that run, and these to all others.
    """
    from trimtab.config import load
    from trimtab.serve.prefer import prefer

    config = load(file, words or [])
    folder = config.dataset_dir if isinstance(config.dataset_dir, str) else "."
    target = output or Path(folder) / "prefer.json"
    for line in prefer(config, target, samples=samples, most=pairs, seed=seed).lines():
        print(line)
    print(f"written: {target}")


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

    from trimtab.cache import cache_folder
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


def _show_measured(file: Path, words: list[str], task: Any, output: Path | None, asked: Any) -> None:
    from trimtab.config import load
    from trimtab.errors import ConfigError
    from trimtab.serve.evaluate import measure

    given = [name for name, value in (("--task", task), ("--output", output), ("--data", asked.data)) if value]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} are for files of predictions",
            where="command line",
            why=f"{file} is a config, which has keys for them",
            remedy="write eval_tasks=..., output_dir=... and eval_dataset=... after the file",
        )
    _show_figures(*measure(load(file, words), asked), asked.seed)


def _show_run(folder: Path, words: list[str], task: Any, output: Path | None, asked: Any) -> None:
    from trimtab.data.write import check_target
    from trimtab.errors import ConfigError
    from trimtab.rundir import write_json
    from trimtab.serve import execution
    from trimtab.serve.evaluate import measure_run

    if output is not None:
        check_target(output, kinds=(".json",))
    there = execution.predicted(folder, words, asked)
    if there is not None and not task and execution.file_has_databases(there, asked):
        _show_execution(execution.judged(folder, words, asked), asked.seed, output)
        return
    if there is not None:
        _show_predictions(there, words, task or (), output, asked)
        return
    given = [name for name, value in (("--task", task), ("--data", asked.data)) if value]
    if given:
        raise ConfigError(
            f"{' and '.join(given)}: for predictions only",
            where="command line",
            why=f"{folder} is measured as its config says, which has keys for them",
            remedy="write eval_tasks=... and eval_dataset=... after the folder, or name a file of predictions",
        )
    found, judged = measure_run(folder, words, asked)
    if found and output is not None:
        told = {**found, **({"execution": execution.report(judged, seed=asked.seed)} if judged is not None else {})}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, told)
    _show_figures(found, judged, asked.seed, None if found else output)


def _show_figures(found: Any, judged: Any, seed: int, output: Path | None = None) -> None:
    for name, value in found.items():
        print(f"{name}  {value:.6g}")
    if judged is not None:
        _show_execution(judged, seed, output)


def _show_execution(found: Any, seed: int, output: Path | None) -> None:
    from rich.console import Console

    from trimtab.report.execution import table
    from trimtab.serve.execution import FIGURES, report

    console = Console(highlight=False)
    console.print(table(report(found, seed=seed, output=output), found.name))
    for path in (found.folder / FIGURES if found.folder else None, output):
        if path is not None:
            console.print(f"written: {path}", markup=False, soft_wrap=True)


def _show_comparison(targets: tuple[Path, Path], words: list[str], task: Any, asked: Any, output: Path | None) -> None:
    from rich.console import Console

    from trimtab.errors import ConfigError
    from trimtab.report.execution import comparison_table
    from trimtab.serve.execution import paired

    if task:
        raise ConfigError(
            "two targets take no --task",
            where="command line",
            why="they are compared by execution accuracy",
            remedy="leave it out, or evaluate each of them alone",
        )
    told, (one, other) = paired(*targets, words, asked, output=output)
    Console(highlight=False).print(comparison_table(told, (one.name, other.name)))


def _show_predictions(file: Path, words: list[str], tasks: Any, output: Path | None, asked: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from trimtab.errors import ConfigError
    from trimtab.serve.evaluate import evaluate_predictions

    if words or asked.samples:
        raise ConfigError(
            f"a file of predictions takes no {'keys: ' + ' '.join(words) if words else '--samples'}",
            where="command line",
            why="nothing is loaded or generated",
            remedy="leave them out, or name a metric with --task",
        )
    table = Table("metric", "mean", "+- standard error", "answers", box=None, header_style="bold")
    rows, judged = evaluate_predictions(file, tasks, output=output, asked=asked)
    for row in rows:
        table.add_row(row["task"], f"{row['mean']:.4f}", f"{row['standard_error']:.4f}", str(row["count"]))
    Console(highlight=False).print(table)
    if judged is not None:
        _show_execution(judged, asked.seed, None)


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
