"""A tiny but real job: a Llama of random weights, tokenizer and rows from the standard library, two CPU ranks."""

from __future__ import annotations

import ast
import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_api import QLoRAJobSpec
from qlora_api.batch import split_batch
from qlora_api.contract import JobRef, TerminationMessage, TrainerConfig
from qlora_trainer.__main__ import ready
from qlora_trainer.prepare.command import prepare
from qlora_trainer.reporting.rank_exit import run_with_exit_code
from testing.forks import ForkedProgram, fork_context, start_program
from testing.ports import free_port
from testing.timeouts import PATIENCE_SECONDS

sys.path.insert(0, str(Path(__file__).parent))  # where forked processes find forked_rank
import forked_rank
from worker_pods import WorkerPod

VOCABULARY = 512
MODULES = ("argparse", "ast", "pathlib", "tarfile")


def stdlib_rows() -> Iterator[dict[str, str]]:
    """Signature → first line of the docstring."""
    for module in MODULES:
        tree = ast.parse((Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py").read_text("utf-8"))
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text:
                arguments = ", ".join(a.arg for a in node.args.args)
                yield {"prompt": f"def {node.name}({arguments}):\n", "completion": text.splitlines()[0]}


@dataclass(frozen=True)
class TrainerRunner:
    """Run the trainer's programs in a folder, on a model and rows."""

    model: Path
    rows: Path
    cache: Path
    folder: Path

    def spec(self, **changes: Any) -> dict[str, Any]:
        """A small valid spec; ``changes`` are laid over it, group by group."""
        spec: dict[str, Any] = {
            "model": {"source": str(self.model)},
            "dataset": {
                "train": {"source": str(self.rows)},
                "eval": {"fraction": "0.2"},
                "format": "PromptCompletion",
                "maxLength": 128,
                "longRows": "Drop",
            },
            "lora": {"rank": 8},
            "training": {"epochs": 3, "globalBatchSize": 4, "microBatchSize": 1, "learningRate": "5e-3"},
            "output": {"destination": str(self.folder / "out")},
        }
        for group, fields in changes.items():
            spec[group] = {**spec.get(group, {}), **fields} if isinstance(fields, dict) else fields
        return spec

    def config(
        self, attempt: int = 1, uid: str = "0a1b2c3d-run", ranks: int = 2, pause: int | None = None, **changes: Any
    ) -> TrainerConfig:
        spec = QLoRAJobSpec.model_validate(self.spec(**changes))
        return TrainerConfig(
            job=JobRef(name="tiny", uid=uid),
            spec=spec,
            attempt=attempt,
            batch=split_batch(spec, ranks),
            device="CPU",
            ranks_per_worker=ranks,
            key_file=str(self.key_file()),
            gradient_checkpointing=False,
            pause_at_step=pause,
            checkpoint_uri=str(self.folder / "checkpoints"),
            cache_dir=str(self.cache),
            termination_message_path=str(self.folder / f"termination-{attempt}.json"),
            metrics_port=0,
            metrics_host="127.0.0.1",
            ports_dir=str(self.folder / f"ports-{attempt}"),
        )

    def key_file(self) -> Path:
        """The run's key, the same for all its attempts."""
        path = self.folder / "key"
        if not path.exists():
            path.write_text(secrets.token_hex(32))
        return path

    def write(self, config: TrainerConfig) -> tuple[Path, Path]:
        """The config file of an attempt, and where its log goes."""
        path, log = self.folder / f"config-{config.attempt}.json", self.folder / f"log-{config.attempt}.txt"
        path.write_text(config.model_dump_json(by_alias=True))
        log.touch()
        return path, log

    def launch(self, config: TrainerConfig) -> ForkedProgram:
        """Start the real launcher, which starts real ranks."""
        path, log = self.write(config)
        return start_program(["-m", "qlora_trainer", str(path)], log)

    def launch_anew(self, config: TrainerConfig) -> subprocess.Popen[bytes]:
        """Start it with all its imports, which may read the environment."""
        path, log = self.write(config)
        with log.open("ab") as out:
            command = [sys.executable, "-m", "qlora_trainer", str(path)]
            return subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def run(self, config: TrainerConfig) -> AttemptResult:
        """Prepare here, then train in one forked process for each rank."""
        code = self.prepare(config)
        return self.ended(config, code) if code else self.train(config)

    def prepare(self, config: TrainerConfig) -> int:
        """Prepare here, where everything is imported; the exit code."""
        path, _ = self.write(config)
        return run_with_exit_code(config, lambda _: (prepare(config), ready(config, path), None)[2])

    def train(self, config: TrainerConfig) -> AttemptResult:
        """Train in one forked process for each rank; all is prepared."""
        ranks = self.fork(config)
        for process in ranks:
            process.join(timeout=PATIENCE_SECONDS)
            process.kill()
        codes = [p.exitcode or 0 for p in ranks]
        said = self.ended(config, max(codes))
        return self.ended(config, said.message.exit_code) if said.message else said

    def fork(self, config: TrainerConfig) -> list[Any]:
        """Start one process for each rank."""
        path, log = self.write(config)
        world = config.batch.world_size
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [
            fork_context().Process(target=forked_rank.run_rank, args=(str(path), str(log), environment, rank, world))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        return ranks

    def kill_at(self, config: TrainerConfig, step: int) -> AttemptResult:
        """Train until the log shows ``step``, then kill all ranks as a lost node would."""
        ranks = self.fork(config)
        log = self.folder / f"log-{config.attempt}.txt"
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            while f" step {step}/" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.02)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return self.ended(config, 137)

    def stop_at(self, config: TrainerConfig, step: int) -> AttemptResult:
        """Send SIGTERM to the real launcher as soon as the log shows ``step``."""
        process = self.launch(config)
        try:
            self.wait_for_step(process, config, step)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=PATIENCE_SECONDS)
        finally:
            process.terminate()
        return self.ended(config, code)

    def wait_for_step(self, process: ForkedProgram, config: TrainerConfig, step: int) -> None:
        log = self.folder / f"log-{config.attempt}.txt"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while f" step {step}/" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.02)

    def ranks(self, launcher: ForkedProgram) -> list[psutil.Process]:
        """Return the processes that a launcher started, which it does in their order."""
        return sorted(psutil.Process(launcher.pid).children(), key=lambda process: (process.create_time(), process.pid))

    def ended(self, config: TrainerConfig, code: int) -> AttemptResult:
        path = Path(config.termination_message_path)
        message = TerminationMessage.model_validate_json(path.read_bytes()) if path.exists() else None
        return AttemptResult(code, message, (self.folder / f"log-{config.attempt}.txt").read_text())


