"""Quantize experts as they are loaded, one at a time.

transformers' loader reads all experts of a layer, stacks them, and hands the whole to its quantizer, which passes
three-dimensional parameters by. Here each expert is read, converted and packed by itself: never is more than one of
them there in 16 bits. Its quantizers pass linear layers of a model's own class by, too: they are unified before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, Transpose, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from qlora_trainer.errors import TrainerError
from qlora_trainer.model.experts.packed import Format, Packer, Stack
from qlora_trainer.model.experts.structure import expert_parameters, router_names
from qlora_trainer.model.loading.disk_tensors import DiskTensors
from qlora_trainer.model.loading.plain_linear import unify_linear_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

METHOD = "qlora_bitsandbytes"
"""Name under which transformers finds :class:`FourBitQuantizer`."""
EIGHT_BIT_METHOD = "qlora_bitsandbytes_8bit"
"""Name under which transformers finds :class:`EightBitQuantizer`."""


class FourBitConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """bitsandbytes' 4-bit configuration, for linear layers and experts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(load_in_4bit=True, **options)
        self.quant_method = METHOD
        self.tensors: DiskTensors | None = None
        """Files of a base that is dequantized as it is read; for others the quantizer receives the names of the
        files."""
        if METHOD not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(METHOD)(FourBitQuantizer)

    @property
    def form(self) -> Format:
        """Return how experts are held."""
        return Format(self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant, self.bnb_4bit_quant_storage)


class FourBitQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' 4-bit quantizer, which packs experts as well and leaves routers as they are."""

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.expert_names: frozenset[str] = frozenset()
        self.files = DiskTensors(())

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any, checkpoint_files: Iterable[str] | None = None, **more: Any
    ) -> None:
        skipped = self.get_modules_to_not_convert(model, self.quantization_config.llm_int8_skip_modules)
        self.expert_names = frozenset(expert_parameters(model)).difference(skipped)
        self.files = self.quantization_config.tensors or DiskTensors(checkpoint_files or ())
        self.device = torch.device(device_map[""])
        _prepare_layers(self, model)
        super()._process_model_before_weight_loading(model, device_map, **more)

    def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
        return param_name in self.expert_names or super().param_needs_quantization(model, param_name, **more)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Have converters that make experts of many tensors, or of one, do so one expert at a time."""
        found = super().update_weight_conversions(weight_conversions, model)
        updated = [_OneAtATime.of(c, self) if self._makes_experts(c) else c for c in found]
        read = {pattern for c in updated if isinstance(c, WeightConverter) for pattern in c.source_patterns}
        names = sorted({".".join(name.rsplit(".", 2)[1:]) for name in self.expert_names})
        stacked = [name for name in names if not any(pattern.endswith(name) for pattern in read)]  # on disk already
        return updated + [_OneAtATime(rf"\.{n}$", f".{n}", [_Nothing()], quantizer=self) for n in stacked]

    def _process_model_after_weight_loading(self, model: Any, **more: Any) -> Any:
        self.files = DiskTensors(())
        return super()._process_model_after_weight_loading(model, **more)

    def _makes_experts(self, converter: Any) -> bool:
        if not isinstance(converter, WeightConverter) or len(converter.target_patterns) != 1:
            return False
        (target,) = converter.target_patterns
        is_target = any(name.endswith(target.replace("\\", "")) for name in self.expert_names)
        return is_target and all(_is_separable(op) for op in converter.operations)

    def pack(self, model: Any, name: str, read: Callable[[int], torch.Tensor]) -> torch.nn.Parameter:
        """Pack the experts of one parameter, or hold them as they are where the job says so.

        Args:
            model: with that parameter, not loaded yet.
            name: of it.
            read: returns an expert, [rows, columns] or [1, rows, columns].

        Raises:
            TrainerError: an expert has another shape than the model wants.

        """
        wanted = model.get_parameter(name)
        held = Packer if name in self.expert_names else Stack
        packer = held(wanted.shape, wanted.dtype, self.device, self.quantization_config.form)
        for index in range(wanted.shape[0]):
            weight = read(index)
            weight = weight[0] if weight.ndim == wanted.ndim else weight
            if weight.shape != wanted.shape[1:]:
                raise TrainerError(
                    f"{name}: expert {index} is {list(weight.shape)} on disk, not {list(wanted.shape[1:])}"
                )
            packer.put(index, weight)
            del weight  # or it would be there beside the next one
        return packer.parameter()


class EightBitConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """bitsandbytes' 8-bit configuration, for linear layers; experts stay in 16 bits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(load_in_8bit=True, **options)
        self.quant_method = EIGHT_BIT_METHOD
        if EIGHT_BIT_METHOD not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(EIGHT_BIT_METHOD)(EightBitQuantizer)


