"""``qlora plan``: from a manifest and headers to a plan, without torch, weights or a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import httpx
import pytest
from typer.testing import CliRunner

from memory.shapes import LLAMA_8B, LLAMA_70B
from model_folders import header_of, model_files, write
from qlora_api.errors import FieldError
from qlora_cli import app
from qlora_cli.local.machine import LocalGpu, Machine
from qlora_cli.memory_plan import model_headers, plan_job, plan_view
from qlora_memory import GPUS, model_shape
from range_server import running

JOB = """\
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {name: docs}
spec:
  model: {source: "MODEL"}
  dataset: {train: {source: "s3://bucket/rows"}, format: Text, maxLength: 2048}
  training: {epochs: 2, globalBatchSize: 16}
  output: {destination: "s3://bucket/out"}
"""


@pytest.fixture
def hub(monkeypatch):
    with running() as server:
        server.files = model_files(LLAMA_8B, shards=4)
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_job.machine, "look", Machine)

    def invoke(*arguments, model="hf://org/base@main"):
        (tmp_path / "job.yaml").write_text(JOB.replace("MODEL", model))
        return CliRunner().invoke(app.app, ["plan", "job.yaml", *arguments])

    return invoke


# ------------------------------------------------------------------------------------------------------- where it reads


def test_headers_come_from_a_hub_without_weights(hub):
    found = model_headers.read_model("hf://org/base@main")
    assert found.config == LLAMA_8B
    assert {n: list(t.shape) for n, t in found.tensors.items()} == header_of(LLAMA_8B)
    assert hub.given < 1_000_000  # of 4 × 700 kB and more
    assert len(hub.requests) <= 9


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(hub):
    hub.ranges = False
    found = model_headers.read_model("hf://org/base")
    assert model_shape(found.config, found.tensors) == model_shape(LLAMA_8B)


def test_a_long_header_takes_a_second_request(hub, monkeypatch):
    monkeypatch.setattr(model_headers, "FIRST_READ", 64)
    found = model_headers.read_model("hf://org/base@main")
    assert {n: list(t.shape) for n, t in found.tensors.items()} == header_of(LLAMA_8B)


def test_a_token_opens_a_gated_model(hub, monkeypatch):
    hub.token = "secret"
    with pytest.raises(FieldError, match=r"is gated: .* set an HF_TOKEN"):
        model_headers.read_model("hf://org/base@main")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert model_headers.read_model("hf://org/base@main").config == LLAMA_8B


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("hf://org/other@main", "is not a model on http", id="no-repository"),
        pytest.param("hf://org/base@v9", "has no revision v9", id="no-revision"),
        pytest.param("hf://org", "must read hf://org/name", id="no-name"),
        pytest.param("pvc://claim/model", "pass it with --model-config", id="volume"),
        pytest.param("/nowhere/model", "does not exist", id="no-folder"),
    ],
)
def test_models_that_cannot_be_read_say_why(hub, source, message):
    with pytest.raises(FieldError) as raised:
        model_headers.read_model(source)
    assert message in str(raised.value)
    assert str(raised.value).startswith("spec.model.source: ")


def test_a_hub_out_of_reach_points_to_the_offline_way(monkeypatch):
    monkeypatch.setattr(model_headers, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FieldError, match=r"cannot be reached.* Offline\? .* --model-config"):
        model_headers.read_model("hf://org/base@main")


@pytest.mark.parametrize("shards", [1, 3])
def test_headers_come_from_a_folder(shards, tmp_path):
    folder = write(tmp_path / "model", model_files(LLAMA_8B, shards))
    found = model_headers.read_model(folder)
    assert {n: list(t.shape) for n, t in found.tensors.items()} == header_of(LLAMA_8B)


def test_a_folder_with_a_configuration_alone_is_planned_from_it(call, tmp_path):
    folder = write(tmp_path / "model", {"config.json": json.dumps(LLAMA_70B).encode()})
    result = call("--gpu", "h200-141gb", "--set", f"model.source={folder}")
    assert f"70.55 billion weights ({folder}, config.json alone: there are no safetensors weights)" in " ".join(
        result.stdout.split()
    )
    assert "70.55 billion weights" in call("--gpu", "h200-141gb", "--model-config", folder).stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"config.json": None}, "has no config.json", id="no-config"),
        pytest.param({"config.json": b"{"}, "config.json that is not JSON", id="bad-config"),
        pytest.param({"model.safetensors.index.json": b"[]"}, "that cannot be read", id="bad-index"),
        pytest.param({"model-00001-of-00002.safetensors": None}, "lacks model-00001-of-00002", id="no-shard"),
        pytest.param({"model-00001-of-00002.safetensors": b"pickle"}, "does not begin as", id="no-header"),
    ],
)
def test_folders_that_are_no_model_say_why(change, message, tmp_path):
    files = {**model_files(LLAMA_8B, shards=2), **change}
    folder = write(tmp_path / "model", {n: c for n, c in files.items() if c is not None})
    with pytest.raises(FieldError) as raised:
        model_headers.read_model(folder)
    assert message in str(raised.value)


def test_headers_come_from_a_bucket(s3):
    import obstore
    from obstore.store import from_url

    store = from_url(f"{s3}/model", client_options={"allow_http": True})
    for name, content in model_files(LLAMA_8B, shards=2).items():
        obstore.put(store, name, content)
    found = model_headers.read_model(f"{s3}/model")
    assert {n: list(t.shape) for n, t in found.tensors.items()} == header_of(LLAMA_8B)
    with pytest.raises(FieldError, match=r"has no config\.json"):
        model_headers.read_model(f"{s3}/nothing")


def test_a_plan_reads_the_environment_of_object_storage_as_a_download_does(s3, monkeypatch):
    """An empty endpoint is none, and a bundle of certificates counts."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    with pytest.raises(FieldError, match=r"has no config\.json"):
        model_headers.read_model(f"{s3}/nothing")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere.pem")
    with pytest.raises(FieldError, match=r"/nowhere\.pem"):
        model_headers.read_model(f"{s3}/nothing")


