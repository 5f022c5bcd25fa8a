"""Metrics of a rank: exactly the catalogue, absent where it is not known, and what a token costs."""

from __future__ import annotations

import contextlib
import json
import math
import random
import socket
import struct
import threading
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_api.batch import split_batch
from qlora_api.contract import JobRef, TrainerConfig
from qlora_api.metrics_catalogue import TRAINER, MetricKind
from qlora_api.spec import QLoRAJobSpec
from qlora_trainer.liveness.heartbeat import Heartbeat, Section
from qlora_trainer.model.flops import flops_per_token
from qlora_trainer.model.loading.loading_progress import counted_weights
from qlora_trainer.reporting import http_server, metrics, training_history
from qlora_trainer.reporting.phase_collector import PhaseCollector
from qlora_trainer.reporting.training_history import TrainingHistory
from testing.timeouts import PATIENCE_SECONDS

LABELS = {"job": "one", "namespace": "team", "rank": "3"}
SPEC = {
    "model": {"source": "/base"},
    "dataset": {"train": {"source": "/rows"}, "format": "Text"},
    "training": {"maxSteps": 10, "globalBatchSize": 4},
    "output": {"destination": "/out"},
}


def recorder(device="cpu", heartbeat=None, **more):
    spec = QLoRAJobSpec.model_validate(SPEC)
    config = TrainerConfig(
        job=JobRef(name="one", namespace="team", uid="u"),
        spec=spec,
        attempt=2,
        restarts=1,
        batch=split_batch(spec, 4),
        device="CPU",
        ranks_per_worker=4,
        gradient_checkpointing=False,
        checkpoint_uri="/c",
        cache_dir="/cache",
        termination_message_path="/t",
        **more,
    )
    beats = heartbeat or Heartbeat()
    ranks = SimpleNamespace(rank=3, local_rank=3, world_size=4, device=torch.device(device), heartbeat=beats)
    return metrics.MetricsRecorder(config, ranks)


def samples(of):
    return {
        (s.name, s.labels.get("component") or s.labels.get("section") or s.labels.get("direction") or ""): s
        for family in of.registry.collect()
        for s in family.samples
    }


def value(of, name, more=""):
    found = samples(of).get((name, more))
    return None if found is None else found.value


def test_every_series_has_the_jobs_labels():
    made = recorder()
    made.predict({"peak": 1})
    for sample in samples(made).values():
        assert sample.labels.items() >= LABELS.items(), sample


def test_what_is_not_known_is_absent_and_what_was_not_done_is_zero():
    made = recorder()
    for name in ("qlora_loss", "qlora_eval_loss", "qlora_learning_rate", "qlora_step", "qlora_flops_per_token"):
        assert value(made, name) is None
    assert value(made, "qlora_memory_predicted_bytes", "peak") is None
    assert value(made, "qlora_tokens_total") == 0
    assert value(made, "qlora_attempt") == 2
    assert value(made, "qlora_restarts") == 1


def test_predictions_stand_beside_measurements():
    made = recorder()
    made.predict({"gradients": 100, "activations": 7})
    made.memory({"gradients": 98})
    assert value(made, "qlora_memory_predicted_bytes", "gradients") == 100
    assert value(made, "qlora_memory_predicted_bytes", "activations") == 7
    assert value(made, "qlora_memory_component_bytes", "gradients") == 98


@pytest.fixture
def card(monkeypatch):
    """A GPU as torch and NVML show one."""
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=60, total=80),
        nvmlDeviceGetPcieThroughput=lambda handle, counter: 2 if counter == "rx" else 3,
        NVMLError=RuntimeError,
        NVML_PCIE_UTIL_RX_BYTES="rx",
        NVML_PCIE_UTIL_TX_BYTES="tx",
    )
    monkeypatch.setattr(metrics, "pynvml", nvml)
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    for name, size in (("memory_allocated", 10), ("memory_reserved", 12), ("max_memory_allocated", 15)):
        monkeypatch.setattr(cuda, name, lambda device, size=size: size)
    return nvml


def test_a_rank_with_a_gpu_exports_the_whole_catalogue(card):
    made = recorder("cuda")
    made.predict({"peak": 1})
    made.step_took(0.5)
    made.memory({"peak": 15})
    names = ("step", "steps_planned", "epoch", "loss", "eval_loss", "learning_rate", "gradient_norm")
    for name in (*names, "loss_scale", "skipped_steps", "tokens_per_second", "flops_per_token"):
        made.set(f"qlora_{name}", 1)
    assert {name for name, _ in samples(made)} == {name for metric in TRAINER.values() for name in metric.series}
    assert value(made, "qlora_device_peak_flops_per_second") == 989.5e12
    assert value(made, "qlora_gpu_pcie_bytes_per_second", "receive") == 2048
    assert value(made, "qlora_gpu_memory_free_bytes") == 60
    assert samples(made)["qlora_device_info", ""].labels["uuid"] == "GPU-abc"


