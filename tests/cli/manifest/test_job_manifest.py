"""Fields set on the command line, and what a machine makes of a spec."""

import pytest

from qlora_cli.local import local_spec
from qlora_cli.manifest import job_manifest
from qlora_cli.manifest.job_manifest import Override, RefusedError


@pytest.mark.parametrize(
    ("text", "want"),
    [
        pytest.param("training.maxSteps=10", Override("spec.training.maxSteps", 10), id="number"),
        pytest.param("spec.lora.dora=true", Override("spec.lora.dora", True), id="boolean"),
        pytest.param(
            "training.learningRate=1e-4", Override("spec.training.learningRate", "1e-4"), id="decimal-stays-text"
        ),
        pytest.param("quantization.type=None", Override("spec.quantization.type", "None"), id="choice"),
        pytest.param("output.destination=a=b", Override("spec.output.destination", "a=b"), id="equals-sign-in-value"),
        pytest.param("lora.targetModules=[q, v]", Override("spec.lora.targetModules", ["q", "v"]), id="list"),
        pytest.param("training.epochs=null", Override("spec.training.epochs", None), id="null"),
        pytest.param("dataset.eval=", Override("spec.dataset.eval", None), id="nothing"),
        pytest.param("metadata.name=other", Override("metadata.name", "other"), id="metadata"),
        pytest.param("lora.rnk=3", Override("spec.lora.rnk", "3"), id="unknown"),
    ],
)
def test_overrides(text, want):
    assert job_manifest.parse_override(text) == want


@pytest.mark.parametrize(
    "text", ["training.maxSteps", "=3", "a b=3", "scheduling.tolerations[0].key=a", "lora.rank=[1"]
)
def test_overrides_that_cannot_be_read(text):
    with pytest.raises(RefusedError, match="--set"):
        job_manifest.parse_override(text)


def test_null_takes_a_field_away_and_groups_are_made(workplace):
    job = job_manifest.one_job(
        workplace.folder / "job.yaml",
        ["training.epochs=null", "training.maxSteps=3", "training.evaluation.everySteps=2"],
    )
    assert (job.spec.training.epochs, job.spec.training.max_steps) == (None, 3)
    assert job.spec.training.evaluation.every_steps == 2


def test_an_unknown_override_names_the_option_and_the_fields(workplace):
    with pytest.raises(RefusedError, match=r"--set: spec.lora.rnk: .* did you mean rank\?"):
        job_manifest.one_job(workplace.folder / "job.yaml", ["lora.rnk=3"])


def test_addresses_stay_and_paths_become_absolute(workplace):
    path = workplace.folder / "job.yaml"
    job = job_manifest.one_job(
        path, ["model.source=hf://org/name", "dataset.eval={source: rows.jsonl}", "output.destination=../out"]
    )
    spec = local_spec.localize(job.spec, workplace.folder)
    assert spec.model.source == "hf://org/name"
    assert spec.dataset.eval.source == str(workplace.folder / "rows.jsonl")
    assert spec.output.destination == str(workplace.folder.parent / "out")


def test_nothing_is_unused_by_default(workplace):
    assert local_spec.unused(job_manifest.one_job(workplace.folder / "job.yaml").spec) == []