# --------------------------------------------------------------------------------------------------------- what it says


def test_a_plan_is_shown(hub, call):
    result = call("--gpu", "h100-80gb", "--tokens", "20000000", "--price", "2.5")
    assert result.exit_code == 0, result.output
    for part in (
        "llama, 8.03 billion weights (org/base at main on ",
        "1 × h100-80gb, 79.11 GiB each",
        "16 sequences = 4 micro-batch × 4 accumulation × 1 ranks",
        "activations kept",
        "quantized weights",
        "3.25 GiB",
        "for 40,000,000 tokens",
        "Cost",
        "█",
    ):
        assert part in result.stdout


def test_a_plan_for_programs(hub, call):
    shown = json.loads(call("--gpu", "l4-24gb", "--gpus", "2", "-o", "json").stdout)
    assert shown["fits"]
    assert shown["model"]["parameters"] == 8030261248
    assert shown["gpu"] == {"name": "l4-24gb", "memoryBytes": GPUS["l4-24gb"].memory_bytes, "count": 2}
    assert shown["batch"]["worldSize"] == 2
    assert sum(shown["memory"]["components"].values()) == shown["memory"]["neededBytes"]
    assert set(shown["memory"]["moments"]) == {"Loading", "Loss", "Backward", "Update"}
    assert (shown["tokens"], shown["cost"]) == (None, None)


def test_what_does_not_fit_says_what_would(hub, call):
    hub.files = model_files(LLAMA_70B, shards=2)
    result = call("--gpu", "l4-24gb")
    assert result.exit_code == 40
    assert "Does not fit." in result.stdout
    assert "Any of these would fit: a GPU such as a6000-48gb" in " ".join(result.stdout.split())
    shown = json.loads(call("--gpu", "l4-24gb", "-o", "json").stdout)
    assert not shown["fits"]
    assert shown["remedies"][0]["value"] == "a6000-48gb"


def test_what_if(hub, call):
    result = call("--gpu", "a100-40gb", "--what-if", "--tokens", "1000000", "--price", "1")
    for part in ("If GPU were", "If lora.rank were", "If dataset.maxLength were", "rtx4090-24gb", "65536"):
        assert part in result.stdout
    shown = json.loads(call("--gpu", "a100-40gb", "--what-if", "-o", "json").stdout)
    chosen = [(v["kind"], v["value"]) for v in shown["whatIf"] if v["chosen"]]
    assert chosen == [("gpu", "a100-40gb"), ("rank", "16"), ("maxLength", "2048")]
    assert all(v["neededBytes"] > 0 for v in shown["whatIf"])


@pytest.mark.parametrize("more", [(), ("--what-if",)])
def test_a_gpu_that_the_trainer_cannot_use_is_refused(more, hub, call):
    result = call("--gpu", "p100-16gb", *more)
    assert result.exit_code == 40
    assert '--gpu: "p100-16gb" has compute capability 6.0; the trainer needs 7.0 or higher' in result.stderr


@pytest.mark.parametrize("gpu", ["t4-16gb", "v100-16gb"])
def test_a_gpu_without_bf16_is_planned_in_float16(gpu, hub, call):
    assert f"Float16 with dynamic loss scaling (Auto on {gpu})" in call("--gpu", gpu).stdout
    assert json.loads(call("--gpu", gpu, "-o", "json").stdout)["computeType"] == "Float16"


