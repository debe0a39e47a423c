"""The comparison of a folder's records: of all, or of a grid's, a scenario's or an FM's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedbench.errors import FedbenchError
from fedbench.grid.file import load_grid
from fedbench.models.zoo.names import FMS
from fedbench.names import nearest
from fedbench.records.store import load_all
from fedbench.tables.compare import compare
from fedbench.tables.comparison import Comparison
from fedbench.tables.matching import of_fm
from fedbench.tables.measures import ASKED, MEASURES, Measure
from fedbench.tables.profiles import Profile, chosen_profiles
from fedbench.tables.simulated import SIMULATED, time_measures


def asked_measures(names: Sequence[str], profiles: Sequence[Profile] = ()) -> tuple[Measure, ...]:
    """The measures of these names; simulated time is one for each profile, of the package's where none is given.

    Raises FedbenchError for a name that there is no measure of.
    """
    timed = time_measures(profiles or chosen_profiles())
    by_name = {measure.name: [measure] for measure in (*MEASURES, *ASKED, *timed)} | {SIMULATED: timed}
    for name in names:
        if name not in by_name:
            raise FedbenchError(f"--measure {name}: no such measure; {nearest(name, by_name)}")
    return tuple(dict.fromkeys(measure for name in names for measure in by_name[name]))


def compare_folder(
    folder: Path,
    grid: str | None = None,
    scenarios: Sequence[str] = (),
    fm: str | None = None,
    measures: Sequence[str] = (),
    profiles: Sequence[Profile] = (),
) -> Comparison:
    """Compare the records of the results folder `folder`.

    With a `grid`, a name or a file, rows and columns are the grid's, and what it reports stands beside them. With
    `scenarios` or `fm` only theirs are left. `measures`: names of those to show in columns of their own, simulated time
    with each of `profiles`, without any those of the package. Raises FedbenchError where nothing is left, for a measure
    that there is none of, and for a record or a grid that cannot be read.
    """
    asked = asked_measures(measures, profiles)
    chosen = load_grid(grid).only(fm=fm) if grid else None
    cells = chosen.cells() if chosen else None
    found = load_all(folder / "records")
    if fm:
        known = {*FMS, *(str(record.identity.fm) for record in found)}
        found = of_fm(found, fm)
        if not found and fm not in FMS:
            raise FedbenchError(f"--fm {fm}: {folder} has no records of it; {nearest(fm, known)}")
    if scenarios:
        found = [record for record in found if record.identity.scenario in scenarios]
        cells = [cell for cell in cells if cell.scenario in scenarios] if cells is not None else None
    if not found and not cells:
        only = [*scenarios, *([fm] if fm else ())]
        what = f"records of {', '.join(only)}" if only else "records"
        raise FedbenchError(f"{folder}: there are no {what}; make some with `fedbench run`, or give --results DIR")
    comparison = compare(found, cells, chosen.title if chosen else "", chosen.reported if chosen else None)
    comparison.asked = asked
    return comparison
