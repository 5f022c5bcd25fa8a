"""Freed memory in the process's allocator, counted by the kernel in page faults."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_api.batch import BatchSplit
from qlora_api.contract import JobRef, TrainerConfig
from qlora_api.spec import QLoRAJobSpec

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")

CHURN = """
import resource
def churn():
    'Faults of steps that each take and free blocks of 48 MiB.'
    def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for step in range(6):
        if step == 2: before = faults()
        blocks = [bytearray(b'x') * (48 << 20) for _ in range(3)]
        del blocks
    return faults() - before
"""
PAGES_OF_ONE_STEP = 3 * (48 << 20) // os.sysconf("SC_PAGE_SIZE")

PAGES_OF_LOGITS = 8 * 256 * 4096 * 4 // os.sysconf("SC_PAGE_SIZE")
"""Memory pages of the logits in one step of the quickstart's base."""


def faults(code, *arguments, **environment):
    """Run code that ends with a call of ``churn()`` in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHURN + code, *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


KEEP = "from qlora_trainer.allocator import keep_freed_memory\nkeep_freed_memory()\nprint(churn())"


def test_freed_memory_is_used_again_without_a_page_fault():
    assert faults("print(churn())") > 3 * PAGES_OF_ONE_STEP
    assert faults(KEEP) < PAGES_OF_ONE_STEP / 100


@pytest.mark.parametrize("setting", ["MALLOC_TRIM_THRESHOLD_=131072", "GLIBC_TUNABLES=glibc.malloc.perturb=0"])
def test_an_allocator_that_the_environment_configures_is_left_alone(setting):
    assert faults(KEEP, **dict([setting.split("=", 1)])) > 3 * PAGES_OF_ONE_STEP


RANK = """
import sys
from qlora_trainer import rank
rank.run_with_exit_code = lambda config, work: print(churn())
rank.main()
"""
PREPARE = """
import sys
from qlora_trainer.prepare import command
command._again = lambda config: print(churn()) or sys.exit()
command.main()
"""


@pytest.mark.parametrize("code", [pytest.param(RANK, id="rank"), pytest.param(PREPARE, id="prepare")])
def test_the_trainers_processes_keep_it(code, tmp_path):
    spec = {
        "model": {"source": "/model"},
        "dataset": {"train": {"source": "/rows.jsonl"}, "format": "Text"},
        "training": {"maxSteps": 1, "learningRate": "1e-3"},
        "output": {"destination": "/out"},
    }
    config = TrainerConfig(
        job=JobRef(name="churn", uid="1"),
        spec=QLoRAJobSpec.model_validate(spec),
        batch=BatchSplit(world_size=1, micro_batch_size=16, gradient_accumulation_steps=1),
        device="CPU",
        ranks_per_worker=1,
        gradient_checkpointing=False,
        checkpoint_uri="/checkpoints",
        cache_dir="/cache",
        termination_message_path="/message",
    )
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json(by_alias=True, exclude_none=True))
    assert faults(code, str(path)) < PAGES_OF_ONE_STEP / 100


BASE = """
import resource, statistics, sys
sys.path.insert(0, sys.argv[1])
import prepare
class Done(Exception): pass
def build(kept, dtype):
    import small_base, torch
    recipe = small_base.Recipe(hidden=64, intermediate=128, layers=1, heads=1)
    tokenizer = small_base.train_tokenizer(['x'], recipe.vocabulary)
    tokenizer.add_tokens([f'<{i}>' for i in range(recipe.vocabulary - len(tokenizer))])
    model = small_base.make_model(tokenizer, recipe)
    optimizers = small_base.make_optimizers(model, recipe, dtype)
    rows = torch.randint(0, recipe.vocabulary, (recipe.batch, recipe.length))
    counts = []
    for step in range(9):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        small_base.train_step(model, rows, optimizers, dtype)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(statistics.median(counts[4:]))
    raise Done
prepare.build_into = build
sys.argv[1:] = ['--out', sys.argv[2]]
try: prepare.main()
except Done: pass
"""


def test_a_step_of_the_quickstarts_base_takes_no_new_pages(tmp_path):
    out, cache = str(tmp_path / "out"), str(tmp_path / "cache")
    arguments = (BASE, str(ROOT / "examples/quickstart"), out)
    assert faults(*arguments, QLORA_CACHE=cache) < PAGES_OF_LOGITS / 10
