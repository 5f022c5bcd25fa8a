"""Output of commands, as golden texts."""

import copy
import json
from collections import deque

import pytest

from cli_builders import GIB, NOW, failed, job, run_record, running, succeeded, waiting
from qlora_cli.jobs import compare, events, job_list, show, watch
from qlora_cli.jobs.job_view import time, view, view_run
from qlora_cli.kube.api_client import Event
from qlora_cli.manifest import init
from qlora_cli.text import figures, output

ALL = [waiting(), running(), running("support-2"), failed(), succeeded()]


def text(lines):
    return "\n".join(line.plain for line in lines) + "\n"


def board_of(*jobs):
    board = watch.WatchedJobs()
    board.take(Event("LISTED", tuple(jobs)))
    return board


def test_a_message_is_shown_also_where_all_columns_from_its_own_on_are_given_up():
    head, rows = ("NAME", "LONG-HEAD", "STEP"), [["one", "1", "2"], ["two", "why"]]
    lines = output.aligned(head, rows, 12, spare=("STEP", "LONG-HEAD"))
    assert [line.plain for line in lines] == ["NAME", "one", "two   why"]


@pytest.mark.parametrize("everywhere", [False, True])
def test_list(golden, everywhere):
    head, rows = job_list.table([view(j) for j in ALL], NOW, everywhere=everywhere)
    lines = output.aligned(head, rows, None, right=job_list.NUMBERS)
    golden(f"list{'-everywhere' if everywhere else ''}.txt", text(lines))


def test_a_list_gives_columns_up_before_its_messages():
    head, rows = job_list.table([view(j) for j in ALL], NOW, everywhere=True)
    wide, middle, narrow = (job_list.lines(head, rows, width) for width in (400, 130, 105))
    assert all(name in wide[0].plain for name in (*job_list.SPARE, "MESSAGE"))
    assert job_list.SPARE[0] not in middle[0].plain
    assert "MESSAGE" in middle[0].plain
    assert "MESSAGE" not in narrow[0].plain
    assert [line.plain for line in narrow if line.plain.startswith("  no node has as many free nvidia.com/gpu as ")]


def test_a_message_that_would_be_cut_to_a_few_letters_stands_below_its_row():
    body = failed("job")
    body["status"]["conditions"][-1]["message"] = 'spec.output.destination: "s3://bucket/adapters" is claimed by a job'
    lines = [line.plain for line in job_list.lines(*job_list.table([view(body)], NOW), 80)]
    assert lines[-1] == '  spec.output.destination: "s3://bucket/adapters" is claimed by a job'


@pytest.mark.parametrize("body", [running(), succeeded(), failed(), waiting()], ids=lambda b: b["status"]["state"])
def test_show(golden, body):
    golden(f"show-{body['status']['state'].lower()}.txt", text(show.page(view(body), body, NOW, 100)))


def test_show_of_a_local_run(golden, tmp_path):
    record = run_record()
    seen = view_run(tmp_path, record)
    page = text(show.page(seen, record, NOW, 100))
    golden("show-local.txt", page.replace(str(tmp_path), "runs/quick"))


def test_watch_of_several(golden):
    board = board_of(*ALL)
    board.losses["research", "support"] = deque([2.0, 1.8, 1.5, 1.4, 1.2])
    golden("watch.txt", text(watch.page(board, "namespace research · prod", NOW, 120, 40)))


@pytest.mark.parametrize("width", [116, 100, 92])
def test_watch_gives_columns_up_before_it_cuts_figures(width):
    board = board_of(*ALL)
    board.losses["research", "support"] = deque([2.0, 1.8, 1.5, 1.4, 1.2])
    lines = watch.table([view(j) for j in (running(), running("a-job-with-a-longer-name"))], board, NOW, width)
    assert lines[0].plain.endswith("MEM")
    assert all(line.plain.endswith("23.0Gi") for line in lines[1:])


def test_watch_of_one(golden):
    board = watch.WatchedJobs(frozenset(["support"]))
    board.take(Event("LISTED", (running(),)))
    golden("watch-one.txt", text(watch.page(board, "namespace research", NOW, 100, 40)))


def test_watch_on_a_narrow_and_low_terminal_cuts_and_shares_its_rows(golden):
    jobs = [f(f"{f.__name__}-{n}") for f in (waiting, running, failed, succeeded) for n in range(9)]
    lines = watch.page(board_of(*jobs), "namespace research", NOW, 60, 16)
    assert len(lines) <= 16
    assert all(len(line) <= 60 for line in lines)
    golden("watch-narrow.txt", text(lines))


ROWS = "s3://training-data-eu-central-1/customer-support/2026/11/28/answers-with-tools/part-of-many.jsonl"
DUMP = "s3://adapters-eu-central-1/customer-support/2026/11/28/answers-with-tools/out-of-memory/dump"
NODES = ("ip-10-0-12-34.eu-central-1.compute.internal", "ip-10-0-12-35.eu-central-1.compute.internal")


