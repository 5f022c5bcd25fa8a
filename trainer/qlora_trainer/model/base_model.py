"""The quantized base and the adapter on it.

Memory traps avoided here: no ``prepare_model_for_kbit_training`` (it lifts embeddings, head and norms to fp32: 2.1 GB
on an 8B model), and the adapter alone is held in fp32, because it alone learns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, assert_never

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, BitsAndBytesConfig

from qlora_api.errors import FieldError
from qlora_api.spec import LoRABias, LoRASpec, QuantizationSpec, QuantizationType
from qlora_api.status import MemoryComponent
from qlora_memory.shape.on_disk import check_on_disk, on_disk
from qlora_trainer.errors import UserError
from qlora_trainer.model.composite import meta_model_of, model_class, output_head_names
from qlora_trainer.model.device.attention import choose_attention, register
from qlora_trainer.model.device.compute_type import DTYPES, resolved_on
from qlora_trainer.model.device.kernels import forget_inputs, fuse_adapters, fuse_norms
from qlora_trainer.model.dry_run import find_layer_use
from qlora_trainer.model.experts.forward import use_own_forward
from qlora_trainer.model.experts.structure import expert_parameters
from qlora_trainer.model.experts.targets import check_targets, linear_layers, lora_config
from qlora_trainer.model.layer_use import note_layer_use
from qlora_trainer.model.loading.hf_quantizers import EightBitConfig, FourBitConfig
from qlora_trainer.model.loading.plain_linear import unify_linear_layers
from qlora_trainer.model.loading.read_weights import load_weights, method_on_disk
from qlora_trainer.model.trained_tokens import check_trained_tokens, use_trained_rows
from qlora_trainer.storage.model_files import CONFIG

_BIAS = {LoRABias.NONE: "none", LoRABias.ALL: "all", LoRABias.LORA_ONLY: "lora_only"}


def quantization_config(
    quantization: QuantizationSpec, zero_stage: int, skipped: list[str] | None = None
) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration for a base that is 16-bit on disk; None for no quantization.

    Args:
        quantization: of the job.
        zero_stage: of the job.
        skipped: full names of modules and experts that stay in 16 bits; None: those that transformers leaves so.

    """
    dtype = DTYPES[quantization.compute_type]
    match quantization.type:
        case QuantizationType.NONE:
            return None
        case QuantizationType.INT8:
            return EightBitConfig(llm_int8_skip_modules=skipped)
        case QuantizationType.NF4 | QuantizationType.FP4:
            return FourBitConfig(
                bnb_4bit_quant_type=quantization.type.value.lower(),
                bnb_4bit_use_double_quant=quantization.double_quantization,
                bnb_4bit_compute_dtype=dtype,
                # ZeRO-3 partitions by dtype: the packed weights must look like the rest (PEFT's DeepSpeed guide).
                bnb_4bit_quant_storage=dtype if zero_stage == 3 else torch.uint8,
                llm_int8_skip_modules=skipped,
            )
        case _:
            assert_never(quantization.type)


def skipped_modules(skeleton: Any, quantization: QuantizationSpec, read: Iterable[str] = ()) -> list[str] | None:
    """Return what stays in 16 bits of a base, by full name; None where that is what transformers leaves so.

    Args:
        skeleton: the base without weights.
        quantization: of the job, which may name some.
        read: layers whose weight the model reads itself.

    """
    if not quantization.skip_modules and not read:
        return None
    named = [n for n in (*linear_layers(skeleton), *expert_parameters(skeleton)) if quantization.skips(n)]
    return sorted({*output_head_names(skeleton), *named, *read})