def test_a_rank_without_one_exports_the_rest():
    names = {family.name for family in recorder().registry.collect()}
    assert names == {metric.name for metric in TRAINER.values() if not metric.gpu}


def test_a_driver_that_does_not_tell_of_pcie_leaves_it_out(card, monkeypatch):
    def refuse(handle, counter):
        raise RuntimeError("not supported")

    monkeypatch.setattr(card, "nvmlDeviceGetPcieThroughput", refuse)
    assert value(recorder("cuda"), "qlora_gpu_pcie_bytes_per_second", "receive") is None
    assert value(recorder("cuda"), "qlora_gpu_memory_total_bytes") == 80


def test_an_unknown_card_has_no_peak(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Graphics Device")
    assert value(recorder("cuda"), "qlora_device_peak_flops_per_second") is None


# ------------------------------------------------------------------------------------------------------------ sections


def test_a_section_inside_another_counts_for_itself_alone_and_the_open_one_up_to_now(clock):
    made = Heartbeat()
    with made.during(Section.PUBLISH):
        clock.value += 5
        with made.during(Section.CHECKPOINT):
            clock.value += 2
        clock.value += 1
        assert made.phase_seconds() == {"Load": 0.0, "Publish": 6.0, "Checkpoint": 2.0}
    clock.value += 100
    assert made.phase_seconds() == {"Load": 100.0, "Publish": 6.0, "Checkpoint": 2.0}


def test_a_wait_for_other_ranks_counts_for_the_phase_it_is_in(clock):
    made = Heartbeat()
    for section in (Section.FORWARD, Section.BACKWARD, Section.OPTIMIZER, Section.EVALUATE):
        with made.during(section):
            clock.value += 1
            with made.during(Section.COLLECTIVE):
                clock.value += 10
                assert made.phase == section.phase
    assert made.phase_seconds() == {"Load": 0.0, "Train": 33.0, "Evaluate": 11.0}
    assert made.section_seconds()[Section.COLLECTIVE] == 40
    assert made.section_seconds()[Section.BACKWARD] == 1


def test_the_time_of_a_phase_never_goes_back_however_it_is_read():
    made, stopped, fell = Heartbeat(), threading.Event(), []

    def read():
        before = {}
        while not stopped.is_set():
            now = made.phase_seconds()
            fell.extend(phase for phase, seconds in before.items() if now[phase] < seconds)
            before = now

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20_000):
        with made.during(Section.FORWARD), made.during(Section.COLLECTIVE):
            pass
    stopped.set()
    reader.join()
    assert fell == []


def test_phases_are_a_counter_of_the_catalogue(clock):
    heartbeat, registry = Heartbeat(), CollectorRegistry()
    registry.register(PhaseCollector(TRAINER["qlora_section_seconds"], ("one", "team", "0"), heartbeat))
    heartbeat.enter(Section.FORWARD)
    clock.value += 3
    (family,) = registry.collect()
    assert family.type == MetricKind.COUNTER.value
    assert registry.get_sample_value(
        "qlora_section_seconds_total", {"job": "one", "namespace": "team", "rank": "0", "section": "Train"}
    ) == pytest.approx(3)


# --------------------------------------------------------------------------------------------------------------- flops


def llama(**more):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes, **more)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model.requires_grad_(requires_grad=False)


def test_a_token_costs_four_operations_a_frozen_weight_and_attention_by_its_row():
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    attention = 3.5 * 4 * (33 / 2) * 64 * 2
    found = flops_per_token(llama(), np.array([32, 32]), target_share=0.5)
    assert found == 4 * (weights + 0.5 * 64 * 100) + attention


def test_what_learns_costs_half_as_much_again():
    model = llama()
    before = flops_per_token(model, np.array([8]), 1.0)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(requires_grad=True)
    assert flops_per_token(model, np.array([8]), 1.0) - before == 2 * 64 * 128


def test_long_rows_weigh_as_many_tokens_as_they_have():
    short, long = (flops_per_token(llama(), np.array(rows), 1.0) for rows in ([10] * 10, [10, 90]))
    assert long > short


def test_of_a_mixture_of_experts_nothing_is_said():
    model = llama()
    model.config.num_local_experts = 8
    assert flops_per_token(model, np.array([8]), 1.0) is None


# ------------------------------------------------------------------------------------------------------------- history


def rows(of):
    return [json.loads(line) for line in of.to_bytes().decode().splitlines()]


def test_a_resumed_history_has_each_step_once_and_names_both_attempts():
    first = TrainingHistory()
    first.attempt(1, 0, worldSize=2)
    for number in (1, 2):
        first.step(number, loss=1.0)
    saved = first.to_bytes()
    first.step(3, loss=9.0)  # lost with its attempt
    second = TrainingHistory()
    second.resume(saved)
    second.attempt(2, 2, worldSize=4)
    second.step(3, loss=0.5)
    assert [(r["step"], r["loss"]) for r in rows(second) if "loss" in r] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert [r["attempt"] for r in rows(second) if "fromStep" in r] == [1, 2]


