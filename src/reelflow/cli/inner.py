"""A command that hands one word on to another: `train CONFIG …` and `train prepare …`, `bench` and `bench train …`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand


def handing_on(word: str, function: Callable[..., Any]) -> type[TyperCommand]:
    """The class of such a command: where its first argument is `word`, what follows is `function`'s."""

    class Outer(TyperCommand):
        def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
            if args[:1] != [word]:
                return super().make_context(info_name, args, parent, **extra)
            app = typer.Typer(rich_markup_mode="rich", add_completion=False)
            app.command(word)(function)
            return typer.main.get_command(app).make_context(f"{info_name} {word}", args[1:], parent, **extra)

    return Outer
