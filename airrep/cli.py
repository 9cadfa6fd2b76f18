"""The `airrep` command: the stages of a run, and questions to a trained encoder."""

import inspect
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from airrep import __version__, explore, label_stages, queries, stages
from airrep.cli_flags import QUERY_FLAGS, STAGE_FLAGS
from airrep.config import RunConfig, check_config_file, nearest
from airrep.examples import InputError

INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended

_RUN_HELP = """Everything a run makes is in the folder `output` of its configuration. Every key
of the configuration is also a flag: --recipe.epochs 3 beats what the file says."""
_STAGES: dict[str, tuple[Callable[..., Any], str]] = {
    "run": (stages.run, "subsets to report, one after the other; what is done is not done again"),
    "plan": (label_stages.plan, "say what the labels will cost: trains on one subset"),
    "subsets": (label_stages.make_subsets, "draw the targets and the random training subsets"),
    "labels": (
        label_stages.make_labels,
        "fine-tune the language model on every subset, record the targets' losses",
    ),
    "benchmark": (
        label_stages.benchmark,
        "make the labels, and describe the folder as a benchmark to share",
    ),
    "train": (stages.train, "train the encoder on the labels"),
    "evaluate": (
        stages.evaluate,
        "compare attribution methods by LDS on held-out subsets and targets",
    ),
    "report": (stages.report, "write results.json as one self-contained page"),
    "intervene": (
        label_stages.intervene,
        "train without, or only on, the examples that methods name, and see what happens",
    ),
}
_QUERIES: dict[str, tuple[Callable[..., None], str]] = {
    "encode": (queries.encode, "write the embeddings of examples"),
    "rank": (queries.rank, "the training examples that help and harm each target most"),
    "index": (explore.build_index, "write an index of a pool of any size, for explore"),
    "explore": (explore.explore, "a local page: what helps and harms a target, listed or typed"),
    "score": (queries.score, "rank candidate training sets by how much they help targets"),
    "judge": (queries.judge, "compare an encoder, methods and files of scores on a benchmark"),
    "import": (queries.import_benchmark, "a benchmark from a published AirRep test set"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 for wrong input, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        _check_config_files(given)
        parser = make_parser()
        values = parser.parse_args(given)
        command = values.command
        _run(command, vars(parser.instantiate(values)[command]))
    except (InputError, ArgumentError) as error:
        if debug:
            raise
        print(f"airrep: {_sentence(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read our output has enough (`airrep rank ... | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if debug or error.errno is None:
            raise
        print(f"airrep: {_disk_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nairrep: stopped; what is finished is kept, and the same command goes on from there",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 0


def make_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = ArgumentParser(
        prog="airrep",
        exit_on_error=False,
        allow_abbrev=False,
        version=__version__,
        description="Which training examples made a language model better or worse at this?",
        epilog="--debug shows where an error came from.",
    )
    commands = parser.add_subcommands(dest="command", required=True, metavar="command")
    for name, (_, what) in _STAGES.items():
        stage = ArgumentParser(
            exit_on_error=False,
            allow_abbrev=False,
            description=f"airrep {name}: {what}. {_RUN_HELP}",
        )
        stage.add_argument("--config", action="config", help="YAML file; see configs/")
        for flag, options in STAGE_FLAGS.get(name, {}).items():
            stage.add_argument(f"--{flag}", **options)
        stage.add_class_arguments(RunConfig)
        commands.add_subcommand(name, stage, help=what)
    for name, (function, what) in _QUERIES.items():
        query = ArgumentParser(
            exit_on_error=False, allow_abbrev=False, description=f"airrep {name}: {what}."
        )
        query.add_argument("--config", action="config", help="YAML file with these flags")
        for parameter in inspect.signature(function).parameters.values():
            flag = parameter.name.replace("_", "-")
            kind, default, meaning = QUERY_FLAGS[flag]
            needed = parameter.default is inspect.Parameter.empty
            query.add_argument(
                f"--{flag}", type=kind, default=default, required=needed, help=meaning
            )
        commands.add_subcommand(name, query, help=what)
    return parser


def _run(command: str, values: dict[str, Any]) -> None:
    values.pop("config", None)
    if command in _QUERIES:
        _QUERIES[command][0](**values)
        return
    flags = [flag.replace("-", "_") for flag in STAGE_FLAGS.get(command, {})]
    extra = {flag: values.pop(flag) for flag in flags}
    config = RunConfig(**values)
    result = _STAGES[command][0](config, **extra)
    if isinstance(result, Path):
        print(result)


def _check_config_files(given: Sequence[str]) -> None:
    """Config files of a run are checked first: this knows the nearest key to a wrong one."""
    if not given or given[0] not in _STAGES:
        return
    for place, argument in enumerate(given):
        if argument == "--config" and place + 1 < len(given):
            check_config_file(given[place + 1])
        elif argument.startswith("--config="):
            check_config_file(argument.removeprefix("--config="))


def _sentence(error: Exception) -> str:
    """The message on one line, with a hint for a flag that does not exist."""
    text = str(error)
    unknown = re.match(r"unrecognized arguments: --([\w.]+)", text)
    if unknown:
        return f"there is no flag --{unknown[1]}{nearest(unknown[1])}"
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _disk_sentence(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{where}; what is finished is kept, and the same command goes on"


if __name__ == "__main__":
    sys.exit(main())
