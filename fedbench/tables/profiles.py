"""Client profiles: the link and the speed that simulated time is computed with, from a TOML file.

[phone]
down_mbit_s = { value = 50, source = "where the figure comes from, or that it is an assumption" }
up_mbit_s = { value = 10, source = "..." }
gflop_s = { value = 10, source = "..." }
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedbench.errors import FedbenchError
from fedbench.names import bad_name, nearest
from fedbench.scenario.settings import mistake
from fedbench.scenario.toml import read_toml

BUILT_IN = Path(__file__).with_name("profiles.toml")


class Figure(BaseModel):
    """A number above 0, and its source, which may be that it is an assumption."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(gt=0, allow_inf_nan=False)
    source: str = Field(min_length=1)


class Profile(BaseModel):
    """A client's link, in 10^6 bits a second in each direction, and its speed in 10^9 floating-point operations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    down_mbit_s: Figure
    up_mbit_s: Figure
    gflop_s: Figure

    def seconds(self, down: int, up: int, flops: int) -> float:
        """Of a client that receives `down` bytes, then computes, then sends `up` bytes."""
        bits = 8 * down / (1e6 * self.down_mbit_s.value) + 8 * up / (1e6 * self.up_mbit_s.value)
        return bits + flops / (1e9 * self.gflop_s.value)

    def __str__(self) -> str:
        link = f"{self.down_mbit_s.value:g} Mbit/s down, {self.up_mbit_s.value:g} up"
        return f"{self.name}: {link}, {self.gflop_s.value:g} GFLOP/s"


def load_profiles(path: Path | None = None) -> dict[str, Profile]:
    """The profiles of a file by name, those that come with the package without one.

    Raises FedbenchError, with file, profile and fix, for a file that cannot be read or says something else.
    """
    path = path or BUILT_IN
    found = {}
    for name, figures in read_toml(path).items():
        if why := bad_name(name):
            raise FedbenchError(f"{path}: {why}")
        if not isinstance(figures, dict):
            raise FedbenchError(f"{path}: {name}: expected a table [{name}] with down_mbit_s, up_mbit_s and gflop_s")
        try:
            found[name] = Profile.model_validate({**figures, "name": name})
        except ValidationError as error:
            wrong = mistake(error)
            advice = f"; {nearest(wrong.place[-1], Profile.model_fields)}" if wrong.unknown else ""
            message = "unknown field" if wrong.unknown else wrong.message
            raise FedbenchError(f"{path}: {name}.{'.'.join(wrong.place)}: {message}{advice}") from None
    if not found:
        raise FedbenchError(f"{path}: there are no profiles in it; write one as [phone]")
    return found


def chosen_profiles(names: Sequence[str] = (), path: Path | None = None) -> list[Profile]:
    """Those of these names, all without any. Raises FedbenchError for a name that there is none of."""
    known = load_profiles(path)
    for name in names:
        if name not in known:
            raise FedbenchError(f"--profile {name}: no such client profile; {nearest(name, known)}")
    return [known[name] for name in names or known]
