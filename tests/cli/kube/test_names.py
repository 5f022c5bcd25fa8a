"""Names that are written down twice, so that a command starts quickly, are the same."""

from qlora_api import crd, job
from qlora_api.contract import ExitCode
from qlora_api.spec import DatasetFormat
from qlora_api.sweep.sweep import SWEEP_KIND
from qlora_cli.commands import exit_codes
from qlora_cli.kube import names
from qlora_cli.manifest import init
from qlora_cli.text import choices


def test_the_api(monkeypatch):
    assert (names.GROUP, names.API_VERSION, names.KIND) == (job.GROUP, job.API_VERSION, job.KIND)
    assert (
        next(m.max_length for m in job.ObjectMeta.model_fields["name"].metadata if hasattr(m, "max_length"))
        == names.LONGEST_NAME
    )
    pattern = next(m.pattern for m in job.ObjectMeta.model_fields["name"].metadata if getattr(m, "pattern", None))
    assert pattern == f"^{names.NAME_PATTERN}$"
    assert (exit_codes.USER_ERROR, exit_codes.STORAGE_FAILED) == (ExitCode.USER_ERROR, ExitCode.STORAGE_FAILED)
    assert set(choices.RowFormat) == set(DatasetFormat) == set(init.FORMATS)


def test_the_kinds_and_their_definitions():
    definitions = crd.definitions()
    assert [*definitions] == [names.PLURAL, names.SWEEP_PLURAL]
    assert [each["metadata"]["name"] for each in definitions.values()] == [names.CRD, names.SWEEP_CRD]
    assert [each["spec"]["names"]["kind"] for each in definitions.values()] == [names.KIND, names.SWEEP_KIND]
    assert names.SWEEP_KIND == SWEEP_KIND


def test_what_the_operator_makes():
    from qlora_operator import names as operators

    for name in ("JOB_LABEL", "ATTEMPT_LABEL", "COMPONENT_LABEL", "INDEX_LABEL", "SWEEP_LABEL", "CONTAINER"):
        assert getattr(names, name) == getattr(operators, name)


def test_what_the_trainer_publishes():
    from qlora_cli.artifacts import adapters
    from qlora_trainer.publish import adapter_manifest

    assert (adapters.MANIFEST, adapters.SCHEMA) == (adapter_manifest.MANIFEST, adapter_manifest.SCHEMA)


def test_reasons_that_need_a_hand():
    from qlora_api.status import Reason
    from qlora_cli.jobs.job_view import NEEDS_ATTENTION

    assert {Reason(reason).value for reason in NEEDS_ATTENTION} == NEEDS_ATTENTION
