"""The command `bcosify`: fine-tune, distil, explain, evaluate, convert, verify and benchmark models.

    bcosify finetune --model resnet18 --data digits --out runs/digits
    bcosify explain runs/digits IMAGE… --out pictures
    bcosify evaluate runs/digits --data digits

Exit codes: 0 done; 1 not all of it (a check did not hold, an image named on the command line could not be read,
something is missing here); 2 wrong usage or input, nothing was done; 130 interrupted; 141 whoever read the output
left (`bcosify … | head`).
Nothing but the standard library is needed for the help; what an extra provides is imported by the command that uses it.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
import warnings
from collections.abc import Sequence

from bcosification.cli import converting, explaining, measuring, training
from bcosification.cli.messages import in_options
from bcosification.cli.options import Parser

__all__ = ["main", "parser"]

# Which extra of the distribution brings a module.
EXTRAS = {
    name: "train" for name in ("lightning", "torchmetrics", "torchvision", "timm", "open_clip", "sklearn", "tqdm")
}
EXTRAS |= {"yaml": "train", "safetensors": "train", "matplotlib": "explain", "captum": "explain", "PIL": "explain"}
EXTRAS |= {"transformers": "text"}

EXIT_CODES = """\
exit codes: 0 done; 1 not all of it (a check failed, a named image could not be read, a package is missing);
2 wrong usage or input, nothing was done; 130 interrupted; 141 the reader of the output left"""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    whole = Parser(
        prog="bcosify", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn pretrained vision models into B-cos models: convert, fine-tune, explain, measure.",
        epilog=f"""\
bcosify COMMAND --help tells the options of a command. A first try, without a download:
  bcosify finetune --recipe digits --no-pretrained --out runs/digits
  bcosify evaluate runs/digits --data digits

{EXIT_CODES}""",
    )  # fmt: skip
    whole.add_argument("--version", action="store_true", help="print versions and what this machine can run")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")
    for add in (
        training.add_finetune,
        training.add_distill,
        explaining.add_explain,
        measuring.add_evaluate,
        converting.add_convert,
        converting.add_verify,
        converting.add_families,
        training.add_sweep,
        measuring.add_benchmark,
    ):
        add(commands)
    return whole


def _missing_package(error: ModuleNotFoundError, command: str) -> ModuleNotFoundError:
    """The error with the pip line of the extra that brings the package, if one does."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS or "pip install" in str(error):
        return error
    extra = EXTRAS[name]
    if command == "explain" and name in ("torchvision", "safetensors"):
        extra = "explain"
    return ModuleNotFoundError(f"this needs {name}, which is not installed: pip install 'bcos-kernels[{extra}]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, not at exit, where Python would print a traceback if nobody reads any more
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write goes nowhere
        return 141  # 128 + SIGPIPE, as of programs that this signal ends


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that the other side has closed."""
    try:
        watched = select.poll()
        watched.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll here, or no file behind it
        return False


def _run(argv: Sequence[str] | None) -> int:
    whole = parser()
    arguments = whole.parse_args(argv)
    if arguments.version:
        from bcos_kernels.__main__ import main as report

        return report([])
    if arguments.command is None:
        whole.print_help()
        return 2
    command = f"bcosify {arguments.command}"

    def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
        print(f"{command}: warning: {in_options(str(message), arguments.parser)}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            return arguments.run(arguments)
    except KeyboardInterrupt:
        hint = ""
        if arguments.command in ("finetune", "distill") and hasattr(arguments, "output"):
            hint = f"; go on with: bcosify {arguments.command} --resume --out {arguments.output}"
        print(f"bcosify: interrupted{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise
        if arguments.debug:
            traceback.print_exc()
        if isinstance(error, ModuleNotFoundError):
            error = _missing_package(error, arguments.command)
        expected = isinstance(error, (ValueError, TypeError, OSError, NotImplementedError))
        text = in_options(str(error), arguments.parser) or type(error).__name__
        more = "" if expected or isinstance(error, (ImportError, RuntimeError)) else " (--debug shows where)"
        print(f"{command}: error: {text}{more}", file=sys.stderr)
        return 2 if expected else 1
