"""Both images as a pod runs them: user 65532, a read-only root file system, nothing of the machine that built them."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from fixtures import skip_unless_ci
from images import containers
from services.binaries import ToolMissingError
from services.images import Image, build, root_file_system

pytestmark = pytest.mark.timeout(1800)  # the first test of each image may build it
MEGABYTE = 1_000_000
IMPORT_ALL = """
import importlib, pkgutil, {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@dataclass
class Unpacked:
    """An image, its configuration, and a way to run it."""

    image: Image
    config: dict
    root: Path
    work: Path
    _numbers: count

    def run(self, *command: str) -> containers.Outcome:
        return containers.run(self.root, self.config["Env"], [*command], self.work / str(next(self._numbers)))

    def python(self, code: str) -> containers.Outcome:
        return self.run("python", "-c", code)


def unpacked(target, work):
    try:
        image = build(target)
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    with tarfile.open(image.archive) as archive:
        name = json.load(archive.extractfile("manifest.json"))[0]["Config"]
        config = json.load(archive.extractfile(name))["config"]
    with root_file_system(image) as root:
        yield Unpacked(image, config, root, work, count())


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    yield from unpacked("operator", tmp_path_factory.mktemp("operator"))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    yield from unpacked("trainer", tmp_path_factory.mktemp("trainer"))


@pytest.fixture(params=["operator", "trainer"])
def either(request):
    return request.getfixturevalue(request.param)


def test_runs_as_a_user_without_rights_and_starts_its_program(operator, trainer):
    assert (operator.config["User"], operator.config["Entrypoint"]) == (
        "65532:65532",
        ["python", "-I", "-u", "-m", "qlora_operator"],
    )
    assert (trainer.config["User"], trainer.config["Entrypoint"]) == (
        "65532:65532",
        ["python", "-I", "-u", "-m", "qlora_trainer"],
    )


def test_has_nothing_of_the_machine_that_built_it(either):
    names = {variable.partition("=")[0] for variable in either.config["Env"]}
    assert names <= {
        *("PATH", "HOME", "PYTHONDONTWRITEBYTECODE", "NVIDIA_DRIVER_CAPABILITIES"),
    }
    traces = (
        "run/uv",
        "run/wheels",
        "run/ca.crt",
        "src",
        "opt/uv",
        "tmp/*",
        "etc/pip.conf",
        "root/.config/*",
        "root/.cache/*",
    )
    assert [found for pattern in traces for found in either.root.glob(pattern)] == []


def test_knows_public_certificate_authorities(either):
    done = either.python("import ssl; print(len(ssl.create_default_context().get_ca_certs()))")
    assert int(done.output) > 50, done.output


def test_writes_nothing_where_the_root_file_system_is_read_only(either):
    done = either.python("open('/opt/venv/x', 'w')")
    assert (done.code, "Read-only file system" in done.output) == (1, True), done.output
    assert either.python("import getpass, pathlib; (pathlib.Path.home() / getpass.getuser()).touch()").code == 0


def test_operator_image_is_small_and_has_no_torch(operator):
    assert operator.image.bytes_above_base < 280 * MEGABYTE  # NumPy, for Optuna, is 80 of it
    done = operator.python(
        "import importlib.util as u; print([n for n in ('torch', 'qlora_trainer') if u.find_spec(n)])"
    )
    assert done.output.strip() == "[]"


def test_operator_image_has_all_the_operator_imports(operator):
    done = operator.python(f"{IMPORT_ALL.format(package='qlora_operator')}\nimport optuna, qlora_sweep.suggest")
    assert done.code == 0, done.output
    assert operator.run(*operator.config["Entrypoint"], "--help").code == 0


def test_trainer_image_has_all_the_trainer_imports(trainer):
    done = trainer.python(IMPORT_ALL.format(package="qlora_trainer"))
    assert done.code == 0, done.output
    assert trainer.image.bytes_above_base < 3000 * MEGABYTE


def test_trainer_image_quantizes_and_learns(trainer):
    """NF4 on the CPU, a backward pass through it, and DeepSpeed's import: all compiled parts are there."""
    done = trainer.python(
        """
import bitsandbytes as bnb, deepspeed, torch
layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
x = torch.randn(2, 64, requires_grad=True)
layer(x).sum().backward()
assert x.grad.abs().sum() > 0
assert layer.weight.dtype is torch.uint8
"""
    )
    assert done.code == 0, done.output


def test_trainer_image_reads_its_config_and_answers_in_the_contract(trainer):
    done = trainer.run(*trainer.config["Entrypoint"], "/tmp/missing.json")
    assert done.code != 0
    assert "missing.json" in done.output
