"""Bytes of activations and of the loss: one forward and backward pass of one micro-batch on one rank.

Without checkpointing every decoder layer keeps what its operations save. With it (Chen et al. 2016, one segment a
layer) a layer keeps its input, w·H·T bytes, and is computed again when its turn comes in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_memory.activations.attention import mask_bytes, self_attention
from qlora_memory.activations.layers import FP32, INT64, LayerRecorder
from qlora_memory.activations.mixture_of_experts import mixture
from qlora_memory.activations.setting import ForwardSetting
from qlora_memory.activations.tape import Tape, Value
from qlora_memory.shape.model_shape import Experts, Layer, ModelShape

INDICES = 4
"""int64 numbers a token that a micro-batch brings to the device: ids, positions, places and labels of targets."""


@dataclass(frozen=True)
class Activations:
    """Bytes at the moments that can be the highest."""

    stored: int
    """From the forward to the backward pass: of all layers, or of their inputs."""
    loss: int
    """Highest total of head and loss, forward or backward, besides ``stored``."""
    layer: int
    """Highest total of the last layer's backward pass besides ``stored``: gradients, and with checkpointing all that
    its operations save. Of layers that differ from it by what is left in 16 bits alone, that of the largest."""
    saved_by_loss: int
    """Held by head and loss from the forward to the backward pass."""
    inputs: int
    """The micro-batch itself, cos and sin, masks, and embeddings where they are not the first layer's input."""


def activations(shape: ModelShape, setting: ForwardSetting, *, checkpointing: bool) -> Activations:
    """Activations of one micro-batch."""
    rotation = _rotation(shape, setting)
    boundary = setting.width * shape.hidden * setting.tokens
    if checkpointing:
        stored = boundary * len(shape.layers)
    else:
        stored = sum(
            count * decoder_layer(layer, shape.hidden, setting, rotation, learns=learns)[0].saved(_elsewhere(rotation))
            for layer, learns, count in _kinds(shape, setting)
        )
    # Learned positions make another tensor of the embeddings, which stay: transformers has them need a gradient.
    embeddings = boundary if checkpointing and rotation is None else 0
    loss, saved = head_and_loss(shape, setting)
    return Activations(
        stored=stored,
        loss=loss,
        layer=max(
            _layer_peak(layer, shape, setting, rotation, checkpointing=checkpointing)
            for layer in _like_the_last(shape, setting)
        ),
        saved_by_loss=saved,
        inputs=INDICES * INT64 * setting.tokens
        + embeddings
        + (rotation.size if rotation else 0)
        + mask_bytes(shape.layers[0].attention, setting.tokens, setting.width),
    )


def _layer_peak(
    layer: Layer, shape: ModelShape, setting: ForwardSetting, rotation: Value | None, *, checkpointing: bool
) -> int:
    """Highest total of one layer's backward pass, besides what is stored from the forward pass."""
    tape, x = decoder_layer(layer, shape.hidden, setting, rotation, learns=True)
    outside = (*_elsewhere(rotation), x)
    if not checkpointing:
        return tape.backward_peak(outside) - tape.saved(outside)
    boundary = setting.width * shape.hidden * setting.tokens
    output = boundary if setting.software.reentrant else 0
    return max(tape.forward_peak(outside) + boundary, tape.backward_peak(outside) + output)


def _like_the_last(shape: ModelShape, setting: ForwardSetting) -> list[Layer]:
    """Return one layer of each way in which those of the last layer's kind are quantized."""
    kind = _kind(shape.layers[-1], setting)
    alike = [layer for layer in shape.layers if _kind(layer, setting) == kind]
    return list({tuple(setting.is_quantized(weight) for weight in layer.weights): layer for layer in alike}.values())


def _kind(layer: Layer, setting: ForwardSetting) -> tuple[object, ...]:
    """Return what layers have in common that keep the same."""
    linears = tuple((w.inputs, w.outputs, w.name in setting.adapter.names) for w in layer.weights)
    return linears, layer.attention.sliding_window, isinstance(layer.feed_forward, Experts)


def _kinds(shape: ModelShape, setting: ForwardSetting) -> list[tuple[Layer, bool, int]]:
    """Layers that keep the same are taken together: one of them, whether its input needs a gradient, how many.

    The first layer's input does not, as it comes from the frozen embeddings, nor do those before the first adapter.
    """
    adapted = setting.adapter.names
    counted: dict[object, tuple[Layer, bool, int]] = {}
    learns = any(linear.name in adapted for linear in shape.outside if linear.outputs == shape.hidden)
    for layer in shape.layers:
        key = (learns, *_kind(layer, setting))
        counted[key] = (layer, learns, counted.get(key, (layer, learns, 0))[2] + 1)
        learns = learns or any(weight.name in adapted for weight in layer.weights)
    return list(counted.values())


def _rotation(shape: ModelShape, setting: ForwardSetting) -> Value | None:
    """cos and sin of every position, [1, T, rotary_dim] each, made once for all layers."""
    rotary = shape.layers[0].attention.rotary_dim
    return Value(2 * rotary * setting.tokens, setting.width, learns=False) if rotary else None


