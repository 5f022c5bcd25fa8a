"""The attempt loop, with a real process in the trainer's place."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from qlora_api.contract import JobRef
from qlora_api.errors import FieldError, ManifestError
from qlora_cli.local.run_folder import RunError
from qlora_cli.manifest.job_manifest import RefusedError
from qlora_storage.destination_claim import claim_destination
from qlora_storage.errors import UserError


def reasons(record):
    return [a["reason"] for a in record["attempts"]]


def test_a_run_says_what_it_will_do_and_what_came_of_it(workplace):
    assert workplace.run() == 0
    for expected in (
        "16 sequences = 4 micro-batch × 2 accumulation × 2 ranks",
        "2 CPU processes",
        "NF4 with double quantization",
        "1,200 in 100 sequences",
        "2 truncated, 1 left out as no token counts",
        "What is [bold]4-bit[/bold]?",  # users' brackets are no markup
        "quick is done.",
        "3.25 → 2.125",
        "CPU-rank-hours",
        "Start 0.0 s, Load 2.0 s, Train 1 min 1 s",
        "quantized weights",
        "1.00 GiB",
        'qlora generate --run quick --prompt "…"',
    ):
        assert expected in workplace.said, workplace.said
    assert "\x1b" not in workplace.said


def test_tokens_are_those_of_all_steps_not_of_the_last_progress_report(workplace):
    workplace.run()
    assert re.search("Tokens trained on +12,345", workplace.said)
    assert workplace.record()["tokens"] == {"1": 5000}


def test_the_trainer_gets_a_resolved_config(workplace):
    workplace.run()
    config, folder = workplace.config(1), workplace.folder
    assert config["spec"]["model"]["source"] == str(folder / "model")
    assert config["spec"]["dataset"]["train"]["source"] == str(folder / "rows.jsonl")
    assert config["spec"]["output"]["destination"] == str(folder / "out")
    assert config["checkpointUri"] == str(folder / "runs/quick/checkpoints")
    assert config["cacheDir"] == str(folder / "cache")
    assert (config["device"], config["ranksPerWorker"], config["metricsPort"]) == ("CPU", 2, 0)
    assert config["gradientCheckpointing"] is False


def test_progress_is_shown_in_plain_lines_without_a_terminal(workplace):
    workplace.run()
    assert "training  step 0/20  loss 2.5  eval 3.25  lr 0.0002  tokens/s 1,234  left 1 min 15 s" in workplace.said


def test_a_crash_is_followed_by_another_attempt(workplace):
    workplace.plan("crash", "done")
    assert workplace.run() == 0
    assert reasons(workplace.record()) == ["Crashed", "Completed"]
    assert workplace.config(2)["restarts"] == 1
    assert workplace.config(2)["job"]["uid"] == workplace.config(1)["job"]["uid"]
    assert "Attempt 1 ended: Crashed. RuntimeError: something broke" in workplace.said


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_one(workplace):
    workplace.plan("oom", "oom", "done")
    assert workplace.run() == 0
    batches = [workplace.config(n)["batch"] for n in (1, 2, 3)]
    assert [b["microBatchSize"] for b in batches] == [4, 2, 1]
    assert [b["gradientAccumulationSteps"] for b in batches] == [2, 4, 8]
    assert "smaller portions: 16 sequences = 2 micro-batch × 4 accumulation × 2 ranks" in workplace.said


def test_a_user_error_is_not_retried(workplace):
    workplace.plan("user-error")
    assert workplace.run() == 40
    assert 'spec.lora.targetModules: "q_prj" matches no layer' in workplace.said
    assert str(workplace.run_folder / "attempt-1" / "log.txt") in workplace.said
    assert reasons(workplace.record()) == ["UserError"]


def test_a_user_error_in_prepare_starts_no_attempt(workplace):
    workplace.plan("done", prepare="user-error")
    assert workplace.run() == 40
    assert "matches no layer" in workplace.said
    assert workplace.record()["attempts"] == []


def test_restarts_are_limited_and_counted_anew_by_each_call(workplace):
    workplace.plan("crash")
    for attempts in (2, 4):
        assert workplace.run("policy.maxRestarts=1") == 1
        assert len(workplace.record()["attempts"]) == attempts
    assert "after 1 restarts" in workplace.said


def test_a_run_pauses_at_its_step_and_resumes_with_a_later_one(workplace):
    workplace.plan("learn")
    assert workplace.run("policy.pauseAtStep=4") == 43
    assert "paused at step 4 of " in workplace.said
    assert "With a larger spec.policy.pauseAtStep, or none, the same command resumes this run" in workplace.said
    assert workplace.run() == 0
    assert reasons(workplace.record()) == ["Suspended", "Completed"]


def test_without_a_termination_message_the_end_of_the_log_is_shown(workplace, helpers):
    workplace.plan("silent")
    assert workplace.run("policy.maxRestarts=0") == 128 + signal.SIGSEGV
    assert "log line 29" in workplace.said
    assert "log line 10" in workplace.said
    assert "log line 9\n" not in workplace.said
    rank = int((workplace.run_folder / "attempt-1" / "rank.pid").read_text())
    helpers.wait_until(lambda: not helpers.lives(rank))


def test_a_finished_run_is_printed_again(workplace):
    assert workplace.run() == 0
    workplace.plan("user-error")
    assert workplace.run() == 0
    assert "quick is done." in workplace.said
    assert len(workplace.record()["attempts"]) == 1


def test_a_finished_run_whose_adapter_is_gone_is_not_called_done(workplace):
    assert workplace.run() == 0
    destination = Path(workplace.record()["result"]["adapter"]["manifestUri"])
    destination.unlink()
    with pytest.raises(RunError, match="is gone; train it again with --fresh"):
        workplace.run()


def test_a_changed_spec_is_refused_with_old_and_new_value(workplace):
    workplace.plan("crash")
    workplace.run("policy.maxRestarts=0")
    with pytest.raises(RunError) as error:
        workplace.run("lora.rank=8", "training.learningRate=1e-4")
    assert "spec.lora.rank: 16 → 8" in str(error.value)
    assert 'spec.training.learningRate: "2e-4" → "1e-4"' in str(error.value)
    assert "--fresh" in str(error.value)


def test_policy_may_change_between_calls(workplace):
    workplace.plan("crash", "done")
    workplace.run("policy.maxRestarts=0")
    assert workplace.run("policy.maxRestarts=5") == 0


def test_where_and_how_is_published_may_change_until_something_is(workplace, tmp_path):
    workplace.plan("crash", "done")
    workplace.run("policy.maxRestarts=0")
    uid = workplace.record()["uid"]
    assert workplace.run(f"output.destination={tmp_path / 'elsewhere'}", "output.allowWorseEval=true") == 0
    assert (workplace.record()["uid"], len(workplace.record()["attempts"])) == (uid, 2)
    assert workplace.config(2)["spec"]["output"]["destination"] == str(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"spec\.output\.destination: "):
        workplace.run(f"output.destination={tmp_path / 'again'}")


def test_a_changed_spec_goes_when_nothing_was_trained(workplace):
    workplace.plan("done", prepare="user-error")
    workplace.run()
    workplace.plan("done")
    assert workplace.run("lora.rank=8") == 0
    assert workplace.record()["spec"]["lora"]["rank"] == 8


def test_changed_rows_are_refused(workplace):
    workplace.plan("crash")
    workplace.run("policy.maxRestarts=0")
    workplace.plan("done", receipt={"dataHash": "c" * 64})
    with pytest.raises(RunError, match="the rows have changed"):
        workplace.run()


def test_fresh_puts_the_old_run_aside(workplace):
    workplace.run()
    old = workplace.record()["uid"]
    assert workplace.run(fresh=True) == 0
    assert workplace.record()["uid"] != old
    (aside,) = workplace.run_folder.parent.glob("quick.old-*")
    assert old in (aside / "run.json").read_text()


@pytest.mark.parametrize("inside", ["", "/adapter", "/../quick/out"])
def test_nothing_is_published_into_the_runs_own_folder_which_is_put_aside(workplace, inside):
    with pytest.raises(RunError, match="must not be in the run's own folder"):
        workplace.run(f"output.destination={workplace.run_folder}{inside}")
    assert not (workplace.run_folder / "run.json").exists()


def test_fresh_says_what_it_replaces_at_the_destination(workplace):
    workplace.run()
    old, manifest = workplace.record()["uid"], Path(workplace.record()["result"]["adapter"]["manifestUri"])
    manifest.write_text(json.dumps({"runUid": old}))
    workplace.run(fresh=True)
    kept = manifest.with_name(f"manifest-{old[:8]}.json")
    assert json.loads(kept.read_text()) == {"runUid": old}
    assert f"--fresh replaces what run {old[:8]} has published: {manifest} is now {kept.name}" in workplace.said


@pytest.mark.parametrize(
    ("overrides", "fresh"), [pytest.param((), True, id="fresh"), pytest.param(("lora.rank=4",), False, id="other-spec")]
)
def test_a_run_that_is_put_aside_gives_its_destination_to_the_next(workplace, overrides, fresh):
    workplace.plan("silent")
    workplace.run("policy.maxRestarts=0")
    workplace.plan("done")
    record = workplace.record()
    destination = record["spec"]["output"]["destination"]
    claim_destination(destination, JobRef(name="quick", uid=record["uid"]))
    assert workplace.run(*overrides, fresh=fresh) == 0
    assert workplace.record()["uid"] != record["uid"]
    claim_destination(destination, JobRef(name="quick", uid=workplace.record()["uid"]))


def test_fresh_leaves_the_claim_of_another_run(workplace):
    workplace.run()
    destination = workplace.record()["spec"]["output"]["destination"]
    claim_destination(destination, JobRef(name="quick", uid="1111-elsewhere"))
    assert workplace.run(fresh=True) == 0
    with pytest.raises(UserError, match="is claimed by job default/quick"):
        claim_destination(destination, JobRef(name="quick", uid=workplace.record()["uid"]))


def test_fresh_leaves_the_manifest_of_another_run(workplace):
    workplace.run()
    manifest = Path(workplace.record()["result"]["adapter"]["manifestUri"])
    manifest.write_text(json.dumps({"runUid": "somebody-else"}))
    workplace.run(fresh=True)
    assert not list(manifest.parent.glob("manifest-*.json"))


def test_other_ranks_resume_with_their_own_split(workplace):
    workplace.plan("crash", "done")
    workplace.run("policy.maxRestarts=0")
    assert workplace.run(ranks=4) == 0
    assert workplace.config(2)["batch"] == {"worldSize": 4, "microBatchSize": 4, "gradientAccumulationSteps": 1}


def test_a_damaged_record_is_explained(workplace):
    workplace.run()
    (workplace.run_folder / "run.json").write_text("{}")
    with pytest.raises(RunError, match="--fresh starts anew"):
        workplace.run()
    assert workplace.run(fresh=True) == 0


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        pytest.param((), {"ranks": 3}, "or pass --ranks 2", id="ranks-that-do-not-divide"),
        pytest.param((), {"ranks": 0}, "--ranks", id="no-ranks"),
    ],
)
def test_a_world_that_cannot_be_is_refused(workplace, overrides, options, message):
    with pytest.raises(FieldError, match=message):
        workplace.run(*overrides, **options)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("model.source=nowhere", "does not exist", id="missing-model"),
        pytest.param("dataset.train.source=pvc://claim/rows", "takes a local path", id="volume-of-a-cluster"),
    ],
)
def test_sources_out_of_reach_are_refused_before_anything_starts(workplace, override, message):
    with pytest.raises(ManifestError, match=message):
        workplace.run(override)
    assert not workplace.run_folder.exists()


def test_fields_without_a_meaning_here_are_named(workplace):
    workplace.run("scheduling.queue=team", "parallelism.workers=2", "model.credentials=secret", "suspend=true")
    (line,) = [line for line in workplace.said.splitlines() if line.startswith("Not used here")]
    for named in ("scheduling.queue: team", "parallelism.workers: 2", "model.credentials: secret", "suspend: true"):
        assert named in workplace.said, line


def test_exactly_one_job_is_run(workplace, helpers):
    workplace.write(helpers.manifest(), {"apiVersion": "v1", "kind": "Secret"}, helpers.manifest())
    with pytest.raises(RefusedError, match="takes exactly one"):
        workplace.run()


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_checkpoints_and_the_same_command_resumes(workplace, signum):
    workplace.plan("wait", "done")
    process = workplace.start()
    workplace.wait_for_port()
    process.send_signal(signum)
    assert workplace.finish(process) == 130, workplace.said
    assert "checkpointing …" in workplace.said
    assert "Told to stop; a checkpoint is written. The same command resumes this run." in workplace.said
    uid = workplace.record()["uid"]
    assert workplace.run() == 0
    record = workplace.record()
    assert record["uid"] == uid
    assert reasons(record) == ["Preempted", "Completed"]
    assert record["attempts"][1]["firstStep"] == 7
    assert workplace.config(2)["restarts"] == 0


def test_a_second_ctrl_c_kills_all_ranks(workplace, helpers):
    workplace.plan("stubborn")
    process = workplace.start()
    workplace.wait_for_port()
    rank = int((workplace.run_folder / "attempt-1" / "rank.pid").read_text())
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert workplace.finish(process) == 130
    assert "killing all ranks" in workplace.said
    assert reasons(workplace.record()) == ["Preempted"]
    helpers.wait_until(lambda: not helpers.lives(rank))


def test_a_trainer_that_cannot_catch_the_signal_yet_is_no_crash(workplace):
    workplace.plan("deaf")
    process = workplace.start()
    workplace.wait_for_port()
    process.send_signal(signal.SIGINT)
    assert workplace.finish(process) == 130
    assert reasons(workplace.record()) == ["Preempted"]


def test_ctrl_c_during_prepare_starts_nothing(workplace, helpers):
    workplace.plan("done", prepare="wait")
    process = workplace.start()
    helpers.wait_until((workplace.run_folder / "prepare" / "config.json").exists)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert workplace.finish(process) == 130
    assert workplace.record()["attempts"] == []


def test_a_run_in_use_is_left_alone(workplace):
    workplace.plan("wait")
    process = workplace.start()
    workplace.wait_for_port()
    with pytest.raises(RunError, match=f"in use by process {process.pid}"):
        workplace.run()
    process.send_signal(signal.SIGINT)
    workplace.finish(process)


def test_a_trainer_that_outlives_a_killed_command_keeps_the_run_locked_and_its_end_counts(workplace, helpers):
    workplace.plan("wait", "done")
    process = workplace.start()
    workplace.wait_for_port()
    process.kill()
    workplace.finish(process)
    with pytest.raises(RunError, match="in use by process") as error:
        workplace.run()
    trainer = int(str(error.value).split("in use by process ")[1].split(";")[0])
    os.kill(trainer, signal.SIGTERM)
    helpers.wait_until(lambda: not helpers.lives(trainer))
    assert workplace.run() == 0
    assert reasons(workplace.record()) == ["Preempted", "Completed"]


def test_an_attempt_lost_with_the_machine_is_not_the_jobs_doing(workplace):
    workplace.plan("wait", "done")
    process = workplace.start()
    workplace.wait_for_port()
    process.kill()
    workplace.finish(process)
    holders = (workplace.folder / "runs" / ".quick.lock").read_text().split()
    os.kill(int(holders[1]), signal.SIGKILL)
    time.sleep(0.2)
    assert workplace.run() == 0
    assert reasons(workplace.record()) == ["NodeLost", "Completed"]


@pytest.mark.parametrize("place", ["s3:/bucket/x", "file:/tmp/x", "file://host/x", "$HOME/x", "s3://me:hunter2@b/x"])
@pytest.mark.parametrize("field", ["output.destination", "dataset.train.source", "model.source"])
def test_a_place_that_would_be_another_one_is_refused_at_once(workplace, field, place):
    with pytest.raises(ManifestError, match=rf"^spec\.{field}: .*must ") as refused:
        workplace.run(f"{field}={place}")
    assert "hunter2" not in str(refused.value)
    assert not (workplace.folder / "runs").exists()
