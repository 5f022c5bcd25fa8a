"""A rank that gives no sign of life is named, and it is the one that the others wait for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qlora_trainer.engine.evaluate import Stopped, evaluate
from qlora_trainer.liveness.heartbeat import Beat, Heartbeat, Section, file_of, prepare_files, read_all
from qlora_trainer.liveness.watchdog import Limits, Watchdog, describe_stuck, find_stuck, waited_for
from qlora_trainer.reporting.pace import Pace

LIMITS = Limits.of(60)


def beat(section, around=None, at=0.0):
    return Beat(at, section, around or section, pid=1, step=3)


FORWARD, OPTIMIZER, LOAD, DONE = map(beat, (Section.FORWARD, Section.OPTIMIZER, Section.LOAD, Section.DONE))
WAITS = beat(Section.COLLECTIVE, Section.BACKWARD)
WAITS_IN_LOAD = beat(Section.COLLECTIVE, Section.LOAD)


@pytest.mark.parametrize(
    ("beats", "silent", "states", "named"),
    [
        pytest.param([FORWARD, WAITS], [59, 59], "RS", None, id="within-the-limit"),
        pytest.param([WAITS, FORWARD], [61, 61], "SR", 1, id="others-wait-for-one-that-computes"),
        pytest.param([WAITS, WAITS], [89, 89], "SS", None, id="waiting-may-take-longer-than-computing"),
        pytest.param([WAITS, WAITS], [95, 96], "SS", 1, id="all-wait-the-first-to-come-is-named"),
        pytest.param([WAITS, WAITS], [61, 61], "ST", 1, id="a-stopped-process-waits-for-nobody"),
        pytest.param([FORWARD, OPTIMIZER], [80, 61], "RT", 1, id="a-stopped-process-comes-first"),
        pytest.param([WAITS_IN_LOAD, LOAD], [599, 599], "SD", None, id="loading-takes-its-time"),
        pytest.param([WAITS_IN_LOAD, LOAD], [601, 601], "SD", 1, id="loading-has-a-limit-too"),
        pytest.param([WAITS, DONE], [10, 9999], "S ", None, id="a-rank-that-is-done-is-not-missed"),
    ],
)
def test_who_is_named(beats, silent, states, named):
    stuck = find_stuck(beats, silent, LIMITS, states)
    assert (stuck and stuck.local_rank) == named


@pytest.mark.parametrize("stall", [30, 60, 1800, 86400])
def test_whoever_waits_gives_up_after_whoever_is_waited_for(stall):
    limits = Limits.of(stall)
    for section in set(Section) - {Section.DONE, Section.COLLECTIVE}:
        assert limits.for_beat(beat(Section.COLLECTIVE, section)) >= limits.own[section] + 30
    waits = [limits.for_beat(beat(Section.COLLECTIVE, s)) for s in set(Section) - {Section.DONE}]
    assert limits.collective_timeout > max(waits)


def test_a_pod_that_was_frozen_as_a_whole_is_not_stuck():
    dog = Watchdog(LIMITS, ranks=1)
    assert dog.look([FORWARD], 0, "R") is None
    assert dog.look([FORWARD], 5000, "R") is None, "the watchdog slept, and so did the rank"
    now = 5000
    while dog.look([FORWARD], now, "R") is None:
        now += 1
    assert now - 5000 == pytest.approx(56, abs=2)


def test_each_sign_starts_the_time_anew():
    dog = Watchdog(LIMITS, ranks=1)
    for now in range(300):
        assert dog.look([beat(Section.FORWARD, at=now // 50)], now, "R") is None


def test_the_last_word_names_rank_node_section_and_limit():
    stuck = find_stuck([FORWARD], [61.2], LIMITS, "T")
    said = describe_stuck(stuck, 12, "node-b", 60)
    for part in ("rank 12 on node-b", "in Forward", "61 s", "limit there is 60 s", "stallTimeoutSeconds", "stopped"):
        assert part in said


def test_who_is_waited_for_at_the_moment():
    assert waited_for([WAITS, FORWARD, WAITS]) == 1
    assert waited_for([FORWARD, FORWARD]) is None
    assert waited_for([WAITS, WAITS]) is None


LIVES = """
import sys
from pathlib import Path
from qlora_trainer.liveness.heartbeat import Heartbeat, Section
heart = Heartbeat(Path(sys.argv[1]))
heart.step = 7
with heart.during(Section.BACKWARD), heart.during(Section.COLLECTIVE):
    raise SystemExit
"""


def test_another_process_reads_what_a_rank_did_last(tmp_path):
    prepare_files(tmp_path, 2)
    rank = subprocess.Popen([sys.executable, "-c", LIVES, str(file_of(tmp_path, 1))])
    assert rank.wait() == 0
    untouched, last = read_all(tmp_path)
    assert (untouched.section, untouched.pid) == (Section.LOAD, 0)
    assert (last.section, last.around, last.pid, last.step) == (Section.COLLECTIVE, Section.BACKWARD, rank.pid, 7)


def test_after_a_section_the_one_around_it_goes_on():
    heart = Heartbeat()
    with heart.during(Section.CHECKPOINT):
        with heart.during(Section.COLLECTIVE):
            assert heart.section is Section.COLLECTIVE
        assert heart.section is Section.CHECKPOINT
    assert heart.section is Section.LOAD
    assert heart.section_seconds()[Section.COLLECTIVE] > 0


class _Alone:
    device = "cpu"

    def sum(self, *values):
        return [float(v) for v in values]


class _Engine:
    """Counts the batches it computes."""

    def __init__(self):
        self.seen = 0
        self.training = True

    def eval(self):
        self.training = False

    def train(self):
        self.training = True


def test_an_evaluation_stops_before_the_next_batch():
    engine = _Engine()

    def batches():
        for number in range(10):
            engine.seen = number
            yield None

    assert evaluate(engine, batches(), _Alone(), lambda: True) == Stopped()
    assert engine.seen == 0
    assert engine.training


class _Two:
    """Rank 1 of two."""

    rank, world_size = 1, 2

    def __init__(self):
        self.heartbeat = Heartbeat()


def test_the_slowest_rank_is_shown_with_what_it_is_slow_at(clock):
    ranks = _Two()
    pace = Pace(ranks, ["a", "b"])
    for section, seconds in ((Section.DATA, 4), (Section.BACKWARD, 1), (Section.COLLECTIVE, 100)):
        with ranks.heartbeat.during(section):  # of these, waiting for others is not slowness
            clock.value += seconds
    other = [0.1, 1.0, 1.0, 0.1]
    table = [mine + theirs for mine, theirs in zip(pace.of_this_rank(), [*other, 0, 0, 0, 0], strict=True)]
    slowest = pace.slowest(table)
    assert (slowest.rank, slowest.node, slowest.section) == (1, "b", "Data")
    assert slowest.seconds == pytest.approx(5)
    assert sum(pace.of_this_rank()) == 0, "each step is counted once"