def wordy(name="support-answers-llama-3-1-8b-rank-64-second-try"):
    """A running job with long names and paths."""
    body = copy.deepcopy(running(name))
    body["spec"]["dataset"]["train"]["source"] = ROWS
    for attempt in body["status"]["attempts"]:
        attempt["node"] = ", ".join(NODES)
    body["status"]["attempts"][0]["message"] = f"no memory for 512 MiB at step 60: see {DUMP}"
    return body


@pytest.mark.parametrize("width", [80, 160])
def test_a_list_of_long_names_shows_every_step_and_message(golden, width):
    bodies = [*ALL, running("support-answers-llama-3-1-8b-rank-64-second-try")]
    lines = job_list.lines(*job_list.table([view(j) for j in bodies], NOW), width)
    assert max(map(len, lines)) <= width
    golden(f"list-wordy-{width}.txt", text(lines))


@pytest.mark.parametrize("width", [80, 160])
def test_show_cuts_no_path_and_no_node(golden, width):
    body = wordy()
    page = text(show.page(view(body), body, NOW, width))
    assert all(word in page for word in (ROWS, DUMP, *NODES))
    golden(f"show-wordy-{width}.txt", page)


@pytest.mark.parametrize("width", [80, 160])
def test_watch_of_one_breaks_what_is_wider_than_the_screen(width):
    body = wordy()
    board = watch.WatchedJobs(frozenset([body["metadata"]["name"]]))
    board.take(Event("LISTED", (body,)))
    whole = watch.page(board, "namespace research", NOW, width, 40)
    screen = watch._broken(whole, width)
    assert "".join(line.plain for line in screen) == "".join(line.plain for line in whole)
    assert all(word in text(whole) for word in (ROWS, DUMP, *NODES))
    assert max(map(len, screen)) <= width


@pytest.mark.parametrize("width", [80, 160])
def test_watch_of_long_names_shows_every_step_and_message(golden, width):
    lines = watch.page(board_of(*ALL, wordy()), "namespace research", NOW, width, 40)
    assert max(map(len, lines)) <= width
    golden(f"watch-wordy-{width}.txt", text(lines))


