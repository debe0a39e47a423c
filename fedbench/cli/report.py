"""`fedbench report`: a results folder as one HTML file, or as a page that follows its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedbench.cli.console import make_console
from fedbench.errors import FedbenchError, printable


def report_command(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="Folder with records; ./runs if it exists, else ./results."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")] = Path("report.html"),
    serve: Annotated[
        bool, typer.Option("--serve", help="Write no file; show the page on this machine, and runs as they go on.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --serve; 0 takes any that is free.")] = 8765,
) -> None:
    """Make one HTML file of a results folder: leaderboard, plots, and the record behind each number.

    The file needs no network and can be sent to anybody. It takes `pip install 'fedbench[report]'`.
    """
    results = folder or next((Path(name) for name in ("runs", "results") if Path(name).is_dir()), Path("runs"))
    if not results.is_dir():
        raise FedbenchError(f"{results}: no such folder; name one with records in it")
    if serve:
        return _serve(results, port)
    from fedbench.files import write_text
    from fedbench.records.store import load_all
    from fedbench.report.page import link_to, page

    records = load_all(results / "records")
    if not records:
        raise FedbenchError(f"{results}: there are no records; make some with `fedbench run`")
    if out.is_dir():
        raise FedbenchError(f"--out {out}: a folder is there; name a file")
    text = page(records, results, links=link_to(results, out))
    write_text(out, text)
    size = len(text.encode()) / 1e6
    console = make_console()
    console.print(
        printable(f"{out}: {len(records)} records, {size:.1f} MB"), highlight=False, markup=False, soft_wrap=True
    )


def _serve(results: Path, port: int) -> None:
    from fedbench.report.serve import HOST, Report, server

    console = make_console()
    with server(Report(results), port) as running:
        address = f"http://{HOST}:{running.server_port}/"
        console.print(f"{address}  (Ctrl-C ends it)", highlight=False, markup=False)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            console.print("stopped")
