"""Every manifest under examples/ is one that both the API server and ``qlora run`` or ``qlora sweep`` take."""

from pathlib import Path

import pytest

from qlora_api.batch import split_batch
from qlora_api.spec import ComputeType, Optimizer, QuantizationType
from qlora_cli.manifest import job_manifest, sweep_manifest, validate
from qlora_sweep.decide import total_trials
from qlora_sweep.halving import rungs

EXAMPLES = Path(__file__).parents[2] / "examples"
MANIFESTS = sorted(EXAMPLES.glob("**/*.yaml"))
SWEEP = EXAMPLES / "quickstart-sweep.yaml"
JOBS = [path for path in MANIFESTS if path != SWEEP]


def test_there_are_examples():
    assert {path.name for path in MANIFESTS} >= {"quickstart.yaml", "opt-6.7b-imdb.yaml"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_example_is_valid(path):
    report = validate.check_file(path)
    assert report.good, validate.as_text([report])


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_example_splits_its_batch_on_the_gpus_it_asks_for(path):
    spec = job_manifest.one_job(path, ()).spec
    split_batch(spec, spec.parallelism.workers * spec.parallelism.gpus_per_worker)


def test_quickstart_splits_its_batch_on_two_cpu_processes_and_reads_what_prepare_writes():
    spec = job_manifest.one_job(EXAMPLES / "quickstart.yaml", ()).spec
    assert split_batch(spec, 2).global_batch_size == spec.training.global_batch_size
    sources = (spec.model.source, spec.dataset.train.source, spec.dataset.eval.source)
    assert sources == tuple(f"./runs/quickstart-data/{name}" for name in ("base", "train.jsonl", "eval.jsonl"))


def test_the_sweep_is_over_the_quickstart_and_halves_its_steps():
    job, sweep = job_manifest.one_job(EXAMPLES / "quickstart.yaml", ()).spec, sweep_manifest.one_sweep(SWEEP).spec
    assert sweep.template.spec.dataset == job.dataset
    assert sweep.template.spec.model == job.model
    steps = 206  # of the quickstart's two epochs
    done, trials = 0, total_trials(sweep)
    before = 0
    for rung in rungs(sweep.early_stopping, trials):
        done, before, trials = done + trials * (rung.step - before), rung.step, rung.survivors
    assert done + trials * (steps - before) <= total_trials(sweep) * steps / 2


def test_opt_example_is_the_classic_recipe():
    spec = job_manifest.one_job(EXAMPLES / "opt-6.7b-imdb.yaml", ()).spec
    split = split_batch(spec, spec.parallelism.gpus_per_worker)
    assert (split.micro_batch_size, split.gradient_accumulation_steps) == (4, 4)
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.dropout) == (8, 32, "0.05")
    assert spec.lora.target_modules == ["q_proj", "v_proj"]
    assert (spec.quantization.type, spec.quantization.compute_type) == (QuantizationType.NF4, ComputeType.FLOAT16)
    assert spec.training.optimizer is Optimizer.PAGED_ADAMW_8BIT
    assert (spec.training.epochs, spec.training.learning_rate, spec.checkpoint.keep) == (3, "2e-4", 3)
