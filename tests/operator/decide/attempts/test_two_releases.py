"""Two releases of the operator over one namespace: Jobs that wait are not made anew in turn."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from operator_builders import CONFIG, PREPARING, child, decide, job, names, observed, running
from qlora_api.status import QLoRAJobStatus

OURS, THEIRS = CONFIG.release, "other/qlora"


@dataclass(frozen=True)
class WaitingJob:
    """A waiting Job that is made of something else than this release wants."""

    id: str
    is_made_anew: bool
    operator: str = THEIRS
    inherited: bool = False
    """It was there when this process began."""
    generation: int = 1


ROWS = (
    WaitingJob("made-by-this-release", True, operator=OURS),
    WaitingJob("made-by-an-earlier-version", True, operator=""),
    WaitingJob("made-by-another-that-runs", False),
    WaitingJob("made-by-another-before-the-start", True, inherited=True),
    WaitingJob("made-by-another-for-an-earlier-spec", True, generation=0),
    WaitingJob("made-by-another-for-a-newer-spec", False, generation=2),
)


@pytest.mark.parametrize("attempt", [0, 1], ids=["prepare", "attempt"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_waiting_job_is_made_anew_or_left_to_its_release(row, attempt):
    there = child(attempt, template="other", operator=row.operator, generation=row.generation)
    inherited = frozenset([there.uid]) if row.inherited else frozenset()
    status, config = (running(), CONFIG) if attempt else (QLoRAJobStatus(), PREPARING)
    decision = decide(job(status), observed(there, inherited=inherited, after=100), config)
    assert bool(decision.delete) == row.is_made_anew
    assert decision.contested == (None if row.is_made_anew else there)
    assert names(decision) == []


@pytest.mark.parametrize("attempt", [0, 1], ids=["prepare", "attempt"])
def test_what_only_the_other_release_could_make_is_left_to_it_with_its_status(attempt):
    """Two that each write why the job waits would answer each other for ever."""
    there = child(attempt, template="other", operator=THEIRS, generation=1)
    status, config = (running(state="Pending", reason="Starting"), CONFIG) if attempt else (QLoRAJobStatus(), PREPARING)
    a_job = job(status, scheduling={"profile": "theirs"})
    decision = decide(a_job, observed(there, after=100), config)
    assert decision.contested == there
    assert decision.status.reason == status.reason


def test_a_job_of_the_same_settings_is_nobodys_matter():
    made = child(1, operator=THEIRS, template="", generation=1)
    assert decide(job(running()), observed(made)).contested is None
