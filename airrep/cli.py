"""The `airrep` command: the stages of a run, and questions to a trained encoder."""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from airrep import __version__
from airrep.cli_flags import QUERY_FLAGS, STAGE_FLAGS

JUDGE = "judge"  # `evaluate --benchmark`, which is how it is documented
# All else is imported inside `main`: it takes seconds, in which Ctrl-C may come.
if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended
FULL = (errno.ENOSPC, errno.EDQUOT)
# The parser's types in words.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "names with values",
    "NoneType": "null",
}

_RUN_HELP = """Everything a run makes is in the folder `output` of its configuration. Every key
of the configuration is also a flag: --recipe.epochs 3 beats what the file says."""
# Command -> function, what it does.
_STAGES = {
    "run": (
        "airrep.stages:run",
        "subsets to report, one after the other; what is done is not done again",
    ),
    "plan": ("airrep.label_stages:plan", "say what the labels will cost: trains on one subset"),
    "subsets": (
        "airrep.label_stages:make_subsets",
        "draw the targets and the random training subsets",
    ),
    "labels": (
        "airrep.label_stages:make_labels",
        "fine-tune the language model on every subset, record the targets' losses",
    ),
    "benchmark": (
        "airrep.label_stages:benchmark",
        "make the labels, and describe the folder as a benchmark to share",
    ),
    "train": ("airrep.stages:train", "train the encoder on the labels"),
    "warm-up": (
        "airrep.label_stages:warm_up",
        "train the language model on a part of the pool, where gradient methods take gradients",
    ),
    "tune": (
        "airrep.stages:tune",
        "choose methods' parameters on held-out training labels, the same number of trials each",
    ),
    "evaluate": (
        "airrep.stages:evaluate",
        "compare attribution methods by LDS on held-out subsets and targets; with --benchmark DIR, "
        "methods and files of scores on any benchmark",
    ),
    "fit": (
        "airrep.stages:fit",
        "fit methods to the run's pool and save them, to ask them with rank, score and explore",
    ),
    "learning-curve": (
        "airrep.stages:learning_curve",
        "train on parts of the training labels, judged on held-out ones: would more labels help",
    ),
    "report": ("airrep.stages:report", "write results.json as one self-contained page"),
    "intervene": (
        "airrep.label_stages:intervene",
        "train without, or only on, the examples that methods name, and see what happens",
    ),
    "verify": (
        "airrep.label_stages:verify",
        "train drawn labels again and try scores on fresh subsets, to see if claims are true",
    ),
}
_QUERIES = {
    "encode": ("airrep.queries:encode", "write the embeddings of examples"),
    "rank": ("airrep.queries:rank", "the training examples that help and harm each target most"),
    "index": ("airrep.explore:build_index", "write an index of a pool of any size, for explore"),
    "explore": (
        "airrep.explore:explore",
        "a local page: what helps and harms a target, listed or typed",
    ),
    "score": ("airrep.queries:score", "rank candidate training sets by how much they help targets"),
    JUDGE: (
        "airrep.queries:judge",
        "compare an encoder, methods and files of scores on a benchmark",
    ),
    "import": ("airrep.queries:import_benchmark", "a benchmark from a published AirRep test set"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 when `verify` rejects or `tune` could try
    a method with no setting at all, 2 for wrong input, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = _in_our_words([argument for argument in given if argument != "--debug"])
    try:
        return _answer(given, debug)
    except KeyboardInterrupt:
        print(
            "\nairrep: stopped; what is finished is kept, and the same command goes on from there",
            file=sys.stderr,
        )
        return INTERRUPTED


def _in_our_words(given: list[str]) -> list[str]:
    """`benchmark make` is the stage benchmark; `evaluate --benchmark` needs no configuration."""
    if given[:2] == ["benchmark", "make"]:
        return ["benchmark", *given[2:]]
    if given[:1] == ["evaluate"] and any(a.split("=")[0] == "--benchmark" for a in given):
        return [JUDGE, *given[1:]]
    return given


def _answer(given: Sequence[str], debug: bool) -> int:
    from airrep.examples import InputError

    try:
        _check_config_files(given)
        parser = make_parser(given[0] if given else "")
        values = parser.parse_args(given)
        command = values.command
        return _run(command, vars(parser.instantiate(values)[command]))
    except (InputError, ArgumentError) as error:
        if debug:
            raise
        print(f"airrep: {_sentence(error, given[0] if given else '')}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read our output has enough (`airrep rank ... | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if debug or error.errno is None:
            raise
        print(f"airrep: {_disk_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def make_parser(command: str) -> ArgumentParser:
    """The parser of all commands, with the flags of one."""
    from jsonargparse import ArgumentParser

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
        if name == command:
            _add_stage_flags(stage, name)
        commands.add_subcommand(name, stage, help=what)
    for name, (function, what) in _QUERIES.items():
        shown = "evaluate --benchmark DIR" if name == JUDGE else name
        query = ArgumentParser(
            exit_on_error=False, allow_abbrev=False, description=f"airrep {shown}: {what}."
        )
        if name == command:
            _add_query_flags(query, function)
        commands.add_subcommand(name, query, help=f"means {shown}" if name == JUDGE else what)
    return parser


def _add_stage_flags(parser: ArgumentParser, name: str) -> None:
    from airrep.config import RunConfig

    parser.add_argument("--config", action="config", help="YAML file; see configs/")
    for flag, options in STAGE_FLAGS.get(name, {}).items():
        parser.add_argument(f"--{flag}", **options)
    parser.add_class_arguments(RunConfig)


def _add_query_flags(parser: ArgumentParser, function: str) -> None:
    parser.add_argument("--config", action="config", help="YAML file with these flags")
    for parameter in inspect.signature(resolve_name(function)).parameters.values():
        flag = parameter.name.replace("_", "-")
        kind, default, meaning = QUERY_FLAGS[flag]
        needed = parameter.default is inspect.Parameter.empty
        taken: Any = kind | None if default is None and not needed else kind
        parser.add_argument(f"--{flag}", type=taken, default=default, required=needed, help=meaning)


def _run(command: str, values: dict[str, Any]) -> int:
    """The exit status: 1 when the answer to the command's question is no, otherwise 0."""
    from airrep.config import RunConfig, check_run
    from airrep.examples import InputError
    from airrep.run_methods import check_methods_params

    values.pop("config", None)
    if command in _QUERIES:
        for name, value in values.items():
            if value is None and QUERY_FLAGS[name.replace("_", "-")][1] is not None:
                raise InputError(f"{name} is null; give a value.")
        resolve_name(_QUERIES[command][0])(**values)
        return 0
    flags = [flag.replace("-", "_") for flag in STAGE_FLAGS.get(command, {})]
    extra = {flag: values.pop(flag) for flag in flags}
    config = RunConfig(**values)
    # First of all: a wrong setting of a late stage must not be found after hours of an early one.
    check_run(config, computes=command not in ("subsets", "report"))
    check_methods_params(config)
    result = resolve_name(_STAGES[command][0])(config, **extra)
    if isinstance(result, Path):
        print(result)
    return int(result is False)


def _check_config_files(given: Sequence[str]) -> None:
    """Config files of a run are checked first: this knows the nearest key to a wrong one."""
    if not given or given[0] not in _STAGES:
        return
    from airrep.config import check_config_file

    for place, argument in enumerate(given):
        if argument == "--config" and place + 1 < len(given):
            check_config_file(given[place + 1])
        elif argument.startswith("--config="):
            check_config_file(argument.removeprefix("--config="))


def _sentence(error: Exception, command: str) -> str:
    """The message on one line; those of the parser in words."""
    text = str(error)
    if isinstance(error, ArgumentError):
        text = _parser_sentence(text, command)
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _parser_sentence(text: str, command: str) -> str:
    """A sentence of jsonargparse in words: the key, what was found, what is expected."""
    unknown = re.match(r"unrecognized arguments: --([\w.-]+)", text)
    if unknown:
        from airrep.config import nearest, run_keys

        keys = run_keys() if command in _STAGES else []
        return (
            f"there is no flag --{unknown[1]}{nearest(unknown[1], [*_own_flags(command), *keys])}"
        )
    key = ".".join(re.findall(r'Parser key "([\w.]+)":\n', text))
    lacks = re.search(r"the following arguments are required: (.+)", text)
    if lacks:
        names = lacks[1].split(", ")
        owner = key or names[0].partition(".")[0]
        wanted = [name.rpartition(".")[2] for name in names]
        flags = ", ".join(f"--{key}.{name}" if key else f"--{name}" for name in wanted)
        return f"{owner} needs {', '.join(wanted)}; give {flags}, or a line in the config file."
    found = re.search(r"(?:Got|Given) value: (.+)", text)
    if not key or not found:
        return re.sub(r'Parser key "([\w.]+)":\s*', r"\1: ", text)
    kinds = re.findall(
        r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.+?)\])", text[: found.start()]
    )
    takes = [KINDS.get(kind, kind) or f"one of {choices}" for kind, choices in kinds]
    if "import path" in text:  # the parser would take the name of a class
        takes.insert(0, "its keys")
    return f"{key} got {found[1]}; it takes {' or '.join(takes)}."


def _own_flags(command: str) -> list[str]:
    """The flags of a command beside the keys of a run's configuration."""
    if command in _QUERIES:
        taken = inspect.signature(resolve_name(_QUERIES[command][0])).parameters
        return [name.replace("_", "-") for name in taken]
    return list(STAGE_FLAGS.get(command, {}))


def _disk_sentence(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    advice = (
        "free some space: what is finished is kept, and the same command goes on"
        if error.errno in FULL
        else "check the path"
    )
    return f"{error.strerror}{where}; {advice}"


if __name__ == "__main__":
    sys.exit(main())
