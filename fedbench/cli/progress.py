"""How far a run is, on the command line: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class _Remaining(TimeRemainingColumn):
    """Time left, and nothing where the length of a phase is not known."""

    def render(self, task: Task):  # type: ignore[no-untyped-def]
        return super().render(task) if task.total else ""


class _Count(MofNCompleteColumn):
    """Steps done of all, and nothing where their number is not known."""

    def render(self, task: Task):  # type: ignore[no-untyped-def]
        return super().render(task) if task.total else ""


class ConsoleProgress:
    """Shows phases and their advance; use as a context manager. Follows `fedbench.run.progress.Progress`.

    Values given to `advance` stay on show until the next phase. Off a terminal a line is printed at the start of
    each phase, with every accuracy, and else at most every `interval` seconds.
    """

    def __init__(self, console: Console, interval: float = 10.0) -> None:
        self.console, self.interval = console, interval
        self.values: dict[str, float | str] = {}
        self.name, self.done, self.total = "", 0, 0
        self.started = self.printed = time.monotonic()
        self.bar: Bar | None = None
        if console.is_terminal:
            self.bar = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                _Count(),
                TextColumn("{task.fields[values]}"),
                _Remaining(),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task("starting", total=None, values="")

    def __enter__(self) -> ConsoleProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def phase(self, name: str, total: int | None = None, detail: str = "") -> None:
        """Begin a phase of `total` steps, or of unknown length."""
        self.name, self.done, self.total = name, 0, total or 0
        self.values = {}
        self.started = self.printed = time.monotonic()
        label = f"{name} ({detail})" if detail else name
        if self.bar:
            self.bar.reset(self.task, total=total, description=label, values="")
        else:
            self.console.print(f"{label} ...", highlight=False, markup=False)

    def advance(self, n: int = 1, **values: float | str) -> None:
        """Count `n` more steps and show the values."""
        self.done += n
        self.values |= values
        if self.bar:
            self.bar.update(self.task, advance=n, values=self._text())
        elif "accuracy" in values or time.monotonic() - self.printed >= self.interval:
            self.printed = time.monotonic()
            counted = f" {self.done}/{self.total}" if self.total else ""
            self.console.print(f"{self.name}{counted} {self._text()}{self._left()}", highlight=False, markup=False)

    def _text(self) -> str:
        return "  ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in self.values.items()
        )

    def _left(self) -> str:
        if not self.total or not self.done or self.done >= self.total:
            return ""
        seconds = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        return f"  ETA {int(seconds // 60)}:{int(seconds % 60):02d}"
