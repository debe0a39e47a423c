"""Simulated time: what the rounds of a run would take with clients of a given link and speed.

A round is synchronous. Each client downloads what it is sent, trains, and uploads, one after the other, and the slowest
of those whose upload is waited for rules the round. Who drops out is not waited for, and what the server computes takes
no time. It is arithmetic on what a record says of each client, so a record that does not say it has no such time.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedbench.records.record import Record
from fedbench.records.schema import Round
from fedbench.tables.measures import Measure
from fedbench.tables.profiles import Profile

SIMULATED = "simulated_time"
"""The name under which `--measure` takes it, for every profile."""


def round_seconds(record: Record, profile: Profile) -> list[float] | None:
    """Simulated seconds of each round; None where the record does not say what its clients sent and computed."""
    found = [_slowest(entry, profile) for entry in record.rounds]
    times = [seconds for seconds in found if seconds is not None]
    return times if len(times) == len(found) else None


def simulated_seconds(record: Record, profile: Profile) -> float | None:
    """Simulated seconds of all rounds of a run."""
    times = round_seconds(record, profile)
    return None if times is None else sum(times)


def _slowest(entry: Round, profile: Profile) -> float | None:
    if entry.bytes_down_by_client is None or entry.bytes_up_by_client is None or entry.flops_by_client is None:
        return None
    awaited = {*entry.arrived, *(each.client for each in entry.refused)}
    sent = zip(entry.cohort, entry.bytes_down_by_client, entry.bytes_up_by_client, entry.flops_by_client, strict=True)
    slowest = 0.0
    for client, down, up, flops in sent:
        if client in awaited:
            if flops is None:
                return None
            slowest = max(slowest, profile.seconds(down, up, flops))
    return slowest


def why_unknown(record: Record) -> str:
    """Why a run has no simulated time; nothing where it has one."""
    for entry in record.rounds:
        if entry.flops_by_client is None or entry.bytes_down_by_client is None or entry.bytes_up_by_client is None:
            return "the record does not say what each client was sent and computed; run it again to know"
    if any(_slowest(entry, _ANY) is None for entry in record.rounds):
        return "how many operations a client's training takes is not known: no formula holds for its steps"
    return ""


_ANY = Profile.model_validate(
    {"name": "any"} | {name: {"value": 1, "source": "none"} for name in ("down_mbit_s", "up_mbit_s", "gflop_s")}
)


def time_measures(profiles: Sequence[Profile]) -> list[Measure]:
    """The measure of simulated seconds with each of `profiles`."""

    def measure(profile: Profile) -> Measure:
        about = f"simulated time in seconds, {profile}; the slowest client of a cohort rules its round"
        name = f"{SIMULATED}_{profile.name}"
        return Measure(name, lambda run: simulated_seconds(run, profile), about=about, unknown=why_unknown)

    return [measure(profile) for profile in profiles]
