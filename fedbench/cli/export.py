"""`fedbench export`: a run's tuned adapter for plain transformers and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedbench.cli.options import CacheDir, Plugins, known
from fedbench.cli.options import folder as folder_of


def export_command(
    record: Annotated[Path, typer.Argument(metavar="RECORD", help="The record of a run, a JSON file.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", parser=folder_of("DIR"), help="Where the adapter goes.")],
    cache: CacheDir = None,
    fm: Annotated[
        str | None, typer.Option(metavar="PATH", help="The folder of the run's FM, where it was given as one.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Write a run's tuned adapter and head in peft's format, for use with plain transformers and peft."""
    from fedbench.machine.paths import cache_folder
    from fedbench.run.export import export_adapter

    known(plugin).add_families()
    done = export_adapter(record, folder, cache_folder(cache), fm)
    revision = f", revision={done.revision!r}" if done.revision else ""
    padding = "" if done.pad_token is None else f", pad_token_id={done.pad_token}"
    print(f"{folder}: adapter_config.json, adapter_model.safetensors; to use them:\n")
    print(f"from peft import PeftModel\nfrom transformers import {done.architecture}\n")
    print(f"base = {done.architecture}.from_pretrained(")
    print(f"    {done.base!r}{revision}, num_labels={done.num_labels}{padding}, ignore_mismatched_sizes=True")
    print(")")
    print(f"model = PeftModel.from_pretrained(base, {str(folder)!r})")
