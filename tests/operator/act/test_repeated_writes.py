"""Writes of a status that another program replaces: when each is due."""

from __future__ import annotations

from datetime import timedelta

from operator_builders import NOW, running
from qlora_api.status import Condition, Progress
from qlora_operator.act.repeated_writes import LONGEST_PAUSE_SECONDS, RepeatedWrites, fingerprint

KEY = ("team", "job")
OURS, THEIRS, NEXT = 1, 2, 3


class SettableClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_pauses_between_writes_of_the_same_status_grow_up_to_a_limit():
    clock = SettableClock()
    writes, pauses = RepeatedWrites(clock), []
    writes.record(KEY, 0, OURS, OURS)
    for _ in range(12):
        pauses.append(writes.seconds_left(KEY, THEIRS, OURS))
        clock.now += pauses[-1]
        assert writes.seconds_left(KEY, THEIRS, OURS) == 0
        writes.record(KEY, THEIRS, OURS, OURS)
    assert pauses[:5] == [0, 1, 2, 4, 8]
    assert pauses[-1] == LONGEST_PAUSE_SECONDS


def test_a_new_status_is_never_held_back():
    writes = RepeatedWrites(SettableClock())
    for _ in range(5):
        writes.record(KEY, THEIRS, OURS, OURS)
    assert writes.seconds_left(KEY, THEIRS, OURS) > 0
    assert writes.seconds_left(KEY, THEIRS, NEXT) == 0


def test_a_status_that_comes_back_by_itself_is_never_held_back():
    writes = RepeatedWrites(SettableClock())
    for before, after in [(0, OURS), (OURS, NEXT), (NEXT, OURS), (OURS, NEXT), (NEXT, OURS)]:
        assert writes.seconds_left(KEY, before, after) == 0
        assert writes.record(KEY, before, after, after) == 0


def test_statuses_that_alternate_are_held_back_too():
    writes = RepeatedWrites(SettableClock())
    for wanted in (OURS, NEXT, OURS, NEXT):
        writes.record(KEY, THEIRS, wanted, wanted)
    assert writes.seconds_left(KEY, THEIRS, OURS) > 0


def test_a_job_that_is_forgotten_begins_anew():
    writes = RepeatedWrites(SettableClock())
    for _ in range(5):
        writes.record(KEY, THEIRS, OURS, OURS)
    writes.forget(KEY)
    assert writes.seconds_left(KEY, THEIRS, OURS) == 0


def test_figures_and_times_of_transitions_are_no_other_status():
    def status(seconds, step, reason="Starting"):
        condition = Condition(
            type="Running",
            status="False",
            reason=reason,
            last_transition_time=NOW + timedelta(seconds=seconds),
            observed_generation=1,
        )
        return running(conditions=[condition], progress=Progress(step=step))

    assert fingerprint(status(0, 1)) == fingerprint(status(5, 2))
    assert fingerprint(status(0, 1)) != fingerprint(status(0, 1, "Unschedulable"))


def test_words_of_a_job_that_starts_are_written_once_they_no_longer_change():
    clock = SettableClock()
    writes = RepeatedWrites(clock)
    writes.record(KEY, 0, OURS, OURS)
    assert writes.words_left(KEY, 1, progress_seconds=15) == 30
    clock.now = 20
    assert writes.words_left(KEY, 1, progress_seconds=15) == 10
    assert writes.words_left(KEY, 2, progress_seconds=15) == 30
    clock.now = 50
    assert writes.words_left(KEY, 2, progress_seconds=15) == 0


def test_words_that_change_all_the_time_are_written_now_and_then():
    clock = SettableClock()
    writes, words = RepeatedWrites(clock), 0
    writes.record(KEY, 0, OURS, OURS)
    while writes.words_left(KEY, words, progress_seconds=15):
        clock.now, words = clock.now + 1, words + 1
    assert clock.now == 120