@pytest.mark.parametrize("height", range(6, 20))
def test_messages_below_their_rows_do_not_make_watch_longer_than_the_screen(height):
    jobs = [f(f"{'a-job-of-a-long-name-' * 2}{f.__name__}-{n}") for f in (waiting, running, failed) for n in range(5)]
    lines = watch.page(board_of(*jobs), "namespace research", NOW, 80, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= 80
    hidden = sum(int(line.plain.split()[2]) for line in lines if line.plain.startswith("… and"))
    assert sum(line.plain.startswith("a-job") for line in lines) + hidden == len(jobs)


def test_watch_says_that_the_connection_is_lost():
    board = board_of(running())
    board.take(Event("LOST", text="https://k8s cannot be reached: refused"))
    assert "connection lost, trying again: https://k8s cannot be reached" in text(watch.page(board, "", NOW, 99, 9))
    board.take(Event("MODIFIED", (running(),)))
    assert "connection lost" not in text(watch.page(board, "", NOW, 99, 9))


def test_a_deleted_job_leaves_the_board_and_a_new_list_replaces_it():
    board = board_of(running("a"), running("b"), running("c"))
    board.take(Event("DELETED", (running("a"),)))
    assert [name for _, name in board.jobs] == ["b", "c"]
    board.take(Event("LISTED", (running("c"),)))
    assert [name for _, name in board.jobs] == ["c"]


def test_compare(golden, tmp_path):
    record, body = run_record(), succeeded("baseline")
    columns = [
        compare.ComparedJob(view(body), body["spec"]),
        compare.ComparedJob(view_run(tmp_path, record), record["spec"]),
    ]
    golden("compare.txt", text(compare.pages(columns, None, every=False)).replace(str(tmp_path), "runs/quick"))
    plain = compare.as_plain(columns, every=False)
    assert plain["differences"]["spec.lora.rank"] == [16, 8]
    json.dumps(plain)


def test_compare_of_many_jobs_has_tables_that_fit_and_shows_paths_whole(golden):
    bodies = [wordy("one"), *(succeeded(name) for name in ("another-job", "a-job-of-a-longer-name", "the-last"))]
    page = text(compare.pages([compare.ComparedJob(view(body), body["spec"]) for body in bodies], 80, every=False))
    assert ROWS in page
    assert all(len(line) <= 80 or ROWS in line for line in page.splitlines())
    golden("compare-80.txt", page)


def test_compare_leaves_out_what_changes_nothing_in_what_is_learned():
    one, other = succeeded("one"), succeeded("other")
    other["spec"] = {**other["spec"], "policy": {"maxRestarts": 9}}
    columns = [compare.ComparedJob(view(b), b["spec"]) for b in (one, other)]
    assert compare.differing(columns) == []
    assert compare.differing(columns, every=True) == [("policy.maxRestarts", [3, 9])]


def test_events(golden):
    bodies = [
        {
            "metadata": {"uid": "1", "resourceVersion": "5", "creationTimestamp": "2026-01-02T10:00:00Z"},
            "involvedObject": {"kind": "Job", "name": "support-1"},
            "type": "Normal",
            "reason": "SuccessfulCreate",
            "message": "Created pod: support-1-0-x7k2p",
            "lastTimestamp": "2026-01-02T10:00:00Z",
            "count": 1,
        },
        {
            "metadata": {"uid": "2", "resourceVersion": "7", "creationTimestamp": "2026-01-02T10:00:00Z"},
            "involvedObject": {"kind": "QLoRAJob", "name": "support"},
            "type": "Warning",
            "reason": "OutOfDeviceMemory",
            "message": "attempt 1 on gpu-1: no memory\nfor 512 MiB",
            "eventTime": "2026-01-02T10:30:00.123456Z",
            "series": {"count": 3, "lastObservedTime": "2026-01-02T10:31:00Z"},
        },
    ]
    rows = events.rows([events.see(b) for b in bodies], NOW)
    golden("events.txt", text(output.aligned(events.HEAD, rows)))


@pytest.mark.parametrize(
    ("kind", "name", "ours"),
    [
        ("QLoRAJob", "tune", True),
        ("QLoRAJob", "tune-1", False),
        ("Job", "tune-1", True),
        ("Job", "tune-prepare", True),
        ("Job", "tune-1-1", False),
        ("Pod", "tune-1-0-x7k2p", True),
        ("Pod", "tune-prepare-x7k2p", True),
        ("Pod", "tune-1-1-0-x7k2p", False),
        ("Pod", "tuned-1-0-x7k2p", False),
        ("Workload", "job-tune-1-abcde", True),
        ("Node", "tune", False),
    ],
)
def test_whose_event_it_is(kind, name, ours):
    assert events.JobObjects("tune").has({"involvedObject": {"kind": kind, "name": name}}) is ours


# ---------------------------------------------------------------------------------------------------------------- init

ANSWERS = ("hf://meta-llama/Llama-3.1-8B@main", "s3://data/support.jsonl", "s3://adapters/support")


def test_init(golden):
    golden("init.yaml", init.text(init.Answers(*ANSWERS, credentials="object-store")))


@pytest.mark.parametrize("form", init.FORMATS)
def test_what_init_writes_is_valid_also_with_every_comment_taken_away(form):
    import re

    from qlora_cli.manifest import job_manifest
    from qlora_cli.text import kubernetes_yaml

    written = init.text(init.Answers(*ANSWERS, format=form))
    for pattern in (r"^(\s*)# (?=\s*[a-zA-Z]+:( |$))", r"^\s*#.*\n"):
        written = re.sub(pattern, r"\1" if "(" in pattern[:6] else "", written, flags=re.MULTILINE)
    (document,) = kubernetes_yaml.read(written, "uncommented")
    job = job_manifest.check(document)
    assert job.spec.scheduling.queue == "research"
    assert job.spec.lora.target_modules == ["q_proj", "v_proj"]


def test_init_refuses_what_the_api_would():
    from qlora_cli.manifest.job_manifest import RefusedError

    with pytest.raises(RefusedError, match=r'spec.model.source: "ftp://x" .*scheme "ftp://" is not known'):
        init.text(init.Answers("ftp://x", *ANSWERS[1:]))


@pytest.mark.parametrize("value", ["on", "2e-4", "a: b", "# no", "name", "é", "s3://bucket/path with space", "'", "-x"])
def test_init_quotes_what_yaml_would_take_for_something_else(value):
    from qlora_cli.text import kubernetes_yaml

    assert kubernetes_yaml.read(f"x: {init._scalar(value)}", "-")[0].value == {"x": value}


STAGE = {"name": "tokenizing the rows", "startTime": "2026-01-02T10:58:00Z"}


def test_a_job_that_prepares_says_its_stage_and_the_time_in_it():
    message = "tokenizing the rows: model and rows are checked before GPUs are requested"
    body = job("new", "Pending", "Preparing", message, stage=STAGE)
    spent = f"tokenizing the rows, {figures.age(time(STAGE['startTime']), NOW)}"
    assert f"Stage         {spent}" in text(show.page(view(body), body, NOW, 120))
    for width in (80, 160):
        assert spent in text(job_list.lines(*job_list.table([view(body)], NOW), width))
    assert spent in text(watch.page(board_of(body, running()), "team", NOW, 120, None))


def test_a_job_that_trains_is_in_no_stage():
    assert "Stage" not in text(show.page(view(running()), running(), NOW, 120))


def test_on_a_cluster_without_gpus_none_is_spoken_of():
    body = running(memory={"predicted": {"adapterWeights": GIB}, "measured": {"peak": 2 * GIB}})
    page = text(show.page(view(body), body, NOW, 120))
    assert "in 2 workers of 4 ranks on CPUs" in page
    assert "GPU" not in page


def test_the_next_command_names_a_namespace_where_it_is_not_that_of_the_context():
    assert job_list.next_command([view(waiting())], "qlora", "", "research") == "qlora show wide"
    assert job_list.next_command([view(waiting())], "qlora", "", "default") == "qlora show wide -n research"
    assert job_list.next_command([view(waiting())], "qlora", " -n research") == "qlora show wide -n research"