def load_base(path: Path, quantization: QuantizationSpec, device: torch.device, zero_stage: int = 0) -> Any:
    """Load the frozen base onto ``device``, quantizing it on the way unless it is 4-bit on disk already.

    A compute type of ``Auto`` is what this device is fast in; an attempt resolves it over all ranks before.

    Raises:
        UserError: the base on disk is quantized in another way than the manifest says, or cannot be loaded.

    """
    register()
    quantization = resolved_on(quantization, device)
    config = check_base(path, quantization)
    is_quantized = getattr(config, "quantization_config", None) is not None
    skeleton = meta_model(path)
    use = find_layer_use(skeleton)
    skipped = None if is_quantized else skipped_modules(skeleton, quantization, use.read)
    wanted = None if is_quantized else quantization_config(quantization, zero_stage, skipped)
    model = load_weights(
        path,
        config,
        DTYPES[quantization.compute_type],
        device,
        # An explicit None would hide what the base says of itself.
        **({} if wanted is None else {"quantization_config": wanted}),
        attn_implementation=choose_attention(model_class(config), config),
    )
    note_layer_use(model, use)
    return ready_base(model, quantization)


def ready_base(model: Any, quantization: QuantizationSpec) -> Any:
    """Return a base that was loaded, frozen and with its layers as the trainer has them."""
    model.requires_grad_(requires_grad=False)
    model.config.use_cache = False
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = DTYPES[quantization.compute_type]  # a base that is 4-bit on disk brings its own
            # Else bitsandbytes 0.50 re-packs the weights in the first eval-mode forward on a CPU, for good, with bf16
            # absmax and for a kernel without a backward: gradients of later training steps would stop there silently.
            layer.support_avx512bf16_for_cpu = False
    unify_linear_layers(model)
    use_own_forward(model)
    fuse_norms(model)
    forget_inputs(model)
    return model


def check_base(path: Path, quantization: QuantizationSpec, source: str | None = None) -> Any:
    """The base's configuration, found to be a causal language model quantized as the manifest says, or not at all.

    Args:
        path: of the base.
        quantization: that the manifest asks for.
        source: of the base, by which errors name another.

    Raises:
        UserError: it is not.

    """
    config = causal_config(path)
    try:
        check_on_disk(on_disk(json.loads((path / CONFIG).read_bytes()), source), quantization)
    except FieldError as error:
        raise UserError(error.field, error.value, error.allowed) from None
    return config


def meta_model(path: Path, *, whole: bool = False, dtype: torch.dtype | None = None) -> Any:
    """Return the architecture without weights, for checks.

    Args:
        path: of the base.
        whole: with its towers for images and sound, which are not trained.
        dtype: of what is not quantized; None: as on disk.

    Raises:
        UserError: the class of the base needs a library that is not here, or has no language model.

    """
    try:
        model = meta_model_of(causal_config(path), whole=whole, dtype=dtype)
    except ImportError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError("spec.model.source", None, f"needs what is not installed here: {reason}") from error
    except NotImplementedError as error:  # some classes of several models have no input embeddings of their own
        raise UserError("spec.model.source", None, "is of a class with no one language model to train") from error
    unify_linear_layers(model)
    return model


def causal_config(path: Path) -> Any:
    """Return the configuration of a causal language model that transformers knows.

    Raises:
        UserError: it is another kind of model, or an architecture this version of transformers does not know.

    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except ValueError as error:
        if references := json.loads((path / CONFIG).read_bytes()).get("auto_map"):
            raise UserError(
                "spec.model.source",
                None,
                f"brings its own code (auto_map in config.json: {json.dumps(references)}), which is never run; use a "
                "model whose architecture is built into transformers",
            ) from error
        reason = str(error).partition("\n")[0]
        raise UserError("spec.model.source", None, f"is of an architecture that is not known here: {reason}") from error
    except Exception as error:  # each kind of configuration checks its values in its own way
        reason = " ".join(str(error).split())
        raise UserError("spec.model.source", None, f"has a config.json that cannot be used: {reason}") from error
    if method_on_disk(path) is not None:
        del config.quantization_config  # nothing of it is left once it is read
    if model_class(config) is None or config.is_encoder_decoder:
        raise UserError("spec.model.source", None, f'is a "{config.model_type}" model, no causal language model')
    return config


def add_lora(
    model: Any,
    lora: LoRASpec,
    seed: int,
    model_name: str = "the base model",
    tokens: Mapping[str, int] = MappingProxyType({}),
) -> PeftModel:
    """Put the adapter on the base: A random (from ``seed``), B zero, in fp32; everything else stays frozen.

    Args:
        model: the base.
        lora: of the job.
        seed: of A.
        model_name: by which errors name the base.
        tokens: the numbers of those whose embeddings are trained, by their names.

    Raises:
        UserError: a target matches no linear layer, or the embeddings of tokens cannot be trained.

    """
    check_targets(model, lora, model_name)
    if tokens:
        check_trained_tokens(model, lora, tokens, model_name)
    config = lora_config(
        model,
        lora,
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=float(lora.dropout),
        bias=_BIAS[lora.bias],
        use_rslora=lora.rank_stabilized,
        use_dora=lora.dora,
        trainable_token_indices=list(tokens.values()) or None,
    )
    torch.manual_seed(seed)
    try:
        peft_model = get_peft_model(model, config)
    except (AttributeError, ValueError) as error:  # layers, or a class, that PEFT cannot adapt
        targets = ", ".join(lora.target_modules or config.target_modules)
        raise UserError("spec.lora.targetModules", targets, f"cannot be adapted: {error}") from error
    hold_trainable_in_fp32(peft_model, model.dtype)
    fuse_adapters(peft_model)
    use_trained_rows(peft_model, model_name)
    return peft_model


class _Cast(nn.Module):
    """fp32 where it learns, the compute type where it is used."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: torch.Tensor) -> torch.Tensor:
        return master.to(self.dtype)


