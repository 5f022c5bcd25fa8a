"""Choice of the run that a call of 'qlora run' continues, by what an earlier one left."""

from __future__ import annotations

import pytest

from qlora_api import QLoRAJobSpec
from qlora_api.spec import ComputeType
from qlora_cli.local.processes import in_use
from qlora_cli.local.run_folder import Refuse, ResumeRun, locked, new_record, now, opening


def spec(**quantization):
    return QLoRAJobSpec.model_validate(
        {
            "model": {"source": "hf://a/model"},
            "dataset": {"train": {"source": "rows.jsonl"}, "format": "Text"},
            "quantization": quantization,
            "training": {"epochs": 1},
            "output": {"destination": "out"},
        }
    )


@pytest.mark.parametrize(("trained", "kept"), [(True, ComputeType.BFLOAT16), (False, ComputeType.AUTO)])
def test_a_run_that_trained_keeps_its_compute_type_and_another_follows_the_device(trained, kept):
    began = new_record("job", spec(computeType="BFloat16"), now())
    found = opening(began, spec(), trained=trained)
    assert isinstance(found, ResumeRun)
    assert found.record.spec.quantization.compute_type is kept


def test_another_compute_type_than_the_one_that_was_trained_in_is_refused():
    began = new_record("job", spec(computeType="BFloat16"), now())
    found = opening(began, spec(computeType="Float32"), trained=True)
    assert isinstance(found, Refuse)
    assert [change.field for change in found.changes] == ["spec.quantization.computeType"]


def test_a_lock_names_its_process_for_as_long_as_it_is_held(tmp_path):
    """A sweep holds the lock of one trial after the other."""
    with locked(tmp_path, "job"):
        assert in_use(tmp_path / "job")
    assert not in_use(tmp_path / "job")
