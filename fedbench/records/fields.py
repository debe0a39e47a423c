"""What the fields of a record are made of: checked numbers and names, and the block that holds them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

ROWS = 10_000_000
"""The most test rows a record can have: an interval over more of them would take hours."""


def _as_written(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Check a number and keep it as it is: a 1 that became 1.0 would be other bytes in the file."""
    check(value)
    return value


Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_as_written)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False), WrapValidator(_as_written)]
Share = Annotated[float, Field(ge=0, le=1), WrapValidator(_as_written)]
Gap = Annotated[float, Field(ge=-1, le=1), WrapValidator(_as_written)]
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_NOT_IN_NAMES = r"/\\\x00-\x1f\x7f"
Name = Annotated[
    str, StringConstraints(max_length=200, pattern=rf"^[^{_NOT_IN_NAMES}]*[^.{_NOT_IN_NAMES}][^{_NOT_IN_NAMES}]*$")
]
"""The name of a method or scenario, which is also the name of a folder."""


class Block(BaseModel):
    """A table of a record: numbers are numbers, not texts or truth values; nothing in it can be set anew.

    Fields that are not named here are let through and kept, so that a record made by a later version is neither
    refused nor cut for what it says in addition. A field that the file leaves out has its default here, which says
    "not known", and stays out when the block is written again.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    needed: ClassVar[tuple[str, ...]] = ()
    """Fields that a block has to have unless it is empty, as the blocks of a failed run may be."""

    @property
    def empty(self) -> bool:
        """Whether it says nothing at all: the block of a run that did not come so far."""
        return not self.model_fields_set

    def to_json(self) -> dict[str, Any]:
        """The block as it lies in the file."""
        return self.model_dump(exclude_unset=True)

    @model_validator(mode="after")
    def _whole(self) -> Block:
        if not self.empty and (missing := [name for name in self.needed if getattr(self, name) is None]):
            raise ValueError(f"{missing[0]} is missing")
        return self
