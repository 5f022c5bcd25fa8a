"""Fleet: what the GPUs of a cluster are held for, who waits, what fails, what it costs."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from observability.dashboards.panels import (
    NAMESPACE,
    PERCENT,
    Column,
    Query,
    board,
    choice,
    figure,
    lines,
    rows,
    totals,
)

GPU_TIME = f"qlora_operator_gpu_seconds_total{{{NAMESPACE}}}"
TRAINING = f'qlora_section_seconds_total{{{NAMESPACE},section="Train"}}'
ATTEMPTS = "qlora_operator_attempts_total"
OUT_OF_MEMORY = f'{ATTEMPTS}{{reason=~"OutOf(Device|Host)Memory"}}'
STALLED = f'{ATTEMPTS}{{reason="Stalled"}}'
STATES = {
    "/^Running/": "green",
    "/^Pending/": "yellow",
    "/^Suspended/": "purple",
    "/^Failed/": "red",
    "/^Succeeded/": "blue",
}
EFFECTIVE = (
    "Share of the paid GPU time in which ranks trained. The rest is loading, waiting for "
    "rows, evaluation, checkpoints, publishing and idle time."
)


def fleet() -> dashboard.Dashboard:
    """Return the dashboard."""
    made = board("qlora-fleet", "QLoRA / Fleet", "GPUs, jobs, failures and cost of all QLoRAJobs", since="now-24h")
    made.with_variable(choice("namespace", "Namespace", "label_values(qlora_operator_jobs, namespace)", several=True))
    made.with_variable(dashboard.TextBoxVariable("price").label("USD per GPU-hour").default_value("2.50"))
    _now(made)
    _queue(made)
    _sweeps(made)
    _failures(made)
    _cost(made)
    _operator(made)
    return made


def _now(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("Now"))
    gpus = f"qlora_operator_gpus{{{NAMESPACE},state="
    jobs = f"qlora_operator_jobs{{{NAMESPACE},state="
    longest = f"max(qlora_operator_pending_seconds{{{NAMESPACE}}})"
    for panel in (
        figure("GPUs held", "GPUs requested by pods on nodes.", "short", Query(f'sum({gpus}"Held"}})')),
        figure(
            "GPUs waiting",
            "GPUs of attempts whose pods are not scheduled yet.",
            "short",
            Query(f'sum({gpus}"Waiting"}})'),
            steps=((1, "yellow"),),
        ),
        figure("Running jobs", "Jobs in state Running.", "short", Query(f'sum({jobs}"Running"}})')),
        figure(
            "Longest wait",
            "Longest time since a waiting job was created or last ran.",
            "s",
            Query(longest),
            steps=((900, "yellow"), (3600, "red")),
        ),
        figure(
            "Effective GPU time",
            EFFECTIVE,
            PERCENT,
            Query(f"sum(rate({TRAINING}[$__rate_interval])) / sum(rate({GPU_TIME}[$__rate_interval]))"),
            max=1,
        ),
        figure(
            "Cost",
            "GPU time in the selected range, at the price above.",
            "currencyUSD",
            Query(f"sum(increase({GPU_TIME}[$__range])) / 3600 * $price"),
        ),
    ):
        made.with_panel(panel.no_value("0"))
    key = "by (namespace, job)"
    steps, planned = f"max {key} (qlora_step{{{NAMESPACE}}})", f"max {key} (qlora_steps_planned{{{NAMESPACE}}})"
    made.with_panel(
        rows(
            "Unfinished jobs",
            (
                "State, progress, speed and highest GPU memory of each job. Trainers that are not scraped "
                "show no figures."
            ),
            (("namespace", "Namespace"), ("job", "Job"), ("state", "State"), ("reason", "Reason")),
            f'max by (namespace, job, state, reason) (qlora_job_state{{{NAMESPACE},state!~"Succeeded|Failed"}})',
            (
                Column("Done", f"{steps} / {planned}", PERCENT, gauge=True),
                Column("Loss", f"max {key} (qlora_loss{{{NAMESPACE}}})", "short"),
                Column("Tokens/s", f"max {key} (qlora_tokens_per_second{{{NAMESPACE}}})", "short"),
                Column("Attempt", f"max {key} (qlora_attempt{{{NAMESPACE}}})", "none"),
                Column("GPU time", f"max {key} (qlora_job_gpu_seconds{{{NAMESPACE}}})", "s"),
                Column("Expected", f"max {key} (qlora_job_expected_gpu_seconds{{{NAMESPACE}}})", "s"),
            ),
        )
    )


def _sweeps(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("Sweeps"))
    made.with_panel(
        lines(
            "Sweeps by state",
            "QLoRASweeps by state, those that are over included.",
            "short",
            Query(f"sum by (state) (qlora_operator_sweeps{{{NAMESPACE}}})", "{{state}}"),
            stacked=True,
            span=24,
            colours=STATES,
            min=0,
        )
    )
    key = "by (namespace, sweep)"
    trials = f"max {key} (qlora_sweep_trials{{{NAMESPACE},state"
    made.with_panel(
        rows(
            "Unfinished sweeps",
            "Trials, GPU time and the best value so far of each sweep. The budget is that of all trials together.",
            (("namespace", "Namespace"), ("sweep", "Sweep")),
            f'max {key} (qlora_sweep_trials{{{NAMESPACE},state="Running"}})',
            (
                Column("Running", f'{trials}="Running"}})', "none"),
                Column("Suspended", f'{trials}="Suspended"}})', "none"),
                Column("Succeeded", f'{trials}="Succeeded"}})', "none"),
                Column("Failed", f'{trials}="Failed"}})', "none"),
                Column("Best value", f"max {key} (qlora_sweep_best_value{{{NAMESPACE}}})", "short"),
                Column("GPU time", f"max {key} (qlora_sweep_gpu_seconds{{{NAMESPACE}}})", "s"),
                Column("Budget", f"max {key} (qlora_sweep_budget_gpu_seconds{{{NAMESPACE}}})", "s"),
            ),
        )
    )


def _queue(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("Queue"))
    made.with_panel(
        lines(
            "GPUs held and waiting",
            "GPUs requested by pods on nodes, and GPUs that attempts wait for.",
            "short",
            Query(f"sum by (state) (qlora_operator_gpus{{{NAMESPACE}}})", "{{state}}"),
            stacked=True,
            colours={"/^Held/": "green", "/^Waiting/": "yellow"},
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Longest wait by reason",
            (
                "Longest time of the jobs that wait now: Unschedulable (no node has room), Queued (not "
                "admitted), QuotaExceeded, Starting and others."
            ),
            "s",
            Query(f"max by (reason) (qlora_operator_pending_seconds{{{NAMESPACE}}})", "{{reason}}"),
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Jobs by state and reason",
            "All QLoRAJobs.",
            "short",
            Query(f"sum by (state, reason) (qlora_operator_jobs{{{NAMESPACE}}})", "{{state}} · {{reason}}"),
            stacked=True,
            span=24,
            colours=STATES,
            min=0,
        )
    )


def _failures(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("Ends of attempts"))
    made.with_panel(
        lines(
            "Attempts that ended",
            "Ended attempts in the hour before each point, by reason, in all namespaces. Preempted and NodeLost do not "
            "count against a job's restarts.",
            "short",
            Query(f"sum by (reason) (increase({ATTEMPTS}[1h])) > 0", "{{reason}}"),
            bars=True,
            stacked=True,
            min=0,
        )
    )
    share = "sum(increase({}[6h])) / clamp_min(sum(increase(" + ATTEMPTS + "[6h])), 1)"
    made.with_panel(
        lines(
            "Out of memory and stalled",
            "Share of these reasons in the attempts that ended in the six hours before each point.",
            PERCENT,
            Query(share.format(OUT_OF_MEMORY), "out of memory"),
            Query(share.format(STALLED), "stalled"),
            min=0,
            max=1,
        )
    )


def _cost(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("Cost by namespace"))
    used = f"sum by (namespace) (increase({GPU_TIME}[$__range])) / 3600"
    made.with_panel(
        totals(
            "GPU-hours",
            "GPU-hours by namespace in the selected range.",
            "h",
            Query(used, "{{namespace}}"),
            span=6,
            min=0,
        )
    )
    made.with_panel(
        totals(
            "Cost",
            "GPU-hours at the price above, by namespace, in the selected range.",
            "currencyUSD",
            Query(f"{used} * $price", "{{namespace}}"),
            span=6,
            min=0,
        )
    )
    train = f"sum by (namespace) (rate({TRAINING}[$__rate_interval]))"
    made.with_panel(
        lines(
            "Effective GPU time",
            EFFECTIVE,
            PERCENT,
            Query(f"{train} / sum by (namespace) (rate({GPU_TIME}[$__rate_interval]))", "{{namespace}}"),
            min=0,
            max=1,
        )
    )


def _operator(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("The operator"))
    late = "histogram_quantile({}, sum by (le) (rate({}_bucket[$__rate_interval])))"
    reconcile, queue = "qlora_operator_reconcile_seconds", "qlora_operator_queue_wait_seconds"
    made.with_panel(
        lines(
            "Reconciles",
            "Duration of a reconcile, and time that a job waits in the work queue.",
            "s",
            Query(late.format("0.5", reconcile), "reconcile, median"),
            Query(late.format("0.99", reconcile), "reconcile, 99%"),
            Query(late.format("0.99", queue), "wait for a turn, 99%"),
            span=8,
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Requests to the API server",
            "Requests by verb and status code; 0 means no answer.",
            "reqps",
            Query(
                "sum by (verb, code) (rate(qlora_operator_api_requests_total[$__rate_interval]))", "{{verb}} {{code}}"
            ),
            span=8,
            stacked=True,
            min=0,
        )
    )
    errors = "sum by (kind) (rate(qlora_operator_reconcile_errors_total[$__rate_interval]))"
    made.with_panel(
        lines(
            "Reconciles and those that failed",
            "Failed reconciles are retried with growing delays. A few conflicts are normal.",
            "ops",
            Query(f"sum(rate({reconcile}_count[$__rate_interval]))", "all"),
            Query(errors, "{{kind}}"),
            span=8,
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Skipped and restarted",
            (
                "Objects that were skipped and tasks that were restarted, so that one object or pod does "
                "not affect the others."
            ),
            "short",
            Query("sum by (task) (increase(qlora_operator_task_failures_total[5m]))", "task {{task}} failed"),
            Query(
                "sum by (kind, reason) (increase(qlora_operator_objects_skipped_total[5m])) > 0",
                "{{kind}} · {{reason}}",
            ),
            Query("sum(increase(qlora_operator_reports_rejected_total[5m]))", "answers that are no progress report"),
            Query("sum(increase(qlora_operator_contested_jobs_total[5m]))", "Jobs left to another release"),
            Query(f"sum(qlora_operator_uncounted_jobs{{{NAMESPACE}}})", "jobs with a figure that is no number"),
            span=8,
            min=0,
        )
    )
