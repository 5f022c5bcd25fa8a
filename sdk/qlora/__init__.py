"""QLoRAJobs from a notebook or a script: submit, follow, compare, fetch the adapter.

::

    from qlora import QLoRAClient

    with QLoRAClient(namespace="research") as client:
        job = client.submit("job.yaml", {"lora.rank": 32})
        for step in client.follow(job.name):
            print(step.state, step.step, step.loss)
        client.metrics([job.name, "baseline"])          # a DataFrame where pandas is installed
        client.adapter(job.name, "adapters/tuned")      # every byte checked

The names below are the public interface, and follow the project's versions; everything else may change at any time.
"""

from qlora.client import JobView, QLoRAClient, QLoRAError
from qlora_api import QLoRAJob, QLoRAJobSpec

__all__ = ["JobView", "QLoRAClient", "QLoRAError", "QLoRAJob", "QLoRAJobSpec"]