class EightBitQuantizer(Bnb8BitHfQuantizer):  # type: ignore[misc]
    """transformers' 8-bit quantizer, which finds layers of a model's own class and leaves routers as they are."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **more: Any) -> None:
        _prepare_layers(self, model)
        super()._process_model_before_weight_loading(model, device_map, **more)


def _prepare_layers(quantizer: Any, model: Any) -> None:
    """Have a quantizer find the linear layers of a model that is not loaded yet, and leave its routers as they are."""
    unify_linear_layers(model)
    if routers := router_names(model):
        config = quantizer.quantization_config
        skipped = quantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules)
        config.llm_int8_skip_modules = sorted({*skipped, *routers})


class _OneAtATime(WeightConverter):  # type: ignore[misc]
    """A converter that reads, converts and packs one expert after another."""

    def __init__(self, source_patterns: Any, target_patterns: Any, operations: list[Any], **more: Any) -> None:
        self.quantizer: FourBitQuantizer = more.pop("quantizer")
        self.names: dict[str, list[str]] = {}
        super().__init__(source_patterns, target_patterns, operations, **more)

    @classmethod
    def of(cls, converter: WeightConverter, quantizer: FourBitQuantizer) -> _OneAtATime:
        """Return a converter with the patterns and operations of another."""
        made = cls(
            list(converter._original_source_patterns),  # noqa: SLF001 transformers copies converters the same way
            list(converter._original_target_patterns),  # noqa: SLF001
            converter.operations,
            quantizer=quantizer,
        )
        made.scope_prefix, made.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> _OneAtATime:
        """Return a converter for another parameter; the quantizer is the same."""
        return self.of(self, self.quantizer)

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        self.names.setdefault(source_pattern, []).append(source_key)
        super().add_tensor(target_key, source_key, source_pattern, future)

    def convert(self, layer_name: str, model: Any = None, config: Any = None, **_: Any) -> dict[str, Any]:
        self.collected_tensors.clear()  # would be read whole
        slices = {p: [self.quantizer.files[n] for n in names] for p, names in self.names.items()}

        def read(index: int) -> torch.Tensor:
            tensors: dict[str, Any] = {p: [_expert(found, index)] for p, found in slices.items()}
            for operation in self.operations:
                tensors = operation.convert(
                    tensors,
                    source_patterns=self.source_patterns,
                    target_patterns=self.target_patterns,
                    full_layer_name=layer_name,
                    model=model,
                    config=config,
                )
            (made,) = tensors.values()
            tensor: torch.Tensor = made[0] if isinstance(made, list) else made
            return tensor

        return {layer_name: self.quantizer.pack(model, layer_name, read)}


def _expert(found: list[Any], index: int) -> torch.Tensor:
    """Return one expert: a tensor of its own, or a part of the only tensor, which then keeps its first dimension."""
    if len(found) == 1 and len(found[0].get_shape()) > 2:
        part: torch.Tensor = found[0][index : index + 1]
        return part
    whole: torch.Tensor = found[index][:]
    return whole


def _is_separable(operation: Any) -> bool:
    """Return whether a conversion treats each expert by itself."""
    match operation:
        case MergeModulelist():
            return bool(operation.dim == 0)
        case Concatenate():
            return bool(operation.dim > 0)
        case Transpose():
            return bool(min(operation.dim0, operation.dim1) > 0 and not operation.check_dims)
        case _:
            return False


class _Nothing(ConversionOps):  # type: ignore[misc]
    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        return input_dict


class _Quantize(Bnb4bitQuantize):  # type: ignore[misc]
    """transformers' operation for linear layers; experts that come whole are packed one after another."""

    def convert(self, input_dict: dict[str, Any], **more: Any) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in input_dict.items():
            if name in self.hf_quantizer.expert_names:
                whole = value[0] if isinstance(value, list) else value
                made[name] = self.hf_quantizer.pack(more["model"], name, whole.__getitem__)
            else:
                made |= super().convert({name: value}, **more)
        return made
