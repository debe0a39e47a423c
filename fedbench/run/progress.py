"""Where a run says how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where a run reports how far it is."""

    def phase(self, name: str, total: int | None = None, detail: str = "") -> None: ...
    def advance(self, n: int = 1, **values: float | str) -> None: ...


class Silent:
    """Reports nothing."""

    def phase(self, name: str, total: int | None = None, detail: str = "") -> None:
        pass

    def advance(self, n: int = 1, **values: float | str) -> None:
        pass
