"""GPU memory: what was predicted and what is measured, by component and by rank, and what is left."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from observability.dashboards.panels import (
    EACH_JOB,
    JOB,
    NO_GPU,
    PERCENT,
    WIDTH,
    Query,
    board,
    choice,
    figure,
    lines,
    side_by_side,
)

COMPONENT = "qlora_memory_component_bytes"
PREDICTED = "qlora_memory_predicted_bytes"
PEAK = f'max {EACH_JOB} ({COMPONENT}{{{JOB},component="peak"}})'
PLANNED_PEAK = f'max {EACH_JOB} ({PREDICTED}{{{JOB},component="peak"}})'
TOTAL, FREE = f"qlora_gpu_memory_total_bytes{{{JOB}}}", f"qlora_gpu_memory_free_bytes{{{JOB}}}"
GPU = "qlora_gpu_memory"


def memory() -> dashboard.Dashboard:
    """Return the dashboard."""
    made = board("qlora-memory", "QLoRA / GPU memory", "Predicted and measured memory of one training")
    made.with_variable(choice("namespace", "Namespace", "label_values(qlora_step, namespace)", several=False))
    jobs = 'label_values(qlora_step{namespace=~"$namespace"}, job)'
    made.with_variable(choice("job", "Job", jobs, several=False))
    _now(made)
    _components(made)
    _ranks(made)
    _learned(made)
    return made


def _now(made: dashboard.Dashboard) -> None:
    for panel in (
        figure(
            "Measured peak",
            "Peak of the rank with the most memory; on a CPU, of the whole process.",
            "bytes",
            Query(PEAK),
        ),
        figure(
            "Predicted peak", "Peak predicted by Prepare, before GPUs were requested.", "bytes", Query(PLANNED_PEAK)
        ),
        figure(
            "Prediction",
            "Predicted divided by measured peak. Above 100%, memory was left unused; below, the plan was too low.",
            PERCENT,
            Query(f"{PLANNED_PEAK} / {PEAK}"),
            decimals=1,
        ),
        figure("GPU memory", "Memory of the smallest GPU.", "bytes", Query(f"min {EACH_JOB} ({TOTAL})")).no_value(
            NO_GPU
        ),
        figure(
            "Headroom now",
            "Free share of the fullest GPU's memory, by NVML, which includes other processes.",
            PERCENT,
            Query(f"min {EACH_JOB} ({FREE} / {TOTAL})"),
            decimals=1,
            max=1,
        ).no_value(NO_GPU),
        figure(
            "Headroom at the peak",
            (
                "Share of the fullest GPU's memory that PyTorch never used. Below 5%, a longer row may "
                "run out of memory."
            ),
            PERCENT,
            Query(f"min {EACH_JOB} (1 - {GPU}_peak_bytes{{{JOB}}} / {TOTAL})"),
            decimals=1,
            max=1,
        ).no_value(NO_GPU),
    ):
        made.with_panel(panel)


def _components(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("By component"))
    no_peak = f'{{{JOB},component!="peak"}}'
    made.with_panel(
        side_by_side(
            "Predicted and measured",
            (
                "Components of the rank with the most memory. Activations and workspaces are only "
                "predicted; they are part of the measured peak."
            ),
            "bytes",
            "component",
            Query(f"max by (component) ({PREDICTED}{no_peak})", "predicted"),
            Query(f"max by (component) ({COMPONENT}{no_peak})", "measured"),
        ).height(12)
    )
    made.with_panel(
        lines(
            "Measured",
            "Components of the rank with the most memory, stacked; dashed lines are the peaks.",
            "bytes",
            Query(f"max by (component) ({COMPONENT}{no_peak})", "{{component}}"),
            Query(PEAK, "measured peak", dashed=True),
            Query(PLANNED_PEAK, "predicted peak", dashed=True),
            stacked=True,
            min=0,
        ).height(12)
    )


def _learned(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("Over all jobs"))
    made.with_panel(
        lines(
            "Learned correction",
            (
                "Measured over predicted peak by GPU and quantization, from successful jobs. Predictions "
                "for later jobs are multiplied by it. It is limited to 0.95 to 1.15; if it stays at a "
                "limit, the formulas miss something."
            ),
            PERCENT,
            Query("max by (gpu, quantization) (qlora_operator_memory_correction)", "{{gpu}}, {{quantization}}"),
            span=WIDTH,
        ).no_value("No job on a GPU succeeded yet")
    )


def _ranks(made: dashboard.Dashboard) -> None:
    made.with_row(dashboard.Row("By rank"))
    made.with_panel(
        lines(
            "Held by tensors",
            "GPU memory of PyTorch's tensors, and its maximum in this attempt.",
            "bytes",
            Query(f"max by (rank) ({GPU}_allocated_bytes{{{JOB}}})", "rank {{rank}}"),
            Query(f"max by (rank) ({GPU}_peak_bytes{{{JOB}}})", "rank {{rank}}, peak", dashed=True),
            min=0,
        ).no_value(NO_GPU)
    )
    kept = f"max by (rank) ({GPU}_reserved_bytes{{{JOB}}} - {GPU}_allocated_bytes{{{JOB}}})"
    made.with_panel(
        lines(
            "Reserved by the allocator",
            "Memory that PyTorch reserves beyond its tensors: cached blocks, and gaps that no tensor fits into.",
            "bytes",
            Query(kept, "rank {{rank}}"),
            min=0,
        ).no_value(NO_GPU)
    )
    made.with_panel(
        lines(
            "Free GPU memory",
            "Free GPU memory, by NVML. If the next allocation needs more, the attempt runs out of memory.",
            "bytes",
            Query(f"min by (rank) ({FREE})", "rank {{rank}}"),
            min=0,
        ).no_value(NO_GPU)
    )
    made.with_panel(
        lines(
            "PCIe traffic",
            (
                "PCIe traffic just before each scrape, by NVML. With a paged optimizer, traffic at every "
                "update means that its state does not fit on the GPU. Offload and checkpoints also cause "
                "traffic."
            ),
            "Bps",
            Query(
                f"max by (rank, direction) (qlora_gpu_pcie_bytes_per_second{{{JOB}}})", "rank {{rank}}, {{direction}}"
            ),
            min=0,
        ).no_value(NO_GPU)
    )
    made.with_panel(
        lines(
            "Host memory of each rank",
            "Resident memory, including offloaded and paged optimizer state.",
            "bytes",
            Query(f"max by (rank) (qlora_host_memory_resident_bytes{{{JOB}}})", "rank {{rank}}"),
            min=0,
        )
    )
    made.with_panel(
        lines(
            "Available host memory",
            "Available memory of each node: the minimum over its ranks.",
            "bytes",
            Query(f"min {EACH_JOB} (qlora_host_memory_available_bytes{{{JOB}}})", "available"),
            min=0,
        )
    )
