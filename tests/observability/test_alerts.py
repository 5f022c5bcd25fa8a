"""Alert rules by promtool: each kind fires on series as they are recorded, and is quiet beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fixtures import skip_unless_ci
from services.binaries import ToolMissingError
from services.prometheus import PromtoolError, promtool

REPOSITORY = Path(__file__).parents[2]
RULES = REPOSITORY / "charts" / "qlora-operator" / "files" / "alerts.yaml"
ALERTS = {rule["alert"]: rule for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]}
JOB = 'job="one",namespace="team"'
WHO = {"job": "one", "namespace": "team"}


def series(name, values, **labels):
    pairs = ",".join([JOB, *(f'{key}="{value}"' for key, value in labels.items())])
    return {"series": f"{name}{{{pairs}}}", "values": values}


def alone(name, values, **labels):
    """A series that is of no job."""
    pairs = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{pairs}}}", "values": values}


def of_sweep(name, values):
    return alone(name, values, namespace="team", sweep="search")


def ended(reason, at, **labels):
    """A job's newest end for a reason, as the operator exports it from then on; ``at`` in seconds."""
    minutes = at // 60
    return series("qlora_job_attempt_end_timestamp_seconds", f"_x{minutes} {at}x200", reason=reason, **labels)


def working(section, rank, **labels):
    return series("qlora_section_seconds_total", "0+60x60", section=section, rank=rank, **labels)


def firing(tmp_path, rows, alert, at, rules=None):
    """Labels of the alerts of this name that fire at a time, by promtool: it says what it got instead of nothing."""
    if rules is None:
        bare = yaml.safe_load(RULES.read_text())
        for rule in bare["groups"][0]["rules"]:
            del rule["annotations"]  # of no account here, and promtool would compare them
        rules = tmp_path / "rules.yaml"
        rules.write_text(yaml.safe_dump(bare))
    test = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": rows,
                "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": []}],
            }
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(test))
    try:
        promtool("test", "rules", path)
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    except PromtoolError as error:
        return _found(str(error), alert)
    return []


def _found(said, alert):
    """The alerts in what promtool says it got."""
    found = [
        dict(re.findall(r'(\w+)="([^"]*)"', it)) for it in re.findall(r"Labels:\{([^}]*)\}", said.partition("got:")[2])
    ]
    assert found, said
    assert {labels.pop("alertname") for labels in found} == {alert}
    assert {labels.pop("severity") for labels in found} <= {"critical", "warning"}
    return found


OPERATOR = [
    alone("qlora_operator_reconcile_seconds_count", "0+60x120"),
    alone("qlora_operator_leading", "1x120", pod="a"),
    alone("qlora_operator_leading", "0x120", pod="b"),
]
QUIET_RANK = [series("qlora_heartbeat_timestamp_seconds", "0+60x5 300x60", rank="1")]

