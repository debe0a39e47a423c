"""What the commands share: their options, and how what was given is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedbench.errors import FedbenchError

if TYPE_CHECKING:
    from fedbench.registry import Registry
    from fedbench.run.request import RunRequest


def given(option: str) -> Callable[[str], str]:
    """A parser of text that may not be empty, as it is where a shell's variable is not set."""

    def parse(text: str) -> str:
        if not text.strip():
            raise FedbenchError(f"{option}: an empty value; leave the option out for its default")
        return text

    return parse


def folder(option: str) -> Callable[[str], Path]:
    """A parser of a folder, which may be one yet to be made."""

    def parse(text: str | Path) -> Path:  # typer parses defaults too
        path = text if isinstance(text, Path) else Path(given(option)(text))
        if path.exists() and not path.is_dir():
            raise FedbenchError(f"{option} {path}: a file is there, not a folder; name a folder")
        return path

    return parse


class Executor(StrEnum):
    """How local training is executed."""

    auto = "auto"
    packed = "packed"
    fused = "fused"
    reference = "reference"


class Precision(StrEnum):
    """Of training and evaluation."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE|DIR|MODULE",
        parser=given("--plugin"),
        help="Methods or scenarios of your own; may be repeated.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        parser=folder("--data-dir"),
        help="Folder with data sets on disk; also [bold]$FEDBENCH_DATA[/bold].",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        parser=folder("--cache"),
        help="Folder for what is reused; also [bold]$FEDBENCH_CACHE[/bold].",
    ),
]
Results = Annotated[
    Path, typer.Option("--results", metavar="DIR", parser=folder("--results"), help="Where the records go.")
]
FM = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|ID|PATH",
        parser=given("--fm"),
        help="Foundation model: a name, a hub id or a folder with a checkpoint; default: the scenario's.",
    ),
]
MethodName = Annotated[str, typer.Option(help="Name of a method; see [bold]fedbench list methods[/bold].")]
ScenarioName = Annotated[str, typer.Option(help="Name of a scenario; see [bold]fedbench list scenarios[/bold].")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random stream.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes CUDA where there is one.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A hyper-parameter of the method ([bold]lr=1e-3[/bold]) or a dotted key of the scenario "
        "([bold]federation.fraction=0.5[/bold]); may be repeated. `fedbench show` lists both.",
    ),
]
Rounds = Annotated[int | None, typer.Option(min=0, help="Short for --set federation.rounds=N.")]
Profile = Annotated[
    str | None, typer.Option(metavar="NAME", help="A profile of the scenario file; [bold]smoke[/bold] takes seconds.")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Worker processes on a CPU; default: one per core. Changes no result."),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        "--precision",
        help="Of training and evaluation; auto takes bf16 on CUDA devices that have it, else fp32. On CPUs with "
        "instructions for bf16 ([bold]fedbench doctor[/bold] says so) it is faster than fp32.",
    ),
]

ExecutorOption = Annotated[
    Executor,
    typer.Option(
        "--executor",
        help="How local training is executed: packed (client by client, without padding), fused (a round's clients "
        "in one pass) or the padded reference; auto takes fused on CUDA, else packed.",
    ),
]
Addresses = Annotated[
    Path,
    typer.Option(
        "--addresses",
        metavar="FILE",
        help="CSV file of where the server (rank 0) and each silo (1 to N) listen, as FedML has it: "
        "eid,rank,grpc_server_ip,grpc_server_port.",
    ),
]
SiloTimeout = Annotated[
    float,
    typer.Option(
        min=1,
        metavar="SECONDS",
        help="How long a silo may take for a round; the round ends without one that takes longer.",
    ),
]


def pairs(settings: list[str] | None, rounds: int | None) -> dict[str, str]:
    """`--set` pairs as a mapping, `--rounds` among them. Raises FedbenchError for what is no pair or given twice."""
    found: dict[str, str] = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise FedbenchError(f"--set {setting}: write it as key=value")
        if key.strip() in found:
            raise FedbenchError(f"--set {key.strip()}: given twice; give it once")
        found[key.strip()] = value.strip()
    if rounds is not None:
        if found.keys() & {"rounds", "federation.rounds"}:
            raise FedbenchError("--rounds and --set both give the number of rounds; give one of them")
        found["federation.rounds"] = str(rounds)
    return found


def names(text: str | None) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def known(plugins: list[str] | None, methods: Iterable[str] = (), scenarios: Iterable[str] = ()) -> Registry:
    """The registry, after a look that it has these methods and scenarios. Raises FedbenchError for one it has not.

    Loads no torch, so that a typing error is answered at once.
    """
    from fedbench.registry import Registry

    registry = Registry(tuple(plugins or ()))
    for method in methods:
        registry.find_method(method)
    for scenario in scenarios:
        registry.find_scenario(scenario)
    return registry


def asked(*, rounds: int | None, settings: list[str] | None, plugins: list[str] | None, **rest: Any) -> RunRequest:
    """The request that the options of `fedbench run` stand for; `rest` are further fields of it."""
    from fedbench.run.request import RunRequest

    return RunRequest(settings=pairs(settings, rounds), plugins=tuple(plugins or ()), **rest)
