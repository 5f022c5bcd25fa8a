"""A folder such as 'make run' leaves one: the examples, a base, rows, a finished quickstart, all at toy size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from docs.blocks import REPOSITORY
from testing.shared import exclusive_lock, shared_folder
from testing.timeouts import PATIENCE_SECONDS

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS = 300, 64, 128, 2
ROWS = 60
TOY = ("training.epochs=null", "training.maxSteps=2", "training.warmupSteps=0", "training.evaluation.everySteps=2")
RUN_SECONDS = PATIENCE_SECONDS


@dataclass(frozen=True)
class CommandFolder:
    """Folder that the commands of documents run in."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "QLORA_CACHE": str(self.folder / "cache"),
            "KUBECONFIG": str(self.folder / "no-kubeconfig"),
            "COLUMNS": "120",
        }

    def shell(self, text: str) -> subprocess.CompletedProcess[str]:
        """Run a block; the first command that fails ends it. Both outputs are one."""
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )


@pytest.fixture(scope="session")
def command_folder(tmp_path_factory: pytest.TempPathFactory) -> CommandFolder:
    """One for all pytest workers."""
    return CommandFolder(shared_folder(tmp_path_factory, "commands", _make))


@pytest.fixture(scope="session")
def finished(command_folder: CommandFolder) -> CommandFolder:
    """With the quickstart run to its end, by the real trainer."""
    with exclusive_lock(command_folder.folder / ".lock"):
        if not (command_folder.folder / "runs" / "quickstart" / "run.json").exists():
            options = " ".join(f"--set {setting}" for setting in TOY)
            done = command_folder.shell(f"qlora run examples/quickstart.yaml --ranks 1 {options}")
            assert done.returncode == 0, done.stdout
    return command_folder


def _make(folder: Path) -> None:
    for name in ("examples", "charts"):
        shutil.copytree(REPOSITORY / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    data = folder / "runs" / "quickstart-data"
    (data / "base").mkdir(parents=True)
    rows = [{"prompt": f"def f{i}(x):", "completion": f'\n    """Add {i} to x."""'} for i in range(ROWS)]
    for name, some in (("train", rows), ("eval", rows[::10])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    _write_base(data / "base", [row["prompt"] + row["completion"] for row in rows])


def _write_base(folder: Path, texts: list[str]) -> None:
    """A Llama of random weights, without the seconds that torch and transformers take to import."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0"
    square, wide = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN)
    shapes = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "lm_head": (VOCABULARY, HIDDEN),
        **{f"{layer}.self_attn.{name}_proj": square for name in "qkvo"},
        **{f"{layer}.mlp.{name}_proj": wide for name in ("gate", "up")},
        f"{layer}.mlp.down_proj": wide[::-1],
    }
    random = np.random.default_rng(0)
    tensors = {f"{n}.weight": random.normal(0, 0.02, s).astype(np.float32) for n, s in shapes.items()}
    norms = (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm")
    tensors |= {f"{name}.weight": np.ones(HIDDEN, np.float32) for name in norms}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
