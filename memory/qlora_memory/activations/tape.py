"""Compute what automatic differentiation keeps, without running the model.

A :class:`Tape` is written like a forward pass, with sizes in place of tensors. Reading it gives the bytes that are held
from the forward to the backward pass, and the highest total while either runs.

The rules are those of ``torch.autograd``:

- an operation none of whose inputs needs a gradient records nothing and keeps nothing;
- a tensor that several operations save is held once, until the last of them (going backward) is done;
- going backward, an operation turns the gradient of its output into new tensors, one for each input that needs a
  gradient, while what it saved is still there; afterwards both are released;
- a second gradient for the same tensor is added in place where nobody else holds the first one, else out of place
  (``torch/csrc/autograd/input_buffer.cpp``);
- operations run backward in the reverse of the order in which they ran forward.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that is not there. Two values are the same only if they are the same object, as storages are."""

    elements: int
    width: int
    """Bytes of an element."""
    learns: bool
    """Needs a gradient."""

    @property
    def size(self) -> int:
        return self.elements * self.width


@dataclass(frozen=True, eq=False)
class Operation:
    """One recorded step."""

    inputs: tuple[Value, ...]
    output: Value
    saved: tuple[Value, ...]
    workspace: int
    """Bytes held while it runs forward, besides inputs and output."""
    backward_workspace: int
    """Bytes held while it runs backward, besides what it saved and all gradients."""
    passes_gradient: bool
    """The gradient of each input is the very tensor that came in, as for additions and views."""
    view: bool = False
    """The output is a part of the input: no bytes of its own, though its gradient has."""


@dataclass
class Tape:
    """Operations in the order of the forward pass."""

    operations: list[Operation] = field(default_factory=list)

    def record(
        self,
        *inputs: Value,
        elements: int,
        width: int,
        saves: Sequence[Value] = (),
        saves_output: bool = False,
        workspace: int = 0,
        backward_workspace: int = 0,
        passes_gradient: bool = False,
        view: bool = False,
    ) -> Value:
        """Append an operation.

        Args:
            inputs: what it reads.
            elements: of its output.
            width: bytes of an element of its output.
            saves: what its backward needs, if it has one; of :meth:`held` values and inputs alike.
            saves_output: its backward needs the output too.
            workspace: bytes besides inputs and output while it runs.
            backward_workspace: bytes besides gradients and what is saved while its backward runs.
            passes_gradient: the gradient goes through as it is.
            view: the output is a part of the input.

        Returns:
            The output.

        """
        output = Value(elements, width, learns=any(value.learns for value in inputs))
        saved = ((*saves, output) if saves_output else tuple(saves)) if output.learns else ()
        self.operations.append(Operation(inputs, output, saved, workspace, backward_workspace, passes_gradient, view))
        return output

    # ------------------------------------------------------------------------------------------------------- reading

    def saved(self, elsewhere: Sequence[Value] = ()) -> int:
        """Return the bytes held from the forward to the backward pass.

        Args:
            elsewhere: values that are counted by someone else, such as the input that a checkpoint holds.

        """
        counted = set(map(id, elsewhere))
        total = 0
        for operation in self.operations:
            for value in operation.saved:
                if id(value) not in counted:
                    counted.add(id(value))
                    total += value.size
        return total

    def forward_peak(self, elsewhere: Sequence[Value] = (), *, keeps: bool = True) -> int:
        """Highest total of bytes while it runs forward.

        Args:
            elsewhere: values counted by someone else.
            keeps: False under ``no_grad`` and in the first pass of a checkpointed layer, where nothing is saved.

        """
        last_use = {id(v): n for n, operation in enumerate(self.operations) for v in operation.inputs}
        skip, held = set(map(id, elsewhere)), set[int]()
        live: dict[int, int] = {}
        peak = 0
        for number, operation in enumerate(self.operations):
            if id(operation.output) not in skip and not operation.view:
                live[id(operation.output)] = operation.output.size
            if keeps:
                for value in operation.saved:
                    if id(value) not in skip:
                        held.add(id(value))
                        live[id(value)] = value.size
            peak = max(peak, sum(live.values()) + operation.workspace)
            for key in [k for k in live if k not in held and last_use.get(k, number + 1) <= number]:
                del live[key]
        return peak

    def backward_peak(self, elsewhere: Sequence[Value] = ()) -> int:
        """Highest total of bytes while it runs backward, all that is saved and the first gradient included.

        Args:
            elsewhere: values counted by someone else.

        """
        recorded = [o for o in self.operations if o.output.learns]
        if not recorded:
            return 0
        skip = set(map(id, elsewhere))
        uses = Counter(id(v) for o in recorded for v in set(o.saved) if id(v) not in skip)
        held = sum({id(v): v.size for o in recorded for v in o.saved if id(v) not in skip}.values())
        gradients = _Gradients()
        gradients.add(recorded[-1].output, _Buffer(recorded[-1].output.size))
        peak = 0
        for operation in reversed(recorded):
            incoming = gradients.take(operation.output)
            if incoming is not None:
                added = gradients.flow(operation, incoming)
                peak = max(peak, held + added + operation.backward_workspace)
            for value in set(operation.saved):
                if id(value) in uses:
                    uses[id(value)] -= 1
                    held -= value.size if not uses[id(value)] else 0
        return peak


# ------------------------------------------------------------------------------------------------------------ gradients


class _Buffer:
    """A gradient's storage; several values may have the same one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.holders = 0


class _Gradients:
    """The gradients that are there at one moment of the backward pass."""

    def __init__(self) -> None:
        self._of: dict[int, _Buffer] = {}
        self.total = 0

    def add(self, value: Value, buffer: _Buffer) -> int:
        """Give ``value`` a gradient.

        Returns:
            Bytes held for a moment beyond the total: a sum that is made out of place.

        """
        self._hold(buffer)
        before = self._of.get(id(value))
        if before is None:
            self._of[id(value)] = buffer
            return 0
        if before is buffer or before.holders > 1:  # shared with another value: the sum is a third tensor
            total = _Buffer(buffer.size)
            self._hold(total)
            moment = self.total
            self._drop(before)
            self._drop(buffer)
            self._of[id(value)] = total
            return moment - self.total
        self._drop(buffer)
        return buffer.size

    def take(self, value: Value) -> _Buffer | None:
        """Return the gradient of an output; it is released when :meth:`flow` is done with it."""
        return self._of.pop(id(value), None)

    def flow(self, operation: Operation, incoming: _Buffer) -> int:
        """Run one operation backward.

        Returns:
            The highest total of gradients meanwhile, bytes.

        """
        wanted = [v for v in operation.inputs if v.learns]
        made = [incoming if operation.passes_gradient else _Buffer(v.size) for v in wanted]
        peak = self.total + sum(b.size for b in made if b is not incoming)
        for value, buffer in zip(wanted, made, strict=True):
            moment = self.add(value, buffer)
            peak = max(peak, self.total + moment)
        self._drop(incoming)
        return peak

    def _hold(self, buffer: _Buffer) -> None:
        self.total += buffer.size if not buffer.holders else 0
        buffer.holders += 1

    def _drop(self, buffer: _Buffer) -> None:
        buffer.holders -= 1
        self.total -= buffer.size if not buffer.holders else 0
