"""An adapter has a manifest if, and only if, it is whole, trained and uploaded; and it has one manifest."""

import json
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_storage.object_store import NotFoundError, open_store, sha256_bytes
from qlora_trainer.errors import UserError
from qlora_trainer.publish.gate import AdapterRejectedError, verify_adapter, verify_loads
from qlora_trainer.publish.publisher import Manifest, _declare, check_destination, publish, verify_published
from services.faulty_s3 import S3Fault, faulty_s3
from storage_fixtures import edit_json

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
LAYERS = tuple(f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj"))


def keys(uri):
    return [key for key, _ in open_store(uri, "x").list()]


# ------------------------------------------------------------------------------------------------------- a good adapter


def test_a_good_adapter_gets_a_manifest_that_names_everything(place, tmp_path, make_adapter, make_facts, job):
    adapter = publish(place, job, 2, make_adapter(tmp_path / "out"), make_facts(), base_names=LAYERS)
    store = open_store(place, "x")
    data = store.get("manifest.json")
    assert adapter.manifest_uri == store.uri("manifest.json")
    assert adapter.manifest_sha256 == sha256_bytes(data)
    assert adapter.uri == store.uri("3f2a9c01-attempt-2/adapter")
    manifest = json.loads(data)
    assert (manifest["schema"], manifest["job"], manifest["namespace"]) == ("qlora.dev/manifest/v1", "tune", "team")
    assert (manifest["runUid"], manifest["attempt"], manifest["merged"]) == (job.uid, 2, None)
    assert manifest["base"] == {"source": "hf://org/base@main", "revision": "c" * 40}
    assert manifest["metrics"]["evalLoss"] == 1.25
    assert manifest["config"]["training"]["optimizer"] == "PagedAdamW8Bit", "defaults are filled in"
    assert {"torch", "peft", "transformers", "python"} <= manifest["packages"].keys()
    assert {f["path"].rpartition("/")[2] for f in manifest["files"]} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "README.md",
    }
    assert verify_published(adapter.manifest_uri) == []


def test_a_merged_model_is_published_besides(place, tmp_path, make_adapter, make_model, make_facts, job):
    out = make_adapter(tmp_path / "out")
    make_model(out / "merged", shards=2)
    adapter = publish(place, job, 1, out, make_facts())
    manifest = json.loads(open_store(place, "x").get("manifest.json"))
    assert manifest["merged"] == "3f2a9c01-attempt-1/merged"
    assert len([f for f in manifest["files"] if "/merged/" in f["path"]]) == 6
    assert verify_published(adapter.manifest_uri) == []


def test_numbers_that_are_not_finite_do_not_break_the_manifest(tmp_path, make_adapter, make_facts, job):
    facts = make_facts(base_eval_loss=float("nan"), eval_loss=None)
    adapter = publish(str(tmp_path / "to"), job, 1, make_adapter(tmp_path / "out"), facts)
    metrics = json.loads((tmp_path / "to" / "manifest.json").read_text())["metrics"]
    assert (metrics["baseEvalLoss"], metrics["evalLoss"]) == (None, None)
    assert verify_published(adapter.manifest_uri) == []


def test_what_is_published_loads_on_the_base_and_answers_the_same(tmp_path, make_facts, job):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(base, lora).eval()
    tuned.save_pretrained(tmp_path / "out" / "adapter")
    (tmp_path / "out" / "adapter" / "tokenizer.json").write_text("{}")
    names = [name for name, _ in LlamaForCausalLM.from_pretrained(tmp_path / "base").named_parameters()]
    adapter = publish(str(tmp_path / "to"), job, 1, tmp_path / "out", make_facts(), base_names=names)

    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, adapter.uri).eval()
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, tuned(tokens).logits)


# ------------------------------------------------------------------------------------------------------------- the gate


def _remove(name):
    return lambda f: (f / "adapter" / name).unlink()


def _tensors(change):
    def spoil(folder):
        path = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


def _set(name, tensor):
    return _tensors(lambda t: t.update({name: tensor}))


def _drop(*names):
    return _tensors(lambda t: [t.pop(name) for name in names])


def _untrain(tensors):
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = torch.zeros_like(tensors[name])


def _config(**changes):
    return lambda f: edit_json(f / "adapter" / "adapter_config.json", **changes)


def _write_config(text):
    return lambda f: (f / "adapter" / "adapter_config.json").write_text(text)


