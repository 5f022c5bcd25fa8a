"""Prepare's own work, where nothing is known yet: fetch, check, tokenize."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora_api.errors import FieldError
from qlora_memory import check_skip_modules
from qlora_trainer.data.formats import Encoder
from qlora_trainer.errors import AdapterRejectedError, UserError
from qlora_trainer.model.base_model import add_lora, causal_config, check_base, meta_model, trainable
from qlora_trainer.model.composite import has_no_towers, text_config
from qlora_trainer.model.device.compute_type import DTYPES, device_problem
from qlora_trainer.model.dry_run import (
    adapters_without_gradient,
    check_takes_text,
    find_layer_use,
    idle_layers_error,
)
from qlora_trainer.model.experts.structure import expert_parameters
from qlora_trainer.model.experts.targets import linear_layers, name_text_alone
from qlora_trainer.model.layer_use import note_layer_use
from qlora_trainer.model.loading.missing_weights import missing_matrices
from qlora_trainer.model.loading.read_weights import notes_of
from qlora_trainer.model.loss import check_rows_alone
from qlora_trainer.model.tokenizer import load_bounded_tokenizer
from qlora_trainer.model.trained_tokens import find_trained_tokens
from qlora_trainer.model.trial.try_training import try_training
from qlora_trainer.model.weight_counts import count_weights
from qlora_trainer.prepare.plan_memory import agreed_shape, shape_of
from qlora_trainer.prepare.records import Record, job_key, pinned_revision
from qlora_trainer.prepare.stage_progress import begin_stage
from qlora_trainer.prepare.stages import Stage, bounded_stage, stage_of_end
from qlora_trainer.prepare.tokenize_rows import PreparedData, prepare_data
from qlora_trainer.publish.gate import check_loads
from qlora_trainer.storage.fetch import FetchedModel, fetch_model, fetch_rows
from qlora_trainer.storage.fetch_definitions import fetch_definitions
from qlora_trainer.tasks.prepare_tasks import PreparedTasks, prepare_tasks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from qlora_api.contract import TrainerConfig
    from qlora_api.spec import QLoRAJobSpec
    from qlora_memory import WeightCounts

ROW_KERNELS = ("causal_conv1d", "fla")
"""Packages whose kernels keep rows apart in models with a recurrent state."""
UNTRIED = "a model of the base's class and few layers could not be tried on a CPU, since it ends the process"
SHOWN_TOKENS = 8
TOKENS_AT_ONCE = 1 << 24


def prepare_from_scratch(config: TrainerConfig, began: Record | None) -> Record:
    """Check model, rows and adapter, and tokenize the rows into ``config.cache_dir``.

    Args:
        config: of the job.
        began: what this run began with, if it began before.

    Raises:
        UserError: names the field that must change.
        StorageError: a source is out of reach, or the cache is full.

    """
    spec, cache = config.spec, Path(config.cache_dir)
    ends_the_process = stage_of_end(config) is Stage.TRIAL
    begin_stage("fetching the model")
    model = fetch_model(
        spec.model.source,
        cache,
        pinned_revision(spec, began),
        headers_only=config.shared_cache_uri is not None,  # this pod trains nothing; without it the ranks are here
    )
    begin_stage("checking model and adapter")
    tokens = find_trained_tokens(model.path, spec.lora, model.source, load_bounded_tokenizer)
    with bounded_stage(config, Stage.MODEL):
        vocabulary, counts = check_architecture(config, model, tokens)
    tried = [UNTRIED]
    if not ends_the_process:
        begin_stage("trying a toy of the model")
        with bounded_stage(config, Stage.TRIAL):
            tried = try_base(config, model)
    begin_stage("fetching the rows")
    train_rows = fetch_rows(spec.dataset.train.source, "spec.dataset.train.source", cache)
    own_eval = spec.dataset.eval.source if spec.dataset.eval else None
    eval_rows = fetch_rows(own_eval, "spec.dataset.eval.source", cache) if own_eval else None
    begin_stage("tokenizing the rows")
    tokenizer = load_bounded_tokenizer(model.path, spec.dataset.chat_template)
    data = prepare_data(spec, tokenizer, model.tokenizer_hash, train_rows, eval_rows, cache)
    check_tokens(data, tokenizer, vocabulary)
    check_prompts(spec, Encoder(tokenizer, spec.dataset, conversations=data.receipt.conversations), vocabulary)
    notes = [*data.unread_files, *tried, *notes_on_tokens(data, tokens)]
    tasks = _prepared_tasks(spec, Encoder(tokenizer, spec.dataset), cache) if spec.evaluate else None
    notes += tasks.notes if tasks else ()
    return Record(
        key=job_key(spec, model.revision),
        model_source=model.source,
        model_revision=model.revision,
        receipt=data.receipt.model_copy(update={"notes": [*data.receipt.notes, *notes_of(model.path), *notes]}),
        tasks_hash=tasks.name if tasks else None,
        shape=agreed_shape(model.path, shape_of(model.path, model.source), counts, spec),
    )


def try_base(config: TrainerConfig, model: FetchedModel) -> list[str]:
    """Train a toy of the base for two steps; return what is worth saying of it.

    Kernels that keep rows apart on a GPU may be installed, which this machine cannot try: then the ranks find it out.

    Raises:
        UserError: the ranks would fail.

    """
    trial = try_training(model.path, config.spec, model.source)
    has_kernels = config.device == "CUDA" and any(find_spec(name) is not None for name in ROW_KERNELS)
    if trial is None or not trial.mixes_rows or has_kernels:
        return []
    model_type = causal_config(model.path).model_type
    check_rows_alone(config.spec.parallelism.zero_stage, model_type)
    return [f'a "{model_type}" model mixes rows that lie end to end: each is computed by itself, exact and slower']


def _prepared_tasks(spec: QLoRAJobSpec, encoder: Encoder, cache: Path) -> PreparedTasks:
    assert spec.evaluate is not None
    begin_stage("preparing the tasks of spec.evaluate")
    folder = spec.evaluate.folder
    return prepare_tasks(spec.evaluate, fetch_definitions(folder, cache) if folder else None, encoder, cache)


def check_tokens(data: PreparedData, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse rows with a token that the model has no embedding for.

    Raises:
        UserError: names the token and the sizes.

    """
    for rows in (data.train, data.eval):
        largest = int(rows.tokens.max()) if rows is not None else 0
        if largest >= vocabulary:
            raise UserError(
                "spec.model.source",
                None,
                f"has {vocabulary} embeddings and a tokenizer of {len(tokenizer)} tokens: the rows hold the token"
                f" {tokenizer.convert_ids_to_tokens(largest)!r}, number {largest}, which has none. Use the tokenizer"
                " that goes with the model, or a chatTemplate without that token",
            )


