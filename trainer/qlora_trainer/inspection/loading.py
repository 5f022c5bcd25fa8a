"""Read a base as the trainer loads it, and measure each layer in place of quantizing it.

Names and conversions are transformers' own; of each parameter nothing stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer

from qlora_trainer.errors import UserError
from qlora_trainer.inspection.layer_meter import LayerMeter
from qlora_trainer.model.base_model import causal_config
from qlora_trainer.model.experts.targets import linear_layers
from qlora_trainer.model.loading.hf_quantizers import FourBitConfig, FourBitQuantizer
from qlora_trainer.model.loading.read_weights import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

METHOD = "qlora_inspection"
"""Name under which transformers finds :class:`MeasuringQuantizer`."""


def measure_base(path: Path, device: torch.device, report: Callable[[dict[str, Any]], None]) -> None:
    """Measure all layers and experts that NF4 would quantize, one after another.

    Args:
        path: folder of a checked base.
        device: that computes.
        report: takes the result of each as soon as it is there.

    Raises:
        UserError: the base is quantized on disk, other than in MXFP4 or FP8.

    """
    config = causal_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError("MODEL", str(path), "is quantized on disk: inspect the 16-bit base")
    load_weights(path, config, None, "cpu", quantization_config=_MeasuringConfig(device, report))


class _MeasuringConfig(FourBitConfig):
    def __init__(self, device: torch.device, report: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self.quant_method = METHOD
        self.measured_on, self.report = device, report
        if METHOD not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(METHOD)(MeasuringQuantizer)


class MeasuringQuantizer(FourBitQuantizer):
    """The trainer's 4-bit quantizer, which measures what that would quantize and lets go of all weights."""

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.layer_names: dict[str, str] = {}

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any, checkpoint_files: Iterable[str] | None = None, **more: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map, checkpoint_files, **more)
        self.layer_names = {f"{name}.weight": name for name in linear_layers(model)}

    def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:  # noqa: ARG002
        return True

    def get_quantize_ops(self) -> ConversionOps:
        return _Measure(self)

    def pack(self, model: Any, name: str, read: Callable[[int], torch.Tensor]) -> nn.Parameter:
        """Measure the experts of one parameter, in place of packing them."""
        wanted = model.get_parameter(name)
        meter = LayerMeter(name)
        for index in range(wanted.shape[0]):
            weight = read(index)
            meter.add(self._moved(weight[0] if weight.ndim == wanted.ndim else weight))
        self.quantization_config.report(meter.result())
        return _nothing(wanted)

    def measure(self, name: str, weight: torch.Tensor) -> None:
        """Measure a linear layer."""
        meter = LayerMeter(self.layer_names[name])
        meter.add(self._moved(weight))
        self.quantization_config.report(meter.result())

    def _moved(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.quantization_config.measured_on)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        return model


class _Measure(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantizer: MeasuringQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Any]:
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if name in self.quantizer.expert_names:
                self.quantizer.pack(model, name, weight.__getitem__)
            elif name in self.quantizer.layer_names:
                self.quantizer.measure(name, weight)
        return {name: _nothing(model.get_parameter_or_buffer(name)) for name in input_dict}


def _nothing(parameter: torch.Tensor) -> nn.Parameter:
    """Return a parameter without memory in place of one that was read."""
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False)