def _elsewhere(rotation: Value | None) -> tuple[Value, ...]:
    return (rotation,) if rotation is not None else ()


def decoder_layer(
    layer: Layer, hidden: int, setting: ForwardSetting, rotation: Value | None, *, learns: bool
) -> tuple[Tape, Value]:
    """Return one decoder layer on a tape.

    Returns:
        The tape, and the layer's input on it.

    """
    recorder = LayerRecorder(setting, rotation)
    x = recorder.value(hidden, learns=learns)
    if layer.norms == 1:  # Phi: attention and feed-forward part side by side, behind one norm
        normed = recorder.norm(x, layer.norm)
        attended = recorder.dropout(self_attention(recorder, normed, layer.attention, layer.norm), layer.dropout)
        forward = recorder.dropout(_forward(recorder, normed, layer), layer.dropout)
        recorder.add(recorder.add(attended, forward), x)
        return recorder.tape, x
    attended = self_attention(recorder, recorder.norm(x, layer.norm), layer.attention, layer.norm)
    attended = recorder.norm(attended, layer.norm) if layer.norms == 4 else attended
    middle = recorder.add(x, recorder.dropout(attended, layer.dropout))
    forward = _forward(recorder, recorder.norm(middle, layer.norm), layer)
    forward = recorder.norm(forward, layer.norm) if layer.norms == 4 else forward
    for other in layer.others:
        recorder.linear(x, other)
    recorder.add(middle, recorder.dropout(forward, layer.dropout))
    return recorder.tape, x


def _forward(recorder: LayerRecorder, x: Value, layer: Layer) -> Value:
    part = layer.feed_forward
    return mixture(recorder, x, part) if isinstance(part, Experts) else recorder.feed_forward(x, part)


# ------------------------------------------------------------------------------------------------------ head and loss


def head_and_loss(shape: ModelShape, setting: ForwardSetting) -> tuple[int, int]:
    """Final norm, head and loss.

    Returns:
        The highest total of bytes, and what is held from the forward to the backward pass.

    """
    recorder = LayerRecorder(setting)
    x = recorder.value(shape.hidden, learns=True)
    normed = recorder.norm(x, shape.layers[-1].norm) if shape.final_norm else x
    for linear in shape.outside:
        if linear.inputs == shape.hidden:
            normed = recorder.linear(normed, linear)
        else:  # behind the embeddings, whose output needs no gradient
            recorder.linear(recorder.value(linear.inputs, learns=False), linear)
    if shape.head.plain and not setting.adapter.trains_head:
        _fused(recorder, shape, normed)
    else:
        _own_logits(recorder, shape, normed)
    return max(recorder.tape.forward_peak(), recorder.tape.backward_peak()), recorder.tape.saved()


def _fused(recorder: LayerRecorder, shape: ModelShape, hidden: Value) -> None:
    """w·H for each labelled token (the gradient of the head's input), and 8 bytes a logit of one chunk.

    ``qlora_trainer.model.loss.FrozenHead``: a chunk of logits in fp32, and as much again inside ``logsumexp``.
    """
    vocabulary = shape.head.linear.outputs
    labelled = recorder.setting.labelled
    rows = min(labelled, max(1, recorder.setting.software.logits_per_chunk // vocabulary))
    features = hidden.elements // recorder.tokens
    places = Value(labelled, INT64, learns=False)
    chosen = recorder.tape.record(hidden, elements=labelled * features, width=recorder.width, saves=(places,))
    gradient = Value(labelled * features, recorder.width, learns=False)
    recorder.tape.record(
        chosen,
        elements=labelled,
        width=FP32,
        saves=(gradient,),
        workspace=2 * FP32 * rows * vocabulary + hidden.size,
    )


def _own_logits(recorder: LayerRecorder, shape: ModelShape, hidden: Value) -> None:
    """4 bytes a logit kept (w more where capped), 12 at the height of the backward pass.

    The model's own logits of N labelled tokens, N·V of them.
    ``NextTokenLoss`` with ``fused=False``; ``torch.nn.functional.cross_entropy`` keeps the log-softmax.
    """
    labelled, vocabulary = recorder.setting.labelled, shape.head.linear.outputs
    features = hidden.elements // recorder.tokens
    places = Value(labelled, INT64, learns=False)
    chosen = recorder.tape.record(hidden, elements=labelled * features, width=recorder.width, saves=(places,))
    cells = labelled * vocabulary
    logits = LayerRecorder(recorder.setting, tape=recorder.tape, tokens=labelled).linear(
        chosen, shape.head.linear, is_head=True
    )
    if not shape.head.plain:
        logits = recorder.tape.record(logits, elements=cells, width=recorder.width)
        logits = recorder.tape.record(logits, elements=cells, width=recorder.width, saves_output=True)
        logits = recorder.tape.record(logits, elements=cells, width=recorder.width)
    wide = logits if recorder.width == FP32 else recorder.tape.record(logits, elements=cells, width=FP32)
    probabilities = recorder.tape.record(wide, elements=cells, width=FP32, saves_output=True)
    labels = Value(labelled, INT64, learns=False)
    recorder.tape.record(probabilities, elements=labelled, width=FP32, saves=(labels,))