def check_prompts(spec: QLoRAJobSpec, encoder: Encoder, vocabulary: int) -> None:
    """Refuse prompts with a token that the model has no embedding for.

    Raises:
        UserError: names the prompt and the token.

    """
    for prompt in spec.training.evaluation.prompts:
        largest = max(encoder.prompt(prompt))
        if largest >= vocabulary:
            raise UserError(
                "spec.training.evaluation.prompts",
                prompt,
                f"holds the token {encoder.tokenizer.convert_ids_to_tokens(largest)!r}, number {largest}, and"
                f" {spec.model.source} has {vocabulary} embeddings: name tokens that it has",
            )


def notes_on_tokens(data: PreparedData, tokens: Mapping[str, int]) -> list[str]:
    """Return what is worth saying of tokens whose embeddings are trained."""
    if not tokens:
        return []
    notes = ["vLLM does not load trained embeddings of tokens with an adapter: serve the merged model"]
    rows, numbers = data.train.tokens, np.fromiter(tokens.values(), dtype=np.int64)
    seen: set[int] = set()
    for start in range(0, len(rows), TOKENS_AT_ONCE):
        part = rows[start : start + TOKENS_AT_ONCE]
        seen.update(np.unique(part[np.isin(part, numbers)]).tolist())
    absent = [json.dumps(token, ensure_ascii=False) for token, number in tokens.items() if number not in seen]
    if absent:
        more = f" and {len(absent) - SHOWN_TOKENS} more" if len(absent) > SHOWN_TOKENS else ""
        notes.append(f"trained tokens that no training row holds: {', '.join(absent[:SHOWN_TOKENS])}{more}")
    return notes


