"""The grid of rounds against local epochs: equal steps in every cell, and rows that may be compared."""

from __future__ import annotations

from pathlib import Path

from helpers import save_tiny_bert

import fedbench
from fedbench.grid.file import load_grid
from fedbench.tables.asked import Asked
from fedbench.tables.folder import compare_folder
from fedbench.tables.render.ranking import pareto_picture


def test_the_cells_of_a_method_differ_in_rounds_and_epochs_alone_whose_product_is_the_same() -> None:
    for cell in load_grid("one-shot").cells():
        rounds, epochs = (int(cell.settings[f"federation.{name}"]) for name in ("rounds", "local_epochs"))
        assert cell.variant == f"{rounds}x{epochs}"
        assert rounds * epochs == 8
        axis = {"federation.rounds", "federation.local_epochs"}
        assert {key: value for key, value in cell.settings.items() if key not in axis} == {
            "dataset.train_rows": "6400",
            "federation.fraction": "1.0",
            "federation.max_steps": "none",
            "evaluation.every": "1",
            "lr_decay": '"none"',
        }


def test_a_small_run_of_it_makes_equal_steps_and_its_rows_are_comparable(tmp_path: Path) -> None:
    text = (Path(fedbench.__file__).parents[1] / "scenarios" / "grids" / "one-shot.toml").read_text()
    grid = tmp_path / "one-shot.toml"
    head, *variants = text.replace("6400", "16").split("[[variants]]")
    grid.write_text("[[variants]]".join([head, variants[0], variants[-1]]))
    made = fedbench.run_grid(
        grid, methods="fedavg-lora", scenarios="tweets-iid", seeds=1, fm=save_tiny_bert(tmp_path / "bert"),
        profile="smoke", results=tmp_path / "runs", cache=tmp_path / "cache", device="cpu",
    )  # fmt: skip
    assert [outcome.status for outcome in made] == ["complete"] * 2
    compute = [outcome.record.compute for outcome in made]
    assert len({each.local_steps for each in compute}) == 1
    sent = [outcome.record.communication.up.bytes for outcome in made if outcome.record.communication.up]
    assert [each // sent[0] for each in sent] == [1, 8]
    comparison = compare_folder(tmp_path / "runs", str(grid), scenarios=["tweets-iid"], asked=Asked.of(pareto=True))
    (section,) = [each for each in comparison.sections if any(row.runs for row in each.rows)]
    rows = [row for row in section.rows if row.runs]
    assert [row.label for row in rows] == [f"fedavg-lora [{name}]" for name in ("1x8", "8x1")]
    assert [row.flag for row in rows] == [""] * 2
    pareto_picture([section], tmp_path / "one-shot.svg")
