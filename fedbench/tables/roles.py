"""The parts that some methods play in every table, by their names: records say no such thing."""

from __future__ import annotations

FLOORS = ("zero-shot", "head-only")
"""Methods that mark the floor, in the order of a table: it begins with them."""

CEILINGS = ("fedavg-lora", "centralised-lora")
"""Methods that train the FM itself, in the order of a table: it ends with them."""

CEILING, FLOOR = CEILINGS[0], FLOORS[-1]
"""A scenario can rank methods only where the first clearly beats the second: its headroom."""

REFERENCES = (*FLOORS, CEILINGS[-1])
"""Methods that no federation would choose, which only bound the others; tests between pairs leave them out."""


def place(method: str) -> tuple[int, str]:
    """Where a method stands in a table: floors first, ceilings last, the methods under test by name between them."""
    if method in FLOORS:
        return FLOORS.index(method) - len(FLOORS), ""
    if method in CEILINGS:
        return 1 + CEILINGS.index(method), ""
    return 0, method
