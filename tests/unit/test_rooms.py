"""The plan of the house: .ci/rooms finds what goes against it."""

from __future__ import annotations

import importlib.util
import re
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    loader = SourceFileLoader("rooms", str(ROOT / ".ci" / "rooms"))
    spec = importlib.util.spec_from_loader("rooms", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_house_keeps_to_its_plan(rooms: ModuleType) -> None:
    assert rooms.complaints(ROOT) == []
    assert len(rooms.modules(ROOT)) > 80


def test_an_import_that_climbs_is_found(rooms: ModuleType, tmp_path: Path) -> None:
    house = {"fedbench/data/rows.py": "def f():\n    from fedbench.run import loop\n", "fedbench/run/loop.py": ""}
    assert rooms.complaints(write(tmp_path, house)) == [
        "fedbench/data/rows.py: data imports fedbench.run.loop, which is not below it"
    ]


def test_rooms_of_one_floor_do_not_import_each_other(rooms: ModuleType, tmp_path: Path) -> None:
    house = {"fedbench/scenario/load.py": "import fedbench.machine.workers\n", "fedbench/machine/workers.py": ""}
    assert "scenario imports fedbench.machine.workers" in rooms.complaints(write(tmp_path, house))[0]


def test_a_circle_inside_a_room_is_found(rooms: ModuleType, tmp_path: Path) -> None:
    house = {
        "fedbench/data/rows.py": "from fedbench.data.load import a\n",
        "fedbench/data/load.py": "from fedbench.data import rows\n",
    }
    assert "a circle of imports" in rooms.complaints(write(tmp_path, house))[0]


def test_a_room_that_imports_the_face_is_found(rooms: ModuleType, tmp_path: Path) -> None:
    house = {"fedbench/data/rows.py": "from fedbench import data, run_method\nimport fedbench\n"}
    assert rooms.complaints(write(tmp_path, house)) == [
        f"fedbench/data/rows.py: data imports {taken} of the face, which is above all rooms"
        for taken in ("run_method", "all")
    ]


def test_a_room_without_a_floor_is_said(rooms: ModuleType, tmp_path: Path) -> None:
    assert "on no floor" in rooms.complaints(write(tmp_path, {"fedbench/attic/old.py": ""}))[0]
    assert "on no floor" in rooms.complaints(write(tmp_path, {"fedbench/loft.py": ""}))[0]


def test_the_drawing_of_the_house_has_every_room_on_its_floor(rooms: ModuleType) -> None:
    drawing = re.findall(r"^```text\n(.*?)^```", (ROOT / "docs/architecture.md").read_text(), re.S | re.M)[0]
    floors = [words for line in drawing.splitlines() if (words := set(re.findall(r"\w+", line)))]
    assert floors == [{"fedbench"}, *({*floor} for floor in reversed(rooms.FLOORS))]


def test_every_room_has_a_sentence(rooms: ModuleType) -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    told = re.findall(r"^- `(?:fedbench/)?(\w+)(?:\.py|/)?`: [^.]+\.", text, re.M)
    assert sorted(told) == sorted(room for floor in rooms.FLOORS for room in floor)
