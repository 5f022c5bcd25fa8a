"""Errors of a sweep's manifest: each one sentence with field, value and what is allowed; the same by the schema."""

from __future__ import annotations

import copy

import pytest

from qlora_api.crd import structural
from qlora_api.errors import ManifestError
from qlora_api.spec import QLoRAJobSpec
from qlora_api.sweep.parameters import VARIABLE_FIELDS, Parameter, ValueKind
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.sweep import QLoRASweep
from qlora_api.sweep.trials import trial_spec

from .api_server import refusals
from .manifests import manifest

SCHEMA = structural(QLoRASweepSpec)
JOB = manifest(dataset__eval={"fraction": "0.1"}, training={"maxSteps": 100, "evaluation": {"everySteps": 10}})["spec"]
RANK = {"path": "lora.rank", "choices": [8, 16]}
RATES = {"path": "training.learningRate", "range": {"min": "1e-5", "max": "1e-3", "scale": "Log"}}


def sweep(job=None, name="search", **spec):
    spec = {"template": {"spec": {**copy.deepcopy(JOB), **(job or {})}}, "parameters": [RANK], "maxTrials": 2, **spec}
    return {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRASweep", "metadata": {"name": name}, "spec": spec}


def errors_of(document):
    with pytest.raises(ManifestError) as caught:
        QLoRASweep.from_manifest(document)
    return str(caught.value)


def one(**parameter):
    return [parameter]


BY_SCHEMA = {
    "unknown-path": (
        {"parameters": one(path="lora.rnk", choices=[8])},
        (
            'spec.parameters[0].path: "lora.rnk" must be the path of a field of quantization, lora or training; '
            "did you "
            "mean lora.rank?"
        ),
    ),
    "path-that-may-not-vary": (
        {"parameters": one(path="output.destination", choices=["a"])},
        'spec.parameters[0].path: "output.destination" must be the path of a field of quantization, lora or training',
    ),
    "empty-range": (
        {"algorithm": {"type": "TPE"}, "parameters": one(path="lora.rank", range={"min": "8", "max": "8"})},
        'spec.parameters[0].range.min: "8": min must be less than max',
    ),
    "log-range-from-0": (
        {"parameters": one(path="lora.dropout", range={"min": "0", "max": "0.1", "scale": "Log"})},
        'spec.parameters[0].range.min: "0": scale Log needs a min greater than 0',
    ),
    "neither-choices-nor-range": (
        {"parameters": one(path="lora.rank")},
        "spec.parameters[0].choices: set exactly one of choices and range",
    ),
    "range-in-a-grid": (
        {"algorithm": {"type": "Grid"}, "parameters": [RATES]},
        'spec.algorithm.type: "Grid": algorithm Grid needs choices for every parameter; Random and TPE take ranges too',
    ),
    "unknown-metric": (
        {"objective": {"metric": "Bleu"}},
        'spec.objective.metric: "Bleu" must be one of EvalLoss, TrainingLoss, TokensPerSecond or PeakMemory',
    ),
    "metric-that-is-not-measured": (
        {"job": {"dataset": manifest()["spec"]["dataset"], "training": {"maxSteps": 100}}},
        'spec.objective.metric: "EvalLoss": metric EvalLoss needs evaluation rows: set template.spec.dataset.eval',
    ),
    "comparison-without-an-evaluation": (
        {"earlyStopping": {"minSteps": 15}},
        (
            "spec.earlyStopping.minSteps: 15: earlyStopping.minSteps must be a multiple of "
            "template.spec.training.evaluation.everySteps, which must be set: trials are compared after an evaluation"
        ),
    ),
    "comparison-after-the-end": (
        {"earlyStopping": {"minSteps": 100}},
        "spec.earlyStopping.minSteps: 100: earlyStopping.minSteps must be less than template.spec.training.maxSteps",
    ),
    "comparison-of-other-lengths": (
        {"earlyStopping": {"minSteps": 10}, "parameters": one(path="training.maxSteps", choices=[50, 100])},
        (
            "spec.earlyStopping: earlyStopping compares trials at the same steps: training.epochs and "
            "training.maxSteps "
            "must not vary"
        ),
    ),
    "seed-that-draws-the-evaluation-rows": (
        {"parameters": one(path="training.seed", choices=[1, 2])},
        (
            "spec.parameters: training.seed also draws dataset.eval.fraction, and trials must be evaluated on the same "
            "rows: give template.spec.dataset.eval a source, or do not vary the seed"
        ),
    ),
    "suspended-template": (
        {"job": {"suspend": True}},
        (
            "spec.template.spec.suspend: true: template.spec.suspend must not be set: the sweep suspends and "
            "resumes its "
            "trials"
        ),
    ),
    "path-twice": (
        {"parameters": [RANK, RANK]},
        "spec.parameters: parameters must not have a path twice",
    ),
    "pause-in-the-template": (
        {"job": {"policy": {"pauseAtStep": 5}}},
        (
            "spec.template.spec.policy.pauseAtStep: 5: template.spec.policy.pauseAtStep must not be set: the sweep "
            "decides when its trials pause"
        ),
    ),
    "budget-in-the-template": (
        {"job": {"policy": {"budgetGpuHours": "5"}}},
        (
            'spec.template.spec.policy.budgetGpuHours: "5": template.spec.policy.budgetGpuHours must not be set: set '
            "the sweep's spec.budgetGpuHours instead"
        ),
    ),
    "time-to-live-in-the-template": (
        {"job": {"policy": {"ttlSecondsAfterFinished": 5}}},
        (
            "spec.template.spec.policy.ttlSecondsAfterFinished: 5: template.spec.policy.ttlSecondsAfterFinished must "
            "not be set: a deleted trial would be trained again; set the sweep's spec.ttlSecondsAfterFinished instead"
        ),
    ),
    "error-in-the-template": (
        {"job": {"lora": {"rank": 0}}},
        "spec.template.spec.lora.rank: 0 must be at least 1",
    ),
}
BY_CHECK = {
    "choice-twice": (
        {"parameters": one(path="lora.rank", choices=[8, 16, 8])},
        'spec.parameters[0].choices[2]: "8" must not occur twice',
    ),
    "decimal-twice": (
        {"parameters": one(path="training.learningRate", choices=["1e-4", "3e-4", "0.0001"])},
        'spec.parameters[0].choices[2]: "0.0001" must not occur twice',
    ),
    "choice-out-of-bounds": (
        {"parameters": one(path="lora.rank", choices=[8, 0])},
        "spec.parameters[0].choices[1]: 0 as lora.rank: must be at least 1",
    ),
    "choice-of-another-type": (
        {"parameters": one(path="training.learningRate", choices=[0.001])},
        (
            'spec.parameters[0].choices[0]: 0.001 as training.learningRate: is a YAML number: write "0.001", '
            "with quotes. "
            "Kubernetes APIs do not use floats"
        ),
    ),
    "range-out-of-bounds": (
        {"parameters": one(path="training.learningRate", range={"min": "0.1", "max": "2"})},
        'spec.parameters[0].range.max: "2" as training.learningRate: must be greater than 0 and at most 1',
    ),
    "range-without-an-order": (
        {"parameters": one(path="quantization.type", range={"min": "1", "max": "2"})},
        'spec.parameters[0].range: "quantization.type" has values without an order: give choices instead',
    ),
    "range-of-a-divisor": (
        {"parameters": one(path="training.globalBatchSize", range={"min": "8", "max": "64"})},
        'spec.parameters[0].range: "training.globalBatchSize" must divide the batch: give choices instead',
    ),
    "range-of-fractions": (
        {"parameters": one(path="lora.rank", range={"min": "8", "max": "16.5"})},
        'spec.parameters[0].range.max: "16.5" must be a whole number, as lora.rank is one',
    ),
    "values-that-do-not-go-together": (
        {
            "parameters": [
                {"path": "quantization.type", "choices": ["NF4", "INT8"]},
                {"path": "lora.dora", "choices": [True]},
            ]
        },
        (
            "spec.parameters: a trial with quantization.type INT8, lora.dora true is not valid: lora.dora: "
            "true: lora.dora needs the norms of the base's weights, "
            "which are not available with quantization.type INT8: use NF4, FP4 or None"
        ),
    ),
    "value-that-does-not-go-with-the-template": (
        {"parameters": one(path="training.epochs", choices=[1])},
        "spec.parameters[0].choices[0]: 1 as training.epochs: set exactly one of epochs and maxSteps",
    ),
    "more-trials-than-combinations": (
        {"algorithm": {"type": "TPE"}, "maxTrials": 3},
        "spec.maxTrials: 3 must be at most 2, the combinations of the choices: no trial is repeated",
    ),
    "more-combinations-than-trials": (
        {
            "algorithm": {"type": "Grid"},
            "parameters": [RANK, {"path": "lora.alpha", "choices": [8, 16]}],
            "maxTrials": 3,
        },
        "spec.maxTrials: 3 must be at least 4, the combinations of the grid (2 × 2)",
    ),
}


@pytest.mark.parametrize(("changes", "message"), [*BY_SCHEMA.values(), *BY_CHECK.values()], ids=[*BY_SCHEMA, *BY_CHECK])
def test_an_error_is_one_sentence_with_field_and_value(changes, message):
    assert errors_of(sweep(**changes)) == message


@pytest.mark.parametrize("changes", [changes for changes, _ in BY_SCHEMA.values()], ids=BY_SCHEMA)
def test_what_the_schema_can_tell_the_api_server_refuses(changes):
    assert refusals(sweep(**changes)["spec"], SCHEMA)


VALID = {
    "choices": {},
    "range": {"parameters": [RATES]},
    "grid": {"algorithm": {"type": "Grid"}, "maxTrials": 2},
    "grid-of-fewer-combinations-than-trials": {"algorithm": {"type": "Grid"}, "maxTrials": 3},
    "halving": {"earlyStopping": {"minSteps": 30, "reductionFactor": 2}},
    "halving-by-training-loss": {"earlyStopping": {"minSteps": 15}, "objective": {"metric": "TrainingLoss"}},
    "lists": {"parameters": one(path="lora.targetModules", choices=[["q_proj"], ["q_proj", "v_proj"]])},
    "values-that-go-together-only": {
        "job": {"training": {"maxSteps": 50, "evaluation": {"everySteps": 10}}},
        "parameters": [
            {"path": "training.warmupSteps", "choices": [60]},
            {"path": "training.maxSteps", "choices": [100, 200]},
        ],
    },
}


@pytest.mark.parametrize("changes", VALID.values(), ids=VALID)
def test_a_valid_sweep_is_taken_by_both(changes):
    document = sweep(**changes)
    assert QLoRASweep.from_manifest(document).spec.to_json_dict()
    assert refusals(document["spec"], SCHEMA) == []


def test_a_name_leaves_room_for_the_numbers_of_trials():
    assert QLoRASweep.from_manifest(sweep(name="a" * 48))
    assert "metadata.name" in errors_of(sweep(name="a" * 49))


def test_every_path_that_may_vary_is_a_field_of_a_job_and_its_kind_is_its_type():
    job = structural(QLoRAJobSpec)["properties"]
    for path, kind in VARIABLE_FIELDS.items():
        group, name = path.split(".")
        schema = job[group]["properties"][name]
        is_decimal = schema["type"] == "string" and schema.get("pattern", "").startswith("^[0-9]+")
        assert (kind is ValueKind.INTEGER) == (schema["type"] == "integer"), path
        assert (kind is ValueKind.DECIMAL) == is_decimal, path


@pytest.mark.parametrize(
    ("path", "low", "high", "number", "value"),
    [
        pytest.param("training.learningRate", "1e-5", "1e-2", 0.000123456, "0.0001235", id="four-digits"),
        pytest.param("training.learningRate", "1e-9", "1e-2", 3.14159e-8, "3.142e-08", id="small"),
        pytest.param("training.learningRate", "0.012345", "0.1", 0.0123449, "0.012345", id="not-below-the-range"),
        pytest.param("training.learningRate", "0.001", "0.012346", 0.0123459, "0.012346", id="not-above-the-range"),
        pytest.param("lora.rank", "8", "64", 16.0, 16, id="whole-number"),
    ],
)
def test_a_number_of_a_range_is_a_value_of_the_field(path, low, high, number, value):
    parameter = Parameter.model_validate({"path": path, "range": {"min": low, "max": high}})
    assert parameter.value_of(number) == value


def test_a_trial_is_the_template_with_its_values_and_a_destination_of_its_own():
    spec = QLoRASweep.from_manifest(sweep(parameters=[RATES])).spec
    trial = trial_spec(spec, "search-3", {"training.learningRate": "3e-4"})
    assert trial.training.learning_rate == "3e-4"
    assert trial.output.destination == "s3://bucket/adapters/docs/trials/search-3"
    unchanged = {"training": {"learning_rate"}, "output": {"destination"}}
    assert trial.model_dump(exclude=unchanged) == spec.template.spec.model_dump(exclude=unchanged)
