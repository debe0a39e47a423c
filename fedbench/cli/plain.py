"""Commands that parse nothing where nothing is given: typer parses with pydantic, which takes long to load."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class PlainCommand(TyperCommand):
    """A command that runs with the defaults of its function where it is asked for without arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What is left of `args`; without any, `ctx.params` stays empty."""
        return super().parse_args(ctx, args) if args else args


class PlainGroup(TyperGroup):
    """A group that has no options of its own where the first argument names a command."""

    _named = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What is left of `args`, from the command's name on."""
        self._named = bool(args) and not args[0].startswith("-")
        try:
            return super().parse_args(ctx, args)
        finally:
            self._named = False

    def get_params(self, ctx: Any) -> list[Any]:
        """The options of the group."""
        return [] if self._named else super().get_params(ctx)