def check_architecture(
    config: TrainerConfig, model: FetchedModel, tokens: Mapping[str, int]
) -> tuple[int, WeightCounts]:
    """Build the architecture without weights, and look for the adapter's targets and room for the positions.

    Args:
        config: of the job.
        model: its base.
        tokens: the numbers of those whose embeddings are trained, by their names.

    Returns:
        How many tokens it has embeddings for, and its weights.

    Raises:
        UserError: names the field that must change.

    """
    if config.device == "CPU" and (problem := device_problem(config.spec.quantization, torch.device("cpu"))):
        raise problem
    base = check_base(model.path, config.spec.quantization, model.source)
    skeleton = meta_model(model.path)
    _check_causal(skeleton)
    if has_no_towers(skeleton):
        check_takes_text(meta_model(model.path, whole=True))
    if not hasattr(base, "quantization_config"):
        _check_weights(base, model)
    _check_skip_modules(skeleton, config, on_disk=hasattr(base, "quantization_config"))
    use = find_layer_use(meta_model(model.path))
    note_layer_use(skeleton, use)
    embeddings: int = skeleton.get_input_embeddings().weight.shape[0]
    adapted = add_lora(skeleton, config.spec.lora, config.spec.training.seed, model.source, tokens)
    _check_gradient(adapted, config, model.source)
    _check_loads(adapted, config, model)
    positions = getattr(text_config(skeleton.config), "max_position_embeddings", None)
    longest = config.spec.dataset.max_length
    if positions is not None and longest > positions:
        raise UserError("spec.dataset.maxLength", longest, f"is more than the {positions} positions of {model.source}")
    counted = meta_model(model.path, dtype=DTYPES.get(config.spec.quantization.compute_type, torch.bfloat16))
    note_layer_use(counted, use)
    return embeddings, count_weights(counted)


def _check_weights(base: Any, model: FetchedModel) -> None:
    """Refuse a base whose files lack layers of its class, which would have random weights.

    Raises:
        UserError: it names one.

    """
    if missing := missing_matrices(model.path, base):
        raise UserError(
            "spec.model.source",
            model.source,
            f'has files that lack {len(missing)} of the weights of a "{base.model_type}" model, or have them in other '
            f"shapes, such as {missing[0]}: use files that were saved for this architecture",
        )


def _check_skip_modules(skeleton: Any, config: TrainerConfig, *, on_disk: bool) -> None:
    quantization = config.spec.quantization
    experts = expert_parameters(skeleton) if quantization.type.is_four_bit else ()
    try:
        check_skip_modules(quantization, (*linear_layers(skeleton), *experts), on_disk=on_disk)
    except FieldError as error:
        raise UserError(error.field, error.value, error.allowed) from None


def _check_causal(skeleton: Any) -> None:
    """Refuse a base whose layers were built as those of an encoder.

    Raises:
        UserError: its tokens see the ones that follow.

    """
    if any(getattr(module, "is_decoder", None) is False for module in skeleton.modules()):
        raise UserError(
            "spec.model.source",
            None,
            "is an encoder, whose tokens see the ones that follow (is_decoder is false in its config.json): no causal "
            f'language model, although "{skeleton.config.model_type}" can be one',
        )


def _check_loads(adapted: Any, config: TrainerConfig, model: FetchedModel) -> None:
    """Refuse an adapter that PEFT would not load again from what is published.

    Raises:
        UserError: it says so of the layers that are adapted.

    """
    lora = copy.copy(adapted.peft_config[adapted.active_adapter])
    lora.lora_dropout = 0.0  # as it is published
    lora._custom_modules = None  # noqa: SLF001
    name_text_alone(lora, adapted.get_base_model())
    tensors = {
        name.replace(f".{adapted.active_adapter}", ""): torch.empty(parameter.shape, device="meta")
        for name, parameter in trainable(adapted).items()
    }
    try:
        check_loads(lora, tensors, meta_model(model.path, whole=True))
    except AdapterRejectedError as error:
        named = ", ".join(config.spec.lora.target_modules or ()) or None
        raise UserError(
            "spec.lora.targetModules", named, f"would adapt layers of {model.source} that PEFT does not load: {error}"
        ) from error


def _check_gradient(adapted: Any, config: TrainerConfig, model_name: str) -> None:
    """Refuse an adapter on layers that would not learn.

    Raises:
        UserError: names them.

    """
    if lost := adapters_without_gradient(adapted):
        raise idle_layers_error(lost, config.spec.lora, model_name)
