"""What a measure is: an observer of the server, from which it makes one block of the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fedbench.api.messages import ClientId, Message, State
from fedbench.api.sides import Server


class Observer:
    """Watches a run from where its server lives, and changes nothing.

    The harness calls it at the moments below, with rounds counted from 0; most measures need few of them. What it has
    to keep for a run that is resumed it either gives as `state`, written anew with every checkpoint, or as `notes`,
    which are written once.
    """

    name: ClassVar[str]
    """Of its block in the record."""

    def started(self, server: Server) -> None:
        """Before the first round."""

    def sent(self, round: int, server: Server, messages: Sequence[Message]) -> None:
        """A broadcast has been sent; each of its messages once, however many clients it went to."""

    def aggregating(self, round: int, server: Server, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        """Uploads have been let in, and are about to be aggregated."""

    def aggregated(self, round: int, server: Server) -> None:
        """They have been aggregated."""

    def aligning(self, round: int, server: Server) -> None:
        """The proxy is about to be aligned."""

    def aligned(self, round: int, server: Server) -> None:
        """The proxy has been aligned."""

    def ended(self, round: int, server: Server, due: bool) -> Mapping[str, Any]:
        """The round is over; what is to stand in its entry of the record. `due`: it is a round of evaluation."""
        return {}

    def block(self, server: Server) -> Any:
        """The block of the record, after the last round; None where there is nothing to say."""
        raise NotImplementedError

    def notes(self) -> list[Any]:
        """Plain values to keep for good, as far as they came up since this was last asked."""
        return []

    def state(self) -> State | None:
        """What else is needed to go on; None for nothing."""
        return None

    def restore(self, state: State | None, notes: Sequence[Any]) -> None:
        """Become the observer that gave this state, and all these notes."""
