"""The public package: its names, its types, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files

import qlora


def test_every_public_name_is_there_and_documented():
    assert sorted(qlora.__all__) == ["JobView", "QLoRAClient", "QLoRAError", "QLoRAJob", "QLoRAJobSpec"]
    for name in qlora.__all__:
        assert getattr(qlora, name).__doc__, name
    methods = [name for name in vars(qlora.QLoRAClient) if not name.startswith("_")]
    assert not [
        name for name in methods if not getattr(qlora.QLoRAClient, name).__doc__ and name not in ("close", "namespace")
    ]


def test_the_package_is_typed():
    assert files(qlora).joinpath("py.typed").is_file()


def test_a_manifest_is_checked_without_a_cluster():
    spec = {"model": {"source": "s3://b/m"}, "dataset": {"train": {"source": "s3://b/r.jsonl"}, "format": "Text"}}
    spec |= {"training": {"maxSteps": 1}, "output": {"destination": "s3://b/out"}}
    assert qlora.QLoRAJobSpec.model_validate(spec).lora.rank == 16


def test_importing_it_loads_no_torch():
    code = "import qlora, sys; assert not {'torch', 'transformers', 'obstore', 'kubernetes'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
