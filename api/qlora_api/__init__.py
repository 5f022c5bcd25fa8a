"""The QLoRAJob API: names, types, conditions and the contract between whoever starts a trainer and the trainer."""

from qlora_api.job import API_VERSION, KIND, QLoRAJob
from qlora_api.spec import QLoRAJobSpec

__all__ = ["API_VERSION", "KIND", "QLoRAJob", "QLoRAJobSpec"]
