"""Parses the command line, runs the subcommand, and turns what went wrong into one sentence and an exit code.

Exit codes: 0 done; 1 an error, told in one sentence on standard error; 2 a wrong command line; 130 interrupted
(Ctrl-C); 141 the reader of its output left.
A subcommand is a module with `HELP`, `EXAMPLES`, `add_arguments(parser)` and `run(options) -> exit code`.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import accelkit
from accelkit.cli import bench, cache, demo, environment, optimize, passes, targets, tune
from accelkit.cli.output import complain
from accelkit.errors import AccelkitError, AccelkitWarning

OK, FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141

COMMANDS: dict[str, Any] = {
    "demo": demo,
    "bench": bench,
    "optimize": optimize,
    "env": environment,
    "passes": passes,
    "targets": targets,
    "tune": tune,
    "cache": cache,
}

EXIT_CODES = """\
exit codes:
  0    done
  1    an error, told in one sentence on standard error
  2    a wrong command line
  130  interrupted (Ctrl-C)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; by default the process's own.

    Returns:
        the exit code, see the module's docstring.
    """
    try:
        options = _parser().parse_args(arguments, argparse.Namespace(debug=False, quiet=False))
    except SystemExit as stop:  # argparse has told: 0 after --help and --version, 2 after a mistake
        return stop.code if isinstance(stop.code, int) else USAGE
    with _own_warnings_only(options.debug):
        try:
            code: int = options.run(options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            complain("interrupted")
            return INTERRUPTED
        except BrokenPipeError:  # `accelkit passes | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit's own flush must not fail again
            return BROKEN_PIPE
        except Exception as error:  # noqa: BLE001 - also what the user's model raises; --debug has the traceback
            return _failed(error, options.debug)
    return code


def _failed(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exc()
        return FAILED
    if isinstance(error, AccelkitError):
        complain(f"error: {error}")
    elif isinstance(error, OSError):
        complain(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    else:
        first = str(error).strip().splitlines()[:1]
        complain(f"error: {type(error).__name__}: {first[0] if first else 'no message'} (--debug shows where)")
    return FAILED


@contextmanager
def _own_warnings_only(debug: bool) -> Iterator[None]:
    """accelkit's warnings as one line each; other packages' are for developers, who have --debug."""
    if debug:
        yield
        return

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        complain(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", AccelkitWarning)
        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--debug", action="store_true", help="show tracebacks and other packages' warnings")
    common.add_argument("--quiet", action="store_true", help="no progress line")
    parser = argparse.ArgumentParser(
        prog="accelkit",
        description="A PyTorch model in, the same model back, faster, with proof.",
        epilog=f"example:\n  accelkit bench bert-base-128 --target onnxruntime,inductor --batch 1,8\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"accelkit {accelkit.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        examples = "\n".join(f"  {line}" for line in module.EXAMPLES)
        command = subparsers.add_parser(
            name, help=module.HELP, description=module.__doc__, parents=[common],
            epilog=f"example:\n{examples}\n\n{EXIT_CODES}", formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
