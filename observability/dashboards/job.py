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
    "Model FLOPS utilization: arithmetic of the trained tokens, forward and backward without "
    "recomputation, divided by the GPUs' peak (dense BF16, from the data sheet). Empty "
    "without a GPU or for an unknown one."
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
        figure("Done", "Completed share of the planned optimizer steps.", PERCENT, Query(done), max=1),
        figure(
            "Time left",
            "Remaining steps, multiplied by the time of the last ones.",
            "s",
            Query(f"{LEFT} * ({MEAN_STEP})"),
        ),
        figure(
            "Loss",
            "Mean loss of the last step's target tokens.",
            "none",
            Query(f"max {EACH_JOB} (qlora_loss{{{JOB}}})"),
            decimals=3,
        ),
        figure(
            "Eval loss",
            "Mean loss of the evaluation rows' target tokens, from the newest evaluation.",
            "none",
            Query(f"max {EACH_JOB} (qlora_eval_loss{{{JOB}}})"),
            decimals=3,
        ),
        figure("Share of peak", PEAK_TEXT, PERCENT, Query(OF_PEAK), decimals=1).no_value(NO_GPU),
        figure("Attempt", "Number of the current attempt.", "none", Query(f"max {EACH_JOB} (qlora_attempt{{{JOB}}})")),
    ):
        made.with_panel(panel)


def _learning(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("Learning"))
    made.with_panel(
        lines(
            "Loss",
            "Loss in nats per token. Vertical lines mark attempts; an attempt resumes from its checkpoint.",
            "none",
            Query(f"max {EACH_JOB} (qlora_loss{{{JOB}}})", "training"),
            Query(f"max {EACH_JOB} (qlora_eval_loss{{{JOB}}})", "evaluation"),
        )
    )
    made.with_panel(
        lines(
            "Gradient norm",
            "Global L2 norm before clipping. A lasting rise often precedes a loss that is not finite.",
            "none",
            Query(f"max {EACH_JOB} (qlora_gradient_norm{{{JOB}}})", "norm"),
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Learning rate",
            "Learning rate of each step, from the schedule.",
            "sci",
            Query(f"max {EACH_JOB} (qlora_learning_rate{{{JOB}}})", "learning rate"),
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Steps",
            "Completed and planned steps. A drop means that steps were repeated from a checkpoint.",
            "none",
            Query(f"max {EACH_JOB} (qlora_step{{{JOB}}})", "done"),
            Query(f"max {EACH_JOB} (qlora_steps_planned{{{JOB}}})", "planned", dashed=True),
            min=0,
        )
    )
    for title, text, metric in (
        (
            "Loss scale",
            (
                "Float16 only: factor by which losses are multiplied. It is halved after an overflow and "
                "doubled after 2,000 steps without one."
            ),
            "qlora_loss_scale",
        ),
        (
            "Skipped updates",
            "Float16 only: steps whose update was skipped because the loss or a gradient overflowed.",
            "qlora_skipped_steps",
        ),
    ):
        made.with_panel(lines(title, text, "short", Query(f"max {EACH_JOB} ({metric}{{{JOB}}})", title.lower()), min=0))


def _speed(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("Speed and time"))
    tokens = f'max {EACH_JOB} (rate(qlora_tokens_total{{{JOB},rank="0"}}[$__rate_interval]))'
    made.with_panel(
        lines(
            "Tokens per second",
            (
                "Tokens of all ranks without padding: during steps, and over the whole time with "
                "evaluation and checkpoints."
            ),
            "short",
            Query(SPEED, "while it trains"),
            Query(tokens, "over all"),
            min=0,
        )
    )
    share = lines("Share of the GPUs' peak", PEAK_TEXT, PERCENT, Query(OF_PEAK, "share"), min=0, max=1)
    made.with_panel(share.no_value(NO_GPU))
    sections = f"avg by (section) (rate(qlora_section_seconds_total{{{JOB}}}[$__rate_interval]))"
    made.with_panel(
        lines(
            "Time by section",
            "Share of time by section, as the mean over the ranks.",
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
            "Time for rows, forward, backward and update.",
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
            "Share of a rank's time spent waiting for rows. Above a few percent, the GPU is idle because of data.",
            PERCENT,
            Query(f"max {by_rank} (rate(qlora_data_wait_seconds_total{{{JOB}}}[$__rate_interval]))", "rank {{rank}}"),
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Time since the last heartbeat",
            (
                "Time since the last heartbeat of each rank: a section began, or a step, a batch or a "
                "file was finished. It keeps rising if a rank hangs."
            ),
            "s",
            Query(f"max {by_rank} (time() - qlora_heartbeat_timestamp_seconds{{{JOB}}})", "rank {{rank}}"),
            min=0,
        )
    )
    made.with_row(dashboard.Row("GPUs, by DCGM's exporter"))
    made.with_panel(
        lines(
            "GPU utilization",
            (
                "Share of time in which any kernel ran, if DCGM's exporter is scraped. A busy GPU is not "
                "always efficient; see the share of the peak."
            ),
            PERCENT,
            Query(of_job("DCGM_FI_DEV_GPU_UTIL", "gpu") + " / 100", "{{pod}} GPU {{gpu}}"),
            min=0,
            max=1,
        ).no_value(NO_DCGM)
    )
    made.with_panel(
        lines(
            "Power",
            "A GPU that trains well below its power limit waits for memory or for rows.",
            "watt",
            Query(of_job("DCGM_FI_DEV_POWER_USAGE", "gpu"), "{{pod}} GPU {{gpu}}"),
            min=0,
        ).no_value(NO_DCGM)
    )
