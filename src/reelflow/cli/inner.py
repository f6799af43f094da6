"""A command that hands words on to others: `train CONFIG …` and `train prepare …`, `bench`, `bench train …` and `bench svd …`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand


def handing_on(**words: Callable[..., Any]) -> type[TyperCommand]:
    """The class of such a command: where its first argument is one of the words, what follows is that function's."""

    class Outer(TyperCommand):
        def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
            word = args[0] if args else ""
            if word not in words:
                return super().make_context(info_name, args, parent, **extra)
            app = typer.Typer(rich_markup_mode="rich", add_completion=False)
            app.command(word)(words[word])
            return typer.main.get_command(app).make_context(f"{info_name} {word}", args[1:], parent, **extra)

    return Outer
