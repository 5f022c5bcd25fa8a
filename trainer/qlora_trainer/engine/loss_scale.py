"""Dynamic loss scaling for float16, whose gradients underflow below 6·10⁻⁸. Micikevicius et al. 2018, section 3.2."""

from __future__ import annotations

from dataclasses import dataclass, replace

INITIAL = 65536.0
GROWTH_STEPS = 2000
"""Steps without an overflow after which the scale doubles."""
SMALLEST = 1.0
"""An overflow at this scale is none of the scaling's."""


@dataclass(frozen=True)
class LossScale:
    """The factor that losses are multiplied by, and gradients divided by before the update.

    The constants are those of ``torch.amp.GradScaler``. A value, so that a checkpoint holds it and a resumed run goes
    on with the same one.
    """

    scale: float = INITIAL
    finite_steps: int = 0
    """Steps without an overflow since the scale changed last."""
    skipped_steps: int = 0
    """Steps of the whole run whose update was left out because a loss or a gradient was not finite."""

    def after(self, *, finite: bool) -> LossScale:
        """Return the scale for the next step.

        Args:
            finite: the loss and the gradient norm of this step were finite, and the update was applied.

        """
        if not finite:
            scale = max(SMALLEST, self.scale / 2)
            return LossScale(scale=scale, finite_steps=0, skipped_steps=self.skipped_steps + 1)
        if self.finite_steps + 1 == GROWTH_STEPS:
            return replace(self, scale=self.scale * 2, finite_steps=0)
        return replace(self, finite_steps=self.finite_steps + 1)

    @property
    def is_smallest(self) -> bool:
        return self.scale <= SMALLEST
