"""Record of the machine and the packages with each attempt."""

import pytest
import torch

from qlora_trainer.publish.software_versions import software_versions


def test_versions_and_the_machine_are_named():
    found = software_versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"python", "bitsandbytes", "system"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_card_has_a_driver_and_memory():
    found = software_versions()
    assert found["driver"]
    assert found["cuda"] == torch.version.cuda
    assert int(found["gpuMemory"]) > 1 << 30
