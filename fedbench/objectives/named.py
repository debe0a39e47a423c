"""The objectives there are, by name. A new one is a file in this folder and a line here."""

from __future__ import annotations

from fedbench.errors import FedbenchError
from fedbench.names import nearest
from fedbench.objectives.base import Objective
from fedbench.objectives.choice import Choice
from fedbench.objectives.classification import Classification
from fedbench.objectives.language import Language

CLASSIFICATION = Classification()
CHOICE = Choice()
"""What rows of language with choices are scored as; they are trained on as rows of language."""
LANGUAGE = {"row": Language("row"), "batch": Language("batch")}
"""The objective of language, by what a row's loss is normalised by."""

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (CLASSIFICATION, *LANGUAGE.values())}


def objective_of(name: str) -> Objective:
    """The objective that rows name. Raises FedbenchError for one that is not there."""
    if name not in OBJECTIVES:
        raise FedbenchError(f"objective {name!r}: there is no such objective; {nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name]
