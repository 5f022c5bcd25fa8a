"""Job: whether one training learns, how fast, and where its time goes."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from observability.dashboards.dcgm import of_job
from observability.dashboards.panels import (
    EACH_JOB,
    JOB,
    NO_DCGM,
    NO_GPU,
    PERCENT,
    AnnotationQuery,
    Query,
    board,
    choice,
    figure,
    lines,
)

BEFORE = " offset $__interval"
LEFT = f"(max {EACH_JOB} (qlora_steps_planned{{{JOB}}}) - max {EACH_JOB} (qlora_step{{{JOB}}}))"
STEP = f'qlora_step_seconds_{{part}}{{{{{JOB},rank="0"}}}}'
MEAN_STEP = " / ".join(f"max {EACH_JOB} (rate({STEP.format(part=p)}[$__rate_interval]))" for p in ("sum", "count"))
SPEED = f"max {EACH_JOB} (qlora_tokens_per_second{{{JOB}}})"
OF_PEAK = (
    f"{SPEED} * max {EACH_JOB} (qlora_flops_per_token{{{JOB}}})"
    f" / sum {EACH_JOB} (qlora_device_peak_flops_per_second{{{JOB}}})"
)
PEAK_TEXT = (
    "Arithmetic of the tokens trained on, forward and backward without recomputation, over what the cards do at their "
    "best (dense BF16, by data sheet). No card, or one that is not known: nothing."
)


def job() -> dashboard.Dashboard:
    """Return the dashboard."""
    made = board("qlora-job", "QLoRA / Job", "One training: loss, speed, time and attempts")
    made.with_variable(choice("namespace", "Namespace", "label_values(qlora_step, namespace)", several=False))
    jobs = 'label_values(qlora_step{namespace=~"$namespace"}, job)'
    made.with_variable(choice("job", "Job", jobs, several=False))
    made.annotation(
        AnnotationQuery("Attempts", f"{_numbers()} unless {_numbers(BEFORE)}", "Attempt {{attempt}}", "blue")
    )
    made.annotation(
        AnnotationQuery("Ends", f"{_ends()} unless ({_ends()} == {_ends(BEFORE)})", "Ended: {{reason}}", "red")
    )
    _now(made)
    _learning(made)
    _speed(made)
    _ranks(made)
    return made


def _numbers(before: str = "") -> str:
    """Return a series for each attempt: its number as a label."""
    return f'count_values {EACH_JOB} ("attempt", qlora_attempt{{{JOB},rank="0"}}{before})'


def _ends(before: str = "") -> str:
    return f"max by (namespace, job, reason) (qlora_job_attempt_end_timestamp_seconds{{{JOB}}}{before})"


def _now(made: dashboard.Dashboard) -> None:
    done = f"max {EACH_JOB} (qlora_step{{{JOB}}}) / max {EACH_JOB} (qlora_steps_planned{{{JOB}}})"
    for panel in (
        figure("Done", "Optimizer steps, of those planned.", PERCENT, Query(done), max=1),
        figure("Time left", "Steps left times the time of the last ones.", "s", Query(f"{LEFT} * ({MEAN_STEP})")),
        figure(
            "Loss",
            "Of the last step's target tokens.",
            "none",
            Query(f"max {EACH_JOB} (qlora_loss{{{JOB}}})"),
            decimals=3,
        ),
        figure(
            "Eval loss",
            "Of the evaluation rows' target tokens, the newest.",
            "none",
            Query(f"max {EACH_JOB} (qlora_eval_loss{{{JOB}}})"),
            decimals=3,
        ),
        figure("Share of peak", PEAK_TEXT, PERCENT, Query(OF_PEAK), decimals=1).no_value(NO_GPU),
        figure("Attempt", "The number of the one at work.", "none", Query(f"max {EACH_JOB} (qlora_attempt{{{JOB}}})")),
    ):
        made.with_panel(panel)


def _learning(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("Does it learn"))
    made.with_panel(
        lines(
            "Loss",
            "Nats a token. Lines mark attempts: a resumed one goes on where its checkpoint was.",
            "none",
            Query(f"max {EACH_JOB} (qlora_loss{{{JOB}}})", "training"),
            Query(f"max {EACH_JOB} (qlora_eval_loss{{{JOB}}})", "evaluation"),
        )
    )
    made.with_panel(
        lines(
            "Gradient norm",
            "L2 over all that learns, before clipping. A rise that stays comes before a loss that is not finite.",
            "none",
            Query(f"max {EACH_JOB} (qlora_gradient_norm{{{JOB}}})", "norm"),
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Learning rate",
            "As the schedule has it.",
            "sci",
            Query(f"max {EACH_JOB} (qlora_learning_rate{{{JOB}}})", "learning rate"),
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Steps",
            "Done, and planned. Steps that fall back were repeated from a checkpoint.",
            "none",
            Query(f"max {EACH_JOB} (qlora_step{{{JOB}}})", "done"),
            Query(f"max {EACH_JOB} (qlora_steps_planned{{{JOB}}})", "planned", dashed=True),
            min=0,
        )
    )
    for title, text, metric in (
        (
            "Loss scale",
            "Only in Float16: what losses are multiplied by. It halves at an overflow, and doubles after 2,000 steps.",
            "qlora_loss_scale",
        ),
        (
            "Skipped updates",
            "Only in Float16: steps whose update was left out because the loss or a gradient overflowed.",
            "qlora_skipped_steps",
        ),
    ):
        made.with_panel(lines(title, text, "short", Query(f"max {EACH_JOB} ({metric}{{{JOB}}})", title.lower()), min=0))


def _speed(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("How fast, and where the time goes"))
    tokens = f'max {EACH_JOB} (rate(qlora_tokens_total{{{JOB},rank="0"}}[$__rate_interval]))'
    made.with_panel(
        lines(
            "Tokens per second",
            "Real tokens, no padding, over all ranks: of steps alone, and of all time with evaluation and checkpoints.",
            "short",
            Query(SPEED, "while it trains"),
            Query(tokens, "over all"),
            min=0,
        )
    )
    share = lines("Share of the cards' peak", PEAK_TEXT, PERCENT, Query(OF_PEAK, "share"), min=0, max=1)
    made.with_panel(share.no_value(NO_GPU))
    sections = f"avg by (section) (rate(qlora_section_seconds_total{{{JOB}}}[$__rate_interval]))"
    made.with_panel(
        lines(
            "Time by section",
            "Of each second, what a rank spends it on, in the mean over the ranks.",
            PERCENT,
            Query(sections, "{{section}}"),
            stacked=True,
            min=0,
            max=1,
        )
    )
    buckets = f"sum by (le) (rate({STEP.format(part='bucket')}[$__rate_interval]))"
    made.with_panel(
        lines(
            "Time of a step",
            "Rows, forward, backward and update.",
            "s",
            Query(MEAN_STEP, "mean"),
            Query(f"histogram_quantile(0.99, {buckets})", "99%"),
            min=0,
        )
    )


def _ranks(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("Ranks"))
    by_rank = "by (rank)"
    made.with_panel(
        lines(
            "Waiting for rows",
            "Share of a rank's time. Above a few percent the GPU stands still for data.",
            PERCENT,
            Query(f"max {by_rank} (rate(qlora_data_wait_seconds_total{{{JOB}}}[$__rate_interval]))", "rank {{rank}}"),
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Silence",
            "Since each rank last gave a sign of life: a section begun, a step, a batch or a file done. One that "
            "hangs rises without end.",
            "s",
            Query(f"max {by_rank} (time() - qlora_heartbeat_timestamp_seconds{{{JOB}}})", "rank {{rank}}"),
            min=0,
        )
    )
    made.with_row(dashboard.Row("GPUs, by DCGM's exporter"))
    made.with_panel(
        lines(
            "GPU utilization",
            "Where the exporter is scraped: the share of time in which some kernel ran. Busy is not fast: "
            "the share of the peak says how much of it is of use.",
            PERCENT,
            Query(of_job("DCGM_FI_DEV_GPU_UTIL", "gpu") + " / 100", "{{pod}} GPU {{gpu}}"),
            min=0,
            max=1,
        ).no_value(NO_DCGM)
    )
    made.with_panel(
        lines(
            "Power",
            "A card well under its limit that trains is waiting for memory or for rows.",
            "watt",
            Query(of_job("DCGM_FI_DEV_POWER_USAGE", "gpu"), "{{pod}} GPU {{gpu}}"),
            min=0,
        ).no_value(NO_DCGM)
    )