FIRES = [
    pytest.param(
        "QLoRAJobStalled",
        [*QUIET_RANK, working("Train", "1"), series("qlora_heartbeat_timestamp_seconds", "0+60x60", rank="0")],
        "20m",
        [{**WHO, "rank": "1"}],
        id="a-rank-that-does-not-finish-its-step-is-named",
    ),
    pytest.param(
        "QLoRAJobStalled",
        [ended("Stalled", 600)],
        "30m",
        [{**WHO, "reason": "Stalled"}],
        id="an-attempt-ended-as-stalled",
    ),
    pytest.param(
        "QLoRAJobOutOfMemoryLoop",
        [ended("OutOfDeviceMemory", 600), series("qlora_job_attempts", "_x5 1x5 2x100", reason="OutOfDeviceMemory")],
        "20m",
        [WHO],
        id="a-second-out-of-memory",
    ),
    pytest.param(
        "QLoRAJobOutOfMemoryLoop",
        [
            ended("OutOfHostMemory", 600),
            series("qlora_job_attempts", "1x100", reason="OutOfHostMemory"),
            series("qlora_job_attempts", "1x100", reason="OutOfDeviceMemory"),
        ],
        "20m",
        [WHO],
        id="once-on-the-card-and-once-on-the-host",
    ),
    pytest.param(
        "QLoRAJobLossNotFinite",
        [ended("NonFiniteLoss", 600)],
        "11m",
        [{**WHO, "reason": "NonFiniteLoss"}],
        id="a-loss-that-is-not-finite-ended-the-attempt",
    ),
    pytest.param(
        "QLoRAJobLossNotFinite",
        [series("qlora_gradient_norm", "1x5" + " Inf" * 20, rank="0")],
        "10m",
        [WHO],
        id="an-infinite-gradient-of-a-finite-loss",
    ),
    pytest.param(
        "QLoRAJobLossNotFinite",
        [series("qlora_gradient_norm", "1x5" + " NaN" * 20, rank="0")],
        "10m",
        [WHO],
        id="a-gradient-that-is-no-number",
    ),
    pytest.param(
        "QLoRAJobNoProgress",
        [
            # Attempts of new pods, each of which gets as far as the one before.
            series("qlora_step", "0+1x20 _x200", rank="0", pod="one-1-0"),
            series("qlora_step", "_x25 10+1x10 _x200", rank="0", pod="one-2-0"),
            series("qlora_step", "_x40 10+1x10 _x200", rank="0", pod="one-3-0"),
            series("qlora_step", "_x55 10+1x10 10+1x10 10+1x10", rank="0", pod="one-4-0"),
            series("qlora_steps_planned", "100x100", rank="0"),
        ],
        "80m",
        [WHO],
        id="attempts-that-come-no-further-than-those-before",
    ),
    pytest.param(
        "QLoRAJobDataStarved",
        [
            series("qlora_data_wait_seconds_total", "0+30x60", rank="0"),
            series("qlora_data_wait_seconds_total", "0+6x60", rank="1"),
        ],
        "30m",
        [WHO],
        id="ranks-wait-for-rows-a-third-of-the-time",
    ),
    pytest.param(
        "QLoRAPublishFailing",
        [ended("StorageFailed", 600)],
        "20m",
        [{**WHO, "reason": "StorageFailed"}],
        id="storage-out-of-reach",
    ),
    pytest.param(
        "QLoRAPublishFailing",
        [ended("AdapterRejected", 600)],
        "20m",
        [{**WHO, "reason": "AdapterRejected"}],
        id="adapter-rejected",
    ),
    pytest.param(
        "QLoRAJobBudgetNear",
        [series("qlora_job_gpu_seconds", "0+480x60"), series("qlora_job_budget_gpu_seconds", "28800x60")],
        "56m",
        [WHO],
        id="nine-tenths-of-the-gpu-hours-are-used",
    ),
    pytest.param(
        "QLoRAJobDeadlineNear",
        [
            series("qlora_job_deadline_timestamp_seconds", "7200x120"),
            series("qlora_steps_planned", "1000x120", rank="0"),
            series("qlora_step", "0+5x120", rank="0"),
            series("qlora_step_seconds_sum", "0+60x120", rank="0"),
            series("qlora_step_seconds_count", "0+5x120", rank="0"),
        ],
        "30m",
        [WHO],
        id="three-hours-of-steps-and-ninety-minutes-left",
    ),
    pytest.param(
        "QLoRASweepBudgetNear",
        [of_sweep("qlora_sweep_gpu_seconds", "0+480x60"), of_sweep("qlora_sweep_budget_gpu_seconds", "28800x60")],
        "56m",
        [{"namespace": "team", "sweep": "search"}],
        id="nine-tenths-of-a-sweeps-gpu-hours-are-used",
    ),
    pytest.param("QLoRAOperatorDown", [], "6m", [{}], id="no-operator-is-scraped"),
    pytest.param("QLoRAOperatorDown", [alone("qlora_operator_leading", "0x9")], "6m", [{}], id="no-operator-leads"),
    pytest.param(
        "QLoRAOperatorNotReconciling",
        [*OPERATOR, alone("qlora_operator_reconcile_errors_total", "0+50x120", kind="NoAnswer")],
        "25m",
        [{}],
        id="most-reconciles-fail",
    ),
    pytest.param(
        "QLoRAOperatorNotReconciling",
        [
            *OPERATOR,
            alone("qlora_operator_queue_wait_seconds_bucket", "0x120", le="60"),
            alone("qlora_operator_queue_wait_seconds_bucket", "0+60x120", le="120"),
            alone("qlora_operator_queue_wait_seconds_bucket", "0+60x120", le="+Inf"),
        ],
        "25m",
        [{}],
        id="jobs-wait-more-than-a-minute-for-their-turn",
    ),
    pytest.param(
        "QLoRAOperatorTaskFailing",
        [alone("qlora_operator_task_failures_total", "0+2x60", task="progress")],
        "20m",
        [{"task": "progress"}],
        id="a-task-fails-each-half-minute",
    ),
]

