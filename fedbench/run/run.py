"""A run from its start, or from where it was stopped, to a record on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedbench.errors import DamagedFileError
from fedbench.machine.memory import reset_peak
from fedbench.records.record import Record
from fedbench.records.store import save
from fedbench.run.claims import claim
from fedbench.run.export import adapter_path, keep_adapter
from fedbench.run.loop import Run
from fedbench.run.prepare import Prepared
from fedbench.run.progress import Progress, Silent
from fedbench.run.record import finish, without_scores


def checkpoint_folder(prepared: Prepared) -> Path:
    """Where a run keeps its checkpoint: under the results folder, by key."""
    return prepared.request.results / "checkpoints" / prepared.key[:12]


def run(prepared: Prepared, progress: Progress | None = None) -> Record:
    """Run from the start or from a checkpoint to a saved record; the checkpoint is removed at the end.

    Raises ClaimedError where another process is making the same run into the same folder.
    """
    with claim(prepared.request.results, prepared.key):
        return _run(prepared, progress or Silent())


def _run(prepared: Prepared, progress: Progress) -> Record:
    reset_peak(prepared.execution.device)
    results, folder = prepared.request.results, checkpoint_folder(prepared)
    this = Run(prepared, progress)
    try:
        if prepared.unavailable:
            record = without_scores(this, prepared.unavailable)
        else:
            try:
                if this.resume(folder):
                    progress.phase("resume", detail=f"after round {len(this.rounds)}")
            except DamagedFileError as error:
                progress.phase("starting anew", detail=f"the checkpoint is damaged: {error}")
                shutil.rmtree(folder, ignore_errors=True)
                this.host.close()
                this = Run(prepared, progress)
            this.loop(folder)
            record = finish(this)
            if (tuned := this.host.server.tuned()) is not None:
                keep_adapter(tuned, adapter_path(results, prepared.key), prepared.key)
    finally:
        this.host.close()
    save(record, results / "records")
    shutil.rmtree(folder, ignore_errors=True)
    return record