def test_a_configuration_alone_is_enough(call, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    result = call("--gpu", "h100-80gb", "--model-config", "config.json", model="hf://nobody/asks")
    assert result.exit_code == 0, result.output
    assert "70.55 billion weights (config.json alone)" in result.stdout


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_configuration_that_is_none_is_named(text, call, tmp_path):
    (tmp_path / "config.json").write_text(text)
    result = call("--gpu", "h100-80gb", "--model-config", "config.json")
    assert result.exit_code == 40
    assert "--model-config: " in result.stderr


def test_fields_can_be_set(hub, call):
    shown = json.loads(call("--gpu", "h100-80gb", "--set", "training.microBatchSize=1", "-o", "json").stdout)
    assert shown["batch"]["microBatchSize"] == 1


def test_the_gpus_of_this_machine_are_the_default(hub, call, monkeypatch):
    cards = tuple(LocalGpu(f"GPU-{n}", "NVIDIA L4", 23 * 2**30) for n in range(2))
    monkeypatch.setattr(plan_job.machine, "look", lambda: Machine(cards))
    shown = json.loads(call("-o", "json").stdout)
    assert shown["gpu"] == {"name": "NVIDIA L4", "memoryBytes": 23 * 2**30, "count": 2}


def test_without_a_gpu_one_must_be_named(hub, call):
    result = call()
    assert result.exit_code == 40
    assert "--gpu: is required, as this machine has no GPU; there are b200-192gb, h200-141gb" in result.stderr
    assert "--gpu: " in call("--gpu", "h100").stderr


def test_a_target_that_names_nothing_is_found_before_anything_runs(hub, call):
    result = call("--gpu", "h100-80gb", "--set", "lora.targetModules=[q_prj]")
    assert result.exit_code == 40
    assert 'spec.lora.targetModules: "q_prj" matches no linear layer' in result.stderr


def test_steps_say_how_many_tokens_there_are_at_most(hub, call):
    shown = json.loads(
        call(
            "--gpu", "h100-80gb", "--set", "training.epochs=null", "--set", "training.maxSteps=10", "-o", "json"
        ).stdout
    )
    assert shown["tokens"] == 10 * 16 * 2048
    assert shown["cost"]["hours"]["low"] < shown["cost"]["hours"]["high"]


@pytest.mark.parametrize(
    ("share", "drawn"),
    [(0, "▏"), (0.5, "█" * 18), (1, "█" * 36), (1.5, "█" * 36 + "▶"), (1 / 288, "▏"), (1.5 / 36, "█▌")],
)
def test_bars(share, drawn):
    assert plan_view.bar(share) == drawn


# ------------------------------------------------------------------------------------------------------ what it loads


@pytest.mark.parametrize(("config", "shards"), [(LLAMA_8B, 4), (LLAMA_70B, 30)], ids=["8B", "70B"])
def test_a_plan_reads_headers_alone_and_loads_no_torch(config, shards, hub, tmp_path):
    hub.files = model_files(config, shards)
    (tmp_path / "job.yaml").write_text(JOB.replace("MODEL", "hf://org/base@main"))
    code = (
        "import sys\n"
        "from typer.testing import CliRunner; from qlora_cli.app import app\n"
        "arguments = ['plan', 'job.yaml', '--gpu', 'h100-80gb', '--what-if']\n"
        "result = CliRunner().invoke(app, arguments)\n"
        "heavy = [m for m in ('torch', 'transformers', 'qlora_trainer', 'numpy') if m in sys.modules]\n"
        "print(result.exit_code, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_nothing_is_asked_of_a_network_for_a_local_model(call, tmp_path, monkeypatch):
    monkeypatch.setattr(httpx, "Client", None)
    folder = write(tmp_path / "model", model_files(LLAMA_8B))
    assert call("--gpu", "h100-80gb", model=folder).exit_code == 0


# ------------------------------------------------------------------------------------------------------------- profiles

VALUES = """\
trainer: {gpu: l4-24gb}
profiles:
  efa: {gpu: h100-80gb}
  product: {nodeSelector: {nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB}}
  small: {memory: {default: 16Gi}}
  mig: {gpuResource: nvidia.com/mig-3g.40gb}
"""


@pytest.mark.parametrize(
    ("profile", "gpu"),
    [("efa", "h100-80gb"), ("product", "a100-80gb"), ("small", "l4-24gb"), (None, "l4-24gb")],
)
@pytest.mark.parametrize("kind", ["values", "ConfigMap"])
def test_the_gpu_follows_from_the_profile_in_the_charts_values(call, tmp_path, profile, gpu, kind):
    text = VALUES if kind == "values" else json.dumps({"kind": "ConfigMap", "data": {"config.yaml": VALUES}})
    (tmp_path / "values.yaml").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    named = ["--set", f"scheduling.profile={profile}"] if profile else []
    done = call("--profiles", "values.yaml", "--model-config", "config.json", "-o", "json", *named)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["gpu"]["name"] == gpu


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "scheduling.profile=efa"], 'as spec.scheduling.profile "efa" is a profile of a cluster'),
        (
            ["--set", "scheduling.profile=eaf", "--profiles", "values.yaml"],
            'did you mean "efa"? Allowed: default, efa, mig, product, small',
        ),
        (
            ["--set", "scheduling.profile=mig", "--profiles", "values.yaml"],
            'profile "mig" of values.yaml does not say which GPU its pods get',
        ),
        (["--profiles", "missing.yaml"], "--profiles"),
    ],
    ids=["no-values", "unknown", "part-of-a-card", "no-file"],
)
def test_a_profile_that_names_no_gpu_is_asked_for_one(call, tmp_path, arguments, said):
    (tmp_path / "values.yaml").write_text(VALUES)
    done = call(*arguments)
    assert done.exit_code == 40
    assert said in " ".join(done.output.split())
