"""The comparison of a folder's records: of all, or of a grid's, a scenario's or an FM's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedbench.errors import FedbenchError
from fedbench.grid.file import load_grid
from fedbench.models.zoo.names import FMS
from fedbench.names import nearest
from fedbench.records.store import load_all
from fedbench.tables.asked import Asked
from fedbench.tables.compare import compare
from fedbench.tables.comparison import Comparison
from fedbench.tables.matching import of_fm

NOTHING = Asked()


def compare_folder(
    folder: Path,
    grid: str | None = None,
    scenarios: Sequence[str] = (),
    fm: str | None = None,
    asked: Asked = NOTHING,
    baseline: str = "",
) -> Comparison:
    """Compare the records of the results folder `folder`.

    With a `grid`, a name or a file, rows and columns are the grid's, and what it reports stands beside them. With
    `scenarios` or `fm` only theirs are left. `asked`: what is shown in addition. `baseline`: the row that
    differences are from, instead of those of all pairs. Raises FedbenchError where nothing is
    left, and for a record or a grid that cannot be read.
    """
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
    if baseline and asked.pareto:
        raise FedbenchError("--pareto compares all pairs of methods; leave out --baseline")
    comparison = compare(found, cells, chosen.title if chosen else "", chosen.reported if chosen else None, baseline)
    comparison.asked = asked
    return comparison