QUIET = [
    pytest.param("QLoRAJobStalled", [*QUIET_RANK, working("Load", "1")], "20m", id="a-large-base-takes-long-to-load"),
    pytest.param("QLoRAJobStalled", [*QUIET_RANK, working("Publish", "1")], "20m", id="a-merge-takes-long"),
    pytest.param("QLoRAJobStalled", [ended("Stalled", 600)], "75m", id="it-stalled-more-than-an-hour-ago"),
    pytest.param(
        "QLoRAJobStalled",
        [working("Train", "0"), series("qlora_heartbeat_timestamp_seconds", "0+60x60", rank="0")],
        "20m",
        id="steps-are-finished",
    ),
    pytest.param(
        "QLoRAJobOutOfMemoryLoop",
        [ended("OutOfDeviceMemory", 600), series("qlora_job_attempts", "1x100", reason="OutOfDeviceMemory")],
        "20m",
        id="one-out-of-memory-that-a-smaller-micro-batch-heals",
    ),
    pytest.param("QLoRAJobLossNotFinite", [ended("NodeLost", 600)], "11m", id="another-end"),
    pytest.param("QLoRAJobLossNotFinite", [series("qlora_gradient_norm", "90x20", rank="0")], "10m", id="a-large-norm"),
    pytest.param(
        "QLoRAJobNoProgress",
        [series("qlora_step", "0+1x200", rank="0"), series("qlora_steps_planned", "300x200", rank="0")],
        "90m",
        id="steps-are-done",
    ),
    pytest.param(
        "QLoRAJobNoProgress",
        [series("qlora_step", "0+1x20 20x100", rank="0"), series("qlora_steps_planned", "20x200", rank="0")],
        "100m",
        id="all-steps-are-done-and-it-publishes",
    ),
    pytest.param(
        "QLoRAJobNoProgress",
        [series("qlora_step", "0+1x20 _x100", rank="0"), series("qlora_steps_planned", "100x20 _x100", rank="0")],
        "60m",
        id="nothing-runs",
    ),
    pytest.param(
        "QLoRAJobDataStarved",
        [series("qlora_data_wait_seconds_total", "0+2x60", rank="0")],
        "30m",
        id="a-little-waiting",
    ),
    pytest.param("QLoRAPublishFailing", [ended("Preempted", 600)], "20m", id="preempted"),
    pytest.param("QLoRAJobBudgetNear", [series("qlora_job_gpu_seconds", "0+480x60")], "56m", id="no-budget"),
    pytest.param(
        "QLoRAJobDeadlineNear",
        [
            series("qlora_job_deadline_timestamp_seconds", "72000x120"),
            series("qlora_steps_planned", "1000x120", rank="0"),
            series("qlora_step", "0+5x120", rank="0"),
            series("qlora_step_seconds_sum", "0+60x120", rank="0"),
            series("qlora_step_seconds_count", "0+5x120", rank="0"),
        ],
        "30m",
        id="there-is-time",
    ),
    pytest.param(
        "QLoRASweepBudgetNear", [of_sweep("qlora_sweep_gpu_seconds", "0+480x60")], "56m", id="a-sweep-without-a-budget"
    ),
    pytest.param("QLoRAOperatorDown", OPERATOR, "30m", id="an-operator"),
    pytest.param(
        "QLoRAOperatorNotReconciling", [alone("qlora_operator_reconcile_seconds_count", "7x120")], "30m", id="idle"
    ),
    pytest.param(
        "QLoRAOperatorNotReconciling",
        [*OPERATOR, alone("qlora_operator_reconcile_errors_total", "0+2x120", kind="Conflict")],
        "30m",
        id="a-few-conflicts",
    ),
    pytest.param(
        "QLoRAOperatorTaskFailing",
        [alone("qlora_operator_task_failures_total", "0x10 1x50", task="progress")],
        "20m",
        id="a-task-failed-once",
    ),
]


@pytest.mark.parametrize(("alert", "rows", "at", "expected"), FIRES)
def test_fires(alert, rows, at, expected, tmp_path):
    assert firing(tmp_path, rows, alert, at) == expected


@pytest.mark.parametrize(("alert", "rows", "at"), QUIET)
def test_is_quiet(alert, rows, at, tmp_path):
    assert firing(tmp_path, rows, alert, at) == []


def test_every_alert_fires_and_is_quiet_in_a_test():
    assert {case.values[0] for case in FIRES} == set(ALERTS)
    assert {case.values[0] for case in QUIET} == set(ALERTS)


@pytest.mark.parametrize("name", [name for name in ALERTS if name.startswith(("QLoRAJob", "QLoRAPublish"))])
def test_an_alert_about_a_job_names_it(name):
    assert "{{ $labels.namespace }}/{{ $labels.job }}" in ALERTS[name]["annotations"]["summary"]


def test_an_alert_says_who_and_what(tmp_path):
    rows = [*QUIET_RANK, working("Train", "1")]
    with pytest.raises(PromtoolError, match=r"team/one, rank 1, makes no progress"):
        promtool_on_the_real_file(tmp_path, rows, "QLoRAJobStalled", "20m")
    with pytest.raises(PromtoolError, match=r"team/one makes no progress"):
        promtool_on_the_real_file(tmp_path, [ended("Stalled", 600)], "QLoRAJobStalled", "20m")


def promtool_on_the_real_file(tmp_path, rows, alert, at):
    expected = [{"eval_time": at, "alertname": alert, "exp_alerts": []}]
    test = {"interval": "1m", "input_series": rows, "alert_rule_test": expected}
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", path)


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_an_alert_has_a_page_that_says_what_it_means_how_to_look_and_what_to_do(alert):
    where = ALERTS[alert]["annotations"]["runbook_url"]
    assert where == f"docs/runbooks/{alert}.md"
    page = (REPOSITORY / where).read_text()
    assert page.startswith(f"# {alert}\n")
    for heading in ("## What it means", "## How to look", "## What to do"):
        assert f"\n{heading}\n" in page
    assert set(re.findall(r"qlora_[a-z_]+|QLoRA[A-Z]\w+", page)) & {alert}


def test_no_page_is_of_an_alert_that_is_gone():
    assert {p.stem for p in (REPOSITORY / "docs" / "runbooks").glob("*.md")} == {*ALERTS, "index"}