def test_a_damaged_history_stops_no_training(caplog):
    found = TrainingHistory()
    found.resume(b"{half a li")
    assert rows(found) == []
    assert "begins anew" in caplog.text


def test_figures_that_are_not_finite_are_json(caplog):
    found = TrainingHistory()
    found.step(1, loss=math.nan, gradientNorm=math.inf, tokens=123456789)
    assert (rows(found)[0]["loss"], rows(found)[0]["gradientNorm"]) == (None, None)


def test_a_long_history_loses_every_second_step_and_no_evaluation(monkeypatch):
    monkeypatch.setattr(training_history, "MOST_STEPS", 10)
    found = TrainingHistory()
    found.attempt(1, 0)
    for number in range(1, 41):
        found.step(number, loss=1.0)
        if number % 10 == 1:
            found.evaluation(number, 2.0)
    steps = [r["step"] for r in rows(found) if "loss" in r]
    assert len(steps) <= 10
    assert steps[-1] == 40
    assert steps[:3] == [8, 16, 24]
    again = TrainingHistory()
    again.resume(found.to_bytes())
    for number in range(41, 61):
        again.step(number, loss=1.0)
    steps = [r["step"] for r in rows(again) if "loss" in r]
    assert len(steps) <= 10
    assert steps[-1] == 60
    assert [r["step"] for r in rows(found) if "evalLoss" in r] == [1, 11, 21, 31]


# ------------------------------------------------------------------------------------------------- who asks for them


@pytest.fixture
def served():
    made = recorder()
    server = metrics.serve(made, "127.0.0.1", 0, None)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"], ids=["ipv4", "ipv6"])
def test_without_a_host_both_families_are_served(address):
    if address == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = metrics.serve(recorder(), "", 0, None)
    try:
        with urlopen(f"http://{address}:{server.server_port}/healthz", timeout=PATIENCE_SECONDS) as answer:
            assert answer.read() == b"ok\n"
    finally:
        server.shutdown()
        server.server_close()


def test_connections_on_which_nothing_is_said_keep_nobody_out(served):
    silent = [socket.create_connection(served.server_address, 5) for _ in range(4 * http_server.MAXIMUM_CONNECTIONS)]
    try:
        with urlopen(f"http://127.0.0.1:{served.server_port}/healthz", timeout=PATIENCE_SECONDS) as answer:
            assert answer.read() == b"ok\n"
        assert len(served._open) <= http_server.MAXIMUM_CONNECTIONS
    finally:
        for stranger in silent:
            stranger.close()


def test_a_silent_connection_is_closed_in_time(monkeypatch, served):
    monkeypatch.setattr(http_server._Handler, "timeout", 0.5)
    with socket.create_connection(served.server_address, PATIENCE_SECONDS) as stranger:
        assert stranger.recv(1) == b""


def test_what_is_no_http_leaves_no_trace_in_the_log(served, capfd):
    chance = random.Random(1)
    for _ in range(200):
        with contextlib.suppress(ConnectionError), socket.create_connection(served.server_address, 5) as stranger:
            stranger.sendall(chance.randbytes(chance.randrange(1, 500)) + b"\r\n\r\n")
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with urlopen(f"http://127.0.0.1:{served.server_port}/progress", timeout=PATIENCE_SECONDS) as answer:
        assert answer.status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_counted_within_a_section_shows_how_far_it_is():
    shown = recorder()
    for number in shown.count(iter("ab"), 2, "micro-batches"):
        progress = shown.report.section_progress
        assert (progress.unit, progress.total) == ("micro-batches", 2)
        assert progress.done == "ab".index(number)
    assert shown.report.section_progress is None


def test_the_report_follows_the_heartbeat_to_the_section_of_a_failure(clock):
    heartbeat = Heartbeat()
    shown = recorder(heartbeat=heartbeat)
    clock.value += 1
    with contextlib.suppress(OSError), heartbeat.during(Section.EVALUATE):
        clock.value += 2
        raise OSError
    report = shown.report
    assert (report.section, report.section_seconds, report.elapsed_seconds) == (
        "Evaluate",
        {"Load": 1.0, "Evaluate": 2.0},
        3.0,
    )


def test_counting_ends_with_a_loop_that_is_left_early():
    shown = recorder()
    for _ in shown.count(range(5), 5, "tokens"):
        break
    assert shown.report.section_progress is None


def test_the_weights_of_a_model_are_counted_while_it_is_loaded(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    shown, seen = recorder(), []

    def count(items, total, unit):
        for item in shown.count(items, total, unit):
            seen.append(shown.report.section_progress.done)
            yield item

    with counted_weights(count):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert seen == list(range(len(loaded.state_dict())))
