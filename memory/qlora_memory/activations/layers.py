"""The parts of a decoder layer, written on a tape as transformers 5.23 and PEFT 0.21 compute them.

T tokens, H hidden, w bytes of an element in the compute type (2 for bf16). What each part keeps for the backward pass,
in bytes a token, is in its docstring; docs/explanation/memory.md has the table.
"""

from __future__ import annotations

from qlora_api.spec import QuantizationType
from qlora_memory.activations.setting import ForwardSetting
from qlora_memory.activations.tape import Tape, Value
from qlora_memory.shape.model_shape import FeedForward, Linear, Norm

FP32 = 4
INT64 = 8


class LayerRecorder:
    """Writes parts on a tape."""

    def __init__(
        self,
        setting: ForwardSetting,
        rotation: Value | None = None,
        tape: Tape | None = None,
        tokens: int | None = None,
    ) -> None:
        self.setting = setting
        self.tape = Tape() if tape is None else tape
        self.tokens = setting.tokens if tokens is None else tokens
        self.width = setting.width
        self.rotation = rotation
        """cos and sin: made once, kept by every layer."""

    def value(self, features: int, *, learns: bool, width: int | None = None) -> Value:
        """Return a tensor [T, features] that some operation saves or that comes from outside."""
        return Value(self.tokens * features, width or self.width, learns)

    # --------------------------------------------------------------------------------------------------------- norms

    def norm(self, x: Value, kind: Norm = Norm.RMS, groups: int = 1) -> Value:
        """RMS: w·H + 4 (x itself, and 1/rms). Written out: 4·H + 4 (an fp32 copy of x). Layer: w·H + 8.

        ``torch.nn.functional.rms_norm`` on a GPU (``qlora_trainer.model.device.kernels.fuse_norms``), transformers' own
        GemmaRMSNorm.forward, and all on a CPU; ``torch.native_layer_norm``.
        """
        rows = self.tokens * groups
        if kind is Norm.LAYER:
            statistic = FP32 if self.setting.cuda else self.width
            statistics = [Value(rows, statistic, learns=False) for _ in range(2)]
            return self.tape.record(x, elements=x.elements, width=self.width, saves=(x, *statistics))
        scale = Value(rows, FP32, learns=False)
        if self.setting.software.fused_norm or (kind is Norm.RMS and self.setting.cuda):
            return self.tape.record(x, elements=x.elements, width=self.width, saves=(x, scale))
        wide = x if x.width == FP32 else self.tape.record(x, elements=x.elements, width=FP32)
        copy = FP32 * x.elements
        scaled = self.tape.record(
            wide, elements=x.elements, width=FP32, saves=(wide, scale), workspace=copy, backward_workspace=3 * copy
        )
        if self.width != FP32:
            scaled = self.tape.record(scaled, elements=x.elements, width=self.width)
        return self.tape.record(scaled, elements=x.elements, width=self.width)  # · weight, which is frozen

    # -------------------------------------------------------------------------------------------------- linear layers

    def linear(self, x: Value, layer: Linear, *, is_head: bool = False) -> Value:
        """Frozen base: nothing. Adapted: w·inputs (x, shared by layers that read it) + w·rank, and once w·(A + B).

        bitsandbytes.autograd.MatMul4Bit keeps no activation, since W is frozen, nor does MatMul8bitLt, after
        ``qlora_trainer.model.device.kernels.forget_inputs``. W is dequantized whole, forward and backward; the head
        never is quantized.
        """
        adapted, software = layer.name in self.setting.adapter.names, self.setting.software
        added = (self._added(x, layer),) if adapted and self._adds else ()
        out = self.tokens * layer.outputs
        weight = 0 if is_head else self.setting.dequantized(layer)
        base = self.tape.record(
            x,
            *added,
            elements=out,
            width=self.width,
            workspace=weight if is_head else self._product_workspace(layer, weight),
            backward_workspace=weight,
        )
        if not adapted or added:
            return base
        if software.fused_adapter:
            return self._fused_adapter(x, base, layer)
        return self._dora(x, base, layer) if self.setting.adapter.lora.dora else self._peft(x, base, layer)

    @property
    def _adds(self) -> bool:
        """Return whether the product adds the update itself: not in fp32, nor with DoRA (``kernels.fuse_adapters``)."""
        software = self.setting.software
        plain = self.width != FP32 and not self.setting.adapter.lora.dora
        return plain and not (software.fused_adapter or software.peft)

    def _product_workspace(self, layer: Linear, weight: int) -> int:
        """Besides input and output of a frozen layer's forward: its weight; in INT8 on a GPU what is multiplied.

        T·max(6·inputs, 6·outputs + inputs): the input in fp16, its absolute values and which are too large; then the
        input in 8 bit, the product in 32 and in fp16. Inputs with outliers need more.
        bitsandbytes' backends/cuda/ops.py, ``int8_vectorwise_quant``, ``int8_mm_dequant``.
        """
        setting = self.setting
        is_int8 = setting.quantization.type is QuantizationType.INT8 and setting.is_quantized(layer)
        if not is_int8 or not setting.cuda:
            return weight
        return self.tokens * max(6 * layer.inputs, 6 * layer.outputs + layer.inputs)

    def _added(self, x: Value, layer: Linear) -> Value:
        """A(dropout(x)), which the product with B adds to the base's output (``qlora_trainer.model.device.kernels``).

        The update is no tensor of its own, hence no bytes.
        """
        rank = self.setting.adapter.lora.rank
        dropped = self.dropout(x, self.setting.dropout)
        a, b = self._master(rank * layer.inputs), self._master(rank * layer.outputs)
        low = self.tape.record(
            dropped, a, elements=self.tokens * rank, width=self.width, saves=self._factors(dropped, a)
        )
        return self.tape.record(low, b, elements=self.tokens * layer.outputs, width=0, saves=self._factors(low, b))

    def _peft(self, x: Value, base: Value, layer: Linear) -> Value:
        """result + B(A(dropout(x)))·scale. PEFT's Linear4bit.forward; the casts are ``hold_trainable_in_fp32``'s."""
        update = self._update(x, layer)
        scaled = self.tape.record(update, elements=update.elements, width=self.width)
        return self.tape.record(base, scaled, elements=base.elements, width=self.width, passes_gradient=True)

    def _update(self, x: Value, layer: Linear) -> Value:
        """B(A(dropout(x)))."""
        rank = self.setting.adapter.lora.rank
        dropped = self.dropout(x, self.setting.dropout)
        a, b = self._master(rank * layer.inputs), self._master(rank * layer.outputs)
        low = self.tape.record(
            dropped, a, elements=self.tokens * rank, width=self.width, saves=self._factors(dropped, a)
        )
        return self.tape.record(
            low, b, elements=self.tokens * layer.outputs, width=self.width, saves=self._factors(low, b)
        )

    def _master(self, elements: int) -> Value:
        """Return an fp32 parameter where it is used: itself, or a copy in the compute type."""
        return Value(elements, self.width, learns=True)

    def _factors(self, x: Value, weight: Value) -> tuple[Value, ...]:
        cast = (weight,) if x.learns and self.width != FP32 else ()  # in fp32 it is the parameter itself
        return (x, *cast)

    def product(self, x: Value, y: Value, elements: int) -> Value:
        """x·y, of matrices or element by element: keeps each factor for the other's gradient."""
        kept = [factor for factor, other in ((x, y), (y, x)) if other.learns]
        return self.tape.record(x, y, elements=elements, width=max(x.width, y.width), saves=kept)

    def _dora(self, x: Value, base: Value, layer: Linear) -> Value:
        """DoRA keeps base result and update besides, 2·w·outputs, and makes W + B·A for its norm.

        peft.tuners.lora.dora.DoraLinearLayer.forward.
        """
        norm = self.width * (4 * layer.elements + layer.inputs**2)  # B·A is made by running A and B on an identity
        self.tape.record(x, elements=0, width=self.width, workspace=norm)
        update = self._update(x, layer)
        scale = Value(layer.outputs, self.width, learns=True)
        whole = self.product(base, scale, base.elements)
        part = self.product(update, scale, base.elements)
        scaled = self.tape.record(part, elements=base.elements, width=self.width)
        extra = self.tape.record(whole, scaled, elements=base.elements, width=self.width, passes_gradient=True)
        return self.tape.record(base, extra, elements=base.elements, width=self.width, passes_gradient=True)

    def _fused_adapter(self, x: Value, base: Value, layer: Linear) -> Value:
        kept = Value(x.elements, self.width, learns=False) if self.setting.dropout else x
        weights = Value(layer.inputs + layer.outputs, 0, learns=True)
        return self.tape.record(
            base, weights, elements=base.elements, width=self.width, saves=(x, kept), passes_gradient=True
        )

    def dropout(self, x: Value, probability: float) -> Value:
        """1 byte an element on a GPU (the mask of ``native_dropout``), w on a CPU (noise)."""
        if not probability:
            return x
        mask = Value(x.elements, 1 if self.setting.cuda else self.width, learns=False)
        return self.tape.record(x, elements=x.elements, width=x.width, saves=(mask,))

    # -------------------------------------------------------------------------------------------------- feed-forward

    def feed_forward(self, x: Value, part: FeedForward) -> Value:
        """down(act(gate(x))·up(x)): 3·w·F besides the linear layers' own. down(act(up(x))): what act keeps."""
        if part.fused:
            inner = self.gated(self.linear(x, part.up))
        elif part.gate is not None:
            gate = self.linear(x, part.gate)
            active = self.activation(gate, part.activation)
            up = self.linear(x, part.up)
            inner = self.product(active, up, up.elements)
        else:
            inner = self.activation(self.linear(x, part.up), part.activation)
        return self.linear(inner, part.down)

    def gated(self, both: Value) -> Value:
        """act(gate)·up where both are halves of one tensor: that tensor, and act(gate)."""
        gate, up = (self.tape.record(both, elements=both.elements // 2, width=self.width, view=True) for _ in range(2))
        active = self.tape.record(gate, elements=gate.elements, width=self.width, saves=(both,))
        return self.tape.record(active, up, elements=up.elements, width=self.width, saves=(both, active))

    def activation(self, x: Value, name: str) -> Value:
        """ReLU keeps its output, SiLU and GELU their input; GELU written out (``gelu_new``) four tensors."""
        if name in ("gelu_new", "gelu_fast"):
            kept = [Value(x.elements, self.width, learns=False) for _ in range(3)]
            size = self.width * x.elements
            return self.tape.record(
                x,
                elements=x.elements,
                width=self.width,
                saves=(x, *kept),
                workspace=2 * size,
                backward_workspace=size,
            )
        if name == "relu":
            return self.tape.record(x, elements=x.elements, width=self.width, saves_output=True)
        return self.tape.record(x, elements=x.elements, width=self.width, saves=(x,))

    # ------------------------------------------------------------------------------------------------------ residual

    def add(self, x: Value, y: Value) -> Value:
        """Return the residual stream."""
        return self.tape.record(x, y, elements=x.elements, width=self.width, passes_gradient=True)