def hold_trainable_in_fp32(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep what learns in fp32 and use it in ``dtype``.

    In bf16 an update under 0.4% of a weight is lost. The parameter itself is the master, so optimizer, gradient
    reduction and checkpoints need no copy of it.
    """
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                # A layer gathers its own weight under ZeRO-3; a list of parameters is not called, its cast is.
                if dtype is not torch.float32 or isinstance(module, nn.ParameterDict):
                    parametrize.register_parametrization(module, name, _Cast(dtype), unsafe=True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by the names PEFT gives them in an adapter file, in a fixed order."""
    return {plain_name(n): p for n, p in sorted(model.named_parameters()) if p.requires_grad}


def plain_name(name: str) -> str:
    """Return a parameter's name as if nothing were wrapped around it."""
    return name.replace(".parametrizations.", ".").removesuffix(".original")


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute each decoder layer in the backward pass. Chen et al. 2016."""
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the model's tensors by component, counted from the tensors themselves."""
    sizes = dict.fromkeys(
        (
            MemoryComponent.QUANTIZED_WEIGHTS,
            MemoryComponent.QUANTIZATION_CONSTANTS,
            MemoryComponent.UNQUANTIZED_WEIGHTS,
            MemoryComponent.ADAPTER_WEIGHTS,
        ),
        0,
    )
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        if parameter.requires_grad:
            sizes[MemoryComponent.ADAPTER_WEIGHTS] += size
        elif is_quantized(parameter):
            sizes[MemoryComponent.QUANTIZED_WEIGHTS] += size
            sizes[MemoryComponent.QUANTIZATION_CONSTANTS] += sum(_bytes(t) for t in _constants(parameter))
        else:
            sizes[MemoryComponent.UNQUANTIZED_WEIGHTS] += size
    sizes[MemoryComponent.UNQUANTIZED_WEIGHTS] += sum(_bytes(buffer) for _, buffer in saved_buffers(model))
    return {str(k): v for k, v in sizes.items()}


def is_quantized(parameter: nn.Parameter) -> bool:
    """Return whether bitsandbytes has packed a parameter: an expert's, or the weight of a layer."""
    return hasattr(parameter, "quant_state") or type(parameter).__name__ == "Int8Params"


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that a checkpoint holds, such as the bias of a router, with their names."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:  # noqa: SLF001 torch has no other way to ask
                yield f"{prefix}.{name}".lstrip("."), buffer


def _constants(parameter: Any) -> list[torch.Tensor]:
    """absmax, its own absmax and offset where doubly quantized, and the code tables."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return [t for t in (getattr(parameter, "SCB", None),) if t is not None]
    nested = state.state2
    tensors = [state.absmax, state.code]
    return tensors + ([nested.absmax, nested.code, state.offset] if nested is not None else [])


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