@dataclass(frozen=True)
class AttemptResult:
    """End of an attempt."""

    code: int
    message: TerminationMessage | None
    log: str

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step, from the log."""
        found = {}
        for line in self.log.splitlines():
            _, marked, rest = line.partition(" INFO step ")
            if marked and " loss " in rest and "/" in rest.split()[0]:
                words = rest.split()
                found[int(words[0].split("/")[0])] = float(words[2])
        return found

    @property
    def text(self) -> str:
        assert self.message is not None, self.log[-3000:]
        return self.message.message


@pytest.fixture(scope="session")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainerRunner:
    folder = tmp_path_factory.mktemp("tiny")
    rows = list(stdlib_rows())
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (r["prompt"] + r["completion"] for r in rows),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = folder / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(model)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=0,
        )
    ).bfloat16().save_pretrained(model)
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    return TrainerRunner(model=model, rows=folder / "rows.jsonl", cache=folder / "cache", folder=folder)


@pytest.fixture
def runner(_tiny: TrainerRunner, tmp_path: Path) -> TrainerRunner:
    """The tiny job in a folder of its own."""
    return TrainerRunner(model=_tiny.model, rows=_tiny.rows, cache=tmp_path / "cache", folder=tmp_path)


@pytest.fixture
def pods(runner, monkeypatch):
    """Makes the pods of an attempt, and ends those that a failing test left."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made: list[WorkerPod] = []

    def make(workers: int = 2, ranks: int = 1, **changes) -> list[WorkerPod]:
        config = runner.config(ranks=workers * ranks, **changes).model_copy(
            update={"workers": workers, "ranks_per_worker": ranks, "rendezvous": f"127.0.0.1:{free_port()}"}
        )
        assert runner.prepare(config) == 0  # here, where all is imported
        pods = [WorkerPod(config, index, runner.folder) for index in range(workers)]
        made.extend(pods)
        return pods

    yield make
    for pod in made:
        if pod.process and pod.process.poll() is None:
            for child in psutil.Process(pod.process.pid).children(recursive=True):
                child.kill()
            pod.process.kill()
            pod.process.wait()
