"""The commands together, and the border where every error becomes one line and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

import reelflow
from reelflow.cli import clips, inversion, machine, models, training
from reelflow.cli.ranks import begin, end, first, has_the_word, lost
from reelflow.cli.screen import one_line, tell

UsageError: Any = typer.BadParameter.__base__
INPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
"""What the user can do something about; other errors of the operating system are failures."""
DEBUG = "REELFLOW_DEBUG"
LOUD = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that tell their developers, when torchao is installed and diffusers imports it, what no user can act on."""


class InterruptedByUserError(Exception):
    """Ctrl-C; the message says what became of the output."""


class Commands(TyperGroup):
    """Takes Ctrl-C before the parser makes an exit code without words of it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise InterruptedByUserError(one_line(stop) or "nothing was written") from None


app = typer.Typer(cls=Commands, name="reelflow", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
for part in (clips, inversion, training, machine):
    part.add_to(app)
app.add_typer(models.app, name="models", help="List, explain, convert, fetch and verify models.")
app.add_typer(machine.evaluate, name="evaluate", help="Measure the quality of a model.")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"reelflow {reelflow.__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    """Video from text, pictures and video, by exact normalizing flows.

    Exit codes: 0 done, 2 wrong usage or bad input, 1 failure, 130 interrupted.
    """


def run(argv: Sequence[str] | None = None) -> int:
    """Parse and run; every error is one line on stderr, of all processes together."""
    with warnings.catch_warnings():
        _show_notes()
        begin()
        try:
            return end(_code(typer.main.get_command(app).main(argv, prog_name="reelflow", standalone_mode=False)))
        except Exception as error:  # noqa: BLE001 - the border: nothing unexpected may show as pages of traceback
            if os.environ.get(DEBUG):
                traceback.print_exc()
            code, words = _explain(error)
            if words and has_the_word():
                tell(words)
            return end(code)


def _code(result: Any) -> int:
    return result if isinstance(result, int) else 0


def _explain(error: Exception) -> tuple[int, str]:
    """The exit code, and what is wrong."""
    if isinstance(error, InterruptedByUserError | typer.Abort):
        return 130, f"interrupted: {one_line(error) or 'nothing was written'}"
    if isinstance(error, UsageError):
        context, message = error.ctx, error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":  # the help itself is the message, or is printed already
            return 2, message.removesuffix("\n")
        return 2, f"error: {one_line(message).rstrip('.')}; see: {context.command_path if context else 'reelflow'} --help"
    if _is_bad_input(error):
        return 2, f"error: {one_line(error)}"
    if lost(error):
        return 1, "error: another process of torchrun is gone or does not answer; torchrun says below which"
    where = "" if first() else f"process {os.environ['RANK']}: "
    return 1, f"error: {where}{type(error).__name__}: {one_line(error) or 'no reason given'}; set {DEBUG}=1 and run again to see where"


def _is_bad_input(error: Exception) -> bool:
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | PermissionError) or error.errno in INPUT_ERRORS
    return isinstance(error, ValueError) and not isinstance(error, UnicodeError)


def _show_notes() -> None:
    """The library's warnings as notes, each once; those of other libraries are for their developers."""
    own, said = Path(reelflow.__file__).parent, set[str]()
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        text = one_line(message)
        if own in Path(filename).parents and text not in said and first():
            said.add(text)
            tell(f"note: {text}")

    if not os.environ.get(DEBUG):
        warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module="reelflow")
    warnings.showwarning = show
