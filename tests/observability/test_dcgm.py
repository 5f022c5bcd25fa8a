"""The expressions of the reference that join with DCGM's exporter, by promtool, in either style of its labels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fixtures import skip_unless_ci
from services.binaries import ToolMissingError
from services.prometheus import PromtoolError, promtool

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
EXPRESSIONS = re.findall(r"```promql\n(.+?)\n```", REFERENCE.read_text(), re.DOTALL)
CELLS = re.findall(r"^\| [\w' ]+ \| `([^|]+)` \|$", REFERENCE.read_text(), re.MULTILINE)
GPU = 'gpu="0",UUID="GPU-a",modelName="NVIDIA H100 80GB HBM3",Hostname="n",job="dcgm"'
HONOURED = f'DCGM_FI_DEV_GPU_UTIL{{{GPU},namespace="team",pod="one-1-0"}}'
EXPORTER = 'namespace="gpu-operator",pod="dcgm-x"'
RENAMED = f'DCGM_FI_DEV_GPU_UTIL{{{GPU},{EXPORTER},exported_namespace="team",exported_pod="one-1-0"}}'
IDLE = 'DCGM_FI_DEV_GPU_UTIL{gpu="1",UUID="GPU-b",job="dcgm",namespace="gpu-operator",pod="dcgm-x"}'
RANK = 'job="one",namespace="team",rank="0",pod="one-1-0"'
TRAINER = [
    {"series": f"qlora_attempt{{{RANK}}}", "values": "2x20"},
    {"series": f'qlora_device_info{{{RANK},device="NVIDIA H100 80GB HBM3",uuid="GPU-a"}}', "values": "1x20"},
]


def evaluated(tmp_path, expression, rows):
    """Labels of what an expression finds, by promtool: it says what it got instead of a sample that is not there."""
    nothing = {"labels": "nothing", "value": 0}
    test = {
        "interval": "1m",
        "input_series": rows,
        "promql_expr_test": [{"expr": expression, "eval_time": "10m", "exp_samples": [nothing]}],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
    try:
        promtool("test", "rules", path)
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    except PromtoolError as error:
        got = str(error).partition("got:")[2] or str(error)
        return [dict(re.findall(r'(\w+)="([^"]*)"', labels)) for labels in re.findall(r"\{([^}]*)\}", got)]
    raise AssertionError("promtool was content with a sample that is not there")


@pytest.mark.parametrize("utilization", [pytest.param(HONOURED, id="honoured"), pytest.param(RENAMED, id="renamed")])
def test_a_gpu_is_found_by_job_by_pod_and_by_rank(tmp_path, utilization):
    either, joined, by_rank = EXPRESSIONS
    rows = [*TRAINER, {"series": utilization, "values": "97x20"}, {"series": IDLE, "values": "0x20"}]
    pods = [(labels["namespace"], labels["pod"]) for labels in evaluated(tmp_path, either, rows)]
    assert ("team", "one-1-0") in pods
    (gpu,) = evaluated(tmp_path, joined, rows)
    assert gpu == {"namespace": "team", "job": "one", "pod": "one-1-0", "gpu": "0"}
    (rank,) = evaluated(tmp_path, by_rank, rows)
    assert rank == {"UUID": "GPU-a", "namespace": "team", "job": "one", "rank": "0"}


def test_numbers_made_of_several_are_expressions(tmp_path):
    assert len(CELLS) >= 5
    for expression in CELLS:
        assert evaluated(tmp_path, expression, TRAINER) == []