def _cut(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _rename(old, new):
    return _tensors(lambda t: t.update({name.replace(old, new): t.pop(name) for name in list(t)}))


def _file(name):
    return lambda f: (f / "adapter" / name).write_bytes(b"x")


def _merged_without_weights(folder):
    (folder / "merged").mkdir()
    (folder / "merged" / "config.json").write_text("{}")


BAD_ADAPTERS = [
    pytest.param(lambda f: shutil.rmtree(f / "adapter"), "no adapter_model.safetensors", id="nothing"),
    pytest.param(_remove("adapter_model.safetensors"), "no adapter_model.safetensors", id="no-weights"),
    pytest.param(_remove("adapter_config.json"), "no adapter_config.json", id="no-config"),
    pytest.param(_remove("tokenizer.json"), "no tokenizer", id="no-tokenizer"),
    pytest.param(_write_config("{"), "cannot be read by PEFT", id="config-no-json"),
    pytest.param(_config(peft_type="NONSENSE"), "cannot be read by PEFT", id="config-of-no-type"),
    pytest.param(_write_config('{"peft_type": "LOHA"}'), "not LORA", id="config-of-another-type"),
    pytest.param(_cut, "cut short", id="weights-cut-short"),
    pytest.param(_tensors(dict.clear), "no LoRA tensors", id="weights-empty"),
    pytest.param(_drop(f"{Q0}.lora_B.weight"), "no lora_B for model.layers.0", id="b-missing"),
    pytest.param(_drop(f"{Q0}.lora_A.weight"), "no lora_A for model.layers.0", id="a-missing"),
    pytest.param(_set(f"{Q0}.lora_A.weight", torch.full((4, 8), torch.nan)), "not finite", id="nan"),
    pytest.param(_set(f"{Q0}.lora_B.weight", torch.full((8, 4), torch.inf)), "not finite", id="infinite"),
    pytest.param(_set(f"{Q0}.lora_B.weight", torch.zeros(8, 0)), "is empty", id="empty-tensor"),
    pytest.param(_set(f"{Q0}.lora_B.weight", torch.ones(8, 3)), "have ranks 4 and 3", id="ranks-differ"),
    pytest.param(_tensors(_untrain), "every B of the adapter is zero", id="untrained"),
    pytest.param(
        _drop(f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"), "no weights for model.layers.0", id="a-layer-missing"
    ),
    pytest.param(
        _config(target_modules=["q_proj", "o_proj"]),
        r"no weights for model\.layers\.0\.self_attn\.o_proj",
        id="a-target-missing",
    ),
    pytest.param(_config(modules_to_save=["lm_head"]), "modules_to_save: lm_head", id="whole-modules-trained"),
    pytest.param(_config(rank_pattern={"q_proj": 8}), "has rank_pattern", id="ranks-by-layer"),
    pytest.param(_config(alpha_pattern={"q_proj": 8}), "has alpha_pattern", id="alphas-by-layer"),
    pytest.param(_config(use_dora=True), "DoRA, which spec.lora.dora does not ask for", id="dora-nobody-asked-for"),
    pytest.param(_config(bias="all"), "biases, which spec.lora.bias does not ask for", id="bias-nobody-asked-for"),
    pytest.param(_config(r=8), "has rank 4, and the adapter's adapter_config.json says 8", id="rank-of-the-config"),
    pytest.param(_set("base_model.model.lm_head.weight", torch.ones(3, 8)), "is no LoRA weight", id="a-base-weight"),
    pytest.param(_set(f"{Q0}.lora_magnitude_vector", torch.ones(8)), "is no LoRA weight", id="a-magnitude"),
    pytest.param(_rename("base_model.model.model", "model.model"), "no LoRA tensors", id="names-without-prefix"),
    pytest.param(_file("new_embeddings.safetensors"), "holds new_embeddings.safetensors", id="own-vocabulary"),
    pytest.param(_file("adapter_model.bin"), "holds adapter_model.bin", id="pickled-weights-beside"),
    pytest.param(_merged_without_weights, "the merged model has neither", id="merged-without-weights"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD_ADAPTERS)
def test_a_bad_adapter_gets_no_manifest(tmp_path, make_adapter, make_facts, job, spoil, said):
    out = make_adapter(tmp_path / "out")
    spoil(out)
    names = [*LAYERS, "model.layers.0.self_attn.o_proj", "model.embed_tokens", "lm_head"]
    with pytest.raises(AdapterRejectedError, match=said):
        publish(str(tmp_path / "to"), job, 1, out, make_facts(), base_names=names)
    assert not (tmp_path / "to" / "manifest.json").exists()


SHAPE = LlamaConfig(
    vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=16,
)  # fmt: skip


def skeleton(config=SHAPE):
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(_set(f"{Q0}.lora_A.weight", torch.ones(4, 9)), "size mismatch", id="another-width"),
        pytest.param(_rename("q_proj", "o_proj"), "q_proj", id="weights-of-another-layer"),
    ],
)
def test_an_adapter_that_does_not_load_onto_its_base_gets_no_manifest(
    tmp_path, make_adapter, make_facts, job, spoil, said
):
    out = make_adapter(tmp_path / "out")
    publish(str(tmp_path / "good"), job, 1, out, make_facts(), skeleton=skeleton())
    (out / "adapter" / "README.md").unlink()
    spoil(out)
    with pytest.raises(AdapterRejectedError, match=said):
        publish(str(tmp_path / "to"), job, 1, out, make_facts(), skeleton=skeleton())
    assert not (tmp_path / "to" / "manifest.json").exists()


def test_an_adapter_for_a_larger_base_is_found_out_by_loading_it(tmp_path, make_adapter):
    larger = LlamaConfig(**{**SHAPE.to_dict(), "num_hidden_layers": 3})
    with pytest.raises(AdapterRejectedError, match=r"no weights for .*layers\.2.* when it is loaded"):
        verify_loads(make_adapter(tmp_path / "out") / "adapter", skeleton(larger))


def test_an_adapter_that_is_worse_than_its_base_gets_no_manifest_unless_it_may(tmp_path, make_adapter, make_facts, job):
    worse = {"base_eval_loss": 2.5, "eval_loss": 2.5001}
    out = make_adapter(tmp_path / "out")
    with pytest.raises(AdapterRejectedError, match=r"2\.5001, and the base's is 2\.5:.*spec\.output\.allowWorseEval"):
        publish(str(tmp_path / "to"), job, 1, out, make_facts(**worse))
    assert not (tmp_path / "to" / "manifest.json").exists()
    allowed = make_facts(**worse, output={"destination": "s3://adapters/tune", "allowWorseEval": True})
    assert publish(str(tmp_path / "to"), job, 1, out, allowed)


def test_what_the_job_asked_for_is_published_though_vllm_serves_it_merged_only(tmp_path, make_adapter, make_facts, job):
    out = make_adapter(tmp_path / "out")
    _set(f"{Q0}.lora_magnitude_vector", torch.ones(8))(out)
    _config(use_dora=True)(out)
    assert publish(str(tmp_path / "to"), job, 1, out, make_facts(lora={"dora": True}), base_names=LAYERS)


def test_without_the_base_s_names_a_target_nobody_has_is_still_found(tmp_path, make_adapter):
    out = make_adapter(tmp_path / "out")
    verify_adapter(out / "adapter")
    edit_json(out / "adapter" / "adapter_config.json", target_modules=["q_proj", "o_proj"])
    with pytest.raises(AdapterRejectedError, match="no weights for any o_proj"):
        verify_adapter(out / "adapter")


def test_weights_for_layers_the_base_lacks_are_refused(tmp_path, make_adapter):
    with pytest.raises(AdapterRejectedError, match=r"model\.layers\.1.*which the base lacks"):
        verify_adapter(make_adapter(tmp_path / "out") / "adapter", [n for n in LAYERS if ".1." not in n])


def test_some_layers_may_have_learned_nothing_and_magnitudes_are_allowed(tmp_path, make_adapter):
    out = make_adapter(tmp_path / "out")
    _set(f"{Q0}.lora_B.weight", torch.zeros(8, 4))(out)
    _set(f"{Q0}.lora_magnitude_vector", torch.ones(8))(out)
    verify_adapter(out / "adapter", LAYERS)


# --------------------------------------------------------------------------------------------------------- one manifest


def test_publishing_twice_answers_what_is_there(place, tmp_path, make_adapter, make_facts, job):
    first = publish(place, job, 1, make_adapter(tmp_path / "1"), make_facts())
    before = keys(place)
    assert publish(place, job, 2, make_adapter(tmp_path / "2"), make_facts()) == first
    assert keys(place) == before


def test_a_manifest_whose_answer_was_lost_is_known_as_ours(place, tmp_path, make_adapter, make_facts, job):
    publish(place, job, 1, make_adapter(tmp_path / "out"), make_facts())
    store = open_store(place, "x")
    data = store.get("manifest.json")
    manifest = Manifest.model_validate_json(data)
    assert _declare(store, manifest, data) == (manifest, data)


def test_attempts_of_a_run_that_publish_at_once_agree(place, tmp_path, make_adapter, make_facts, job):
    outs = [make_adapter(tmp_path / str(n)) for n in range(4)]
    together = threading.Barrier(len(outs))

    def attempt(number):
        together.wait()
        return publish(place, job, number + 1, outs[number], make_facts())

    with ThreadPoolExecutor(len(outs)) as pool:
        adapters = set(map(str, pool.map(attempt, range(len(outs)))))
    assert len(adapters) == 1
    assert verify_published(f"{open_store(place, 'x').uri()}/manifest.json") == []
    assert len({key.split("/")[0] for key in keys(place)}) == 2, "the slower attempts leave no folder behind"


def test_of_two_runs_exactly_one_gets_the_destination(place, tmp_path, make_adapter, make_facts, job):
    jobs = [job.model_copy(update={"uid": f"{n}{job.uid[1:]}"}) for n in range(4)]
    outs = [make_adapter(tmp_path / str(n)) for n in range(len(jobs))]
    together = threading.Barrier(len(jobs))

    def run(number):
        together.wait()
        try:
            publish(place, jobs[number], 1, outs[number], make_facts())
        except UserError as error:
            return str(error)
        return jobs[number].uid

    with ThreadPoolExecutor(len(jobs)) as pool:
        results = list(pool.map(run, range(len(jobs))))
    (winner,) = [r for r in results if r in {j.uid for j in jobs}]
    assert all(f"already holds the adapter of run {winner}" in r for r in results if r != winner)
    assert verify_published(f"{place}/manifest.json") == []


def test_a_destination_of_another_run_is_refused_before_and_after_the_training(
    place, tmp_path, make_adapter, make_facts, job
):
    publish(place, job, 1, make_adapter(tmp_path / "out"), make_facts())
    other = job.model_copy(update={"uid": "99999999-other"})
    said = rf'^spec\.output\.destination: ".*" already holds the adapter of run {job.uid} \(team/tune\); choose another'
    with pytest.raises(UserError, match=said):
        check_destination(place, other.uid)
    with pytest.raises(UserError, match=said):
        publish(place, other, 1, make_adapter(tmp_path / "other"), make_facts())
    check_destination(place, job.uid)


@pytest.mark.parametrize("inside", ["3f2a9c01-attempt-1/adapter", "3f2a9c01-attempt-1", "adapter/of/mine", "merged"])
def test_a_destination_inside_a_published_adapter_is_refused(place, tmp_path, make_adapter, make_facts, job, inside):
    adapter = publish(place, job, 1, make_adapter(tmp_path / "out"), make_facts())
    other = job.model_copy(update={"uid": "99999999-other"})
    with pytest.raises(
        UserError, match=r'^spec\.output\.destination: ".*" is in a folder of the adapter that .*manifest'
    ):
        check_destination(f"{place}/{inside}", other.uid)
    assert verify_published(adapter.manifest_uri) == []
    check_destination(f"{place}/beside", other.uid)


def test_a_manifest_that_is_none_of_ours_is_left_alone(place, tmp_path, make_adapter, make_facts, job):
    open_store(place, "x").put("manifest.json", b'{"name": "a web app"}')
    for act in (
        lambda: check_destination(place, job.uid),
        lambda: publish(place, job, 1, make_adapter(tmp_path / "out"), make_facts()),
    ):
        with pytest.raises(UserError, match="not a manifest of this operator"):
            act()
    assert open_store(place, "x").get("manifest.json") == b'{"name": "a web app"}'


def test_an_upload_that_was_cut_short_is_made_good(place, tmp_path, make_adapter, make_facts, job):
    store = open_store(place, "x")
    store.put("3f2a9c01-attempt-1/adapter/adapter_model.safetensors", b"half")
    store.put("3f2a9c01-attempt-1/adapter/left-over", b"x")
    adapter = publish(place, job, 1, make_adapter(tmp_path / "out"), make_facts())
    assert verify_published(adapter.manifest_uri) == []


# -------------------------------------------------------------------------------------------------- before the training


def test_checking_a_destination_leaves_nothing_behind(place):
    check_destination(place, "run")
    assert keys(place) == []
    with pytest.raises(NotFoundError):
        open_store(place, "x").get("manifest.json")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param(S3Fault("ignored", 200, headers=(("ETag", '"e"'),)), "ignores If-None-Match", id="ignored"),
        pytest.param(S3Fault("unknown", 501, "NotImplemented"), r"refuses create-only writes \(.*501", id="unknown"),
    ],
)
def test_a_server_without_create_only_writes_is_found_before_the_training(s3, monkeypatch, s3_server, fault, said):
    with faulty_s3(s3_server) as server, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        # the first write of the probe is a plain one, the second asks for what must not be there
        server.choose = lambda call, times: fault if call[0] == "PUT" and times else None
        with pytest.raises(UserError, match=rf'^spec\.output\.destination: "s3://.*{said}.*conditional writes'):
            check_destination(s3, "run")
    check_destination(s3, "run")


def test_a_destination_that_cannot_be_written_is_found_before_the_training(tmp_path, tmpfs, s3, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        check_destination(str(tmp_path / "file" / "out"), "run")
    with tmpfs("size=1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        with pytest.raises(UserError, match="Read-only file system"):
            check_destination(str(folder / "out"), "run")
    with pytest.raises(UserError, match="no such bucket"):
        check_destination("s3://no-such-bucket/x", "run")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r'spec\.output\.destination: "s3://.*" cannot be used: access is denied \(403'):
        check_destination(s3, "run")
