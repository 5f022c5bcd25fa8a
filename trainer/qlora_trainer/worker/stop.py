"""SIGTERM at the process that starts the ranks."""

from __future__ import annotations

from contextlib import suppress

import psutil

from qlora_trainer.errors import PreemptedError


class Stop:
    """SIGTERM, passed on to the ranks, which are waited for: whoever sent it has the patience that counts.

    To end the ranks at once would end the attempt before they had agreed on a step and written a checkpoint.
    """

    def __init__(self) -> None:
        self.companions: set[int] = set()
        """Processes started from here that are no ranks: the end of the ranks ends them."""
        self.ranks_begin = False
        """From here on there are ranks, or will be in a moment, and they decide how the attempt ends."""
        self._asked = False
        self._told = False

    def __call__(self, *_: object) -> None:
        """Handle the signal.

        Raises:
            PreemptedError: nothing was started yet, so there is nothing to wait for.

        """
        self._asked = True
        if not self.pass_on() and not self.ranks_begin:
            raise PreemptedError("stopped by SIGTERM before the training had begun")

    def pass_on(self) -> bool:
        """Tell the processes started from here; False where there are none."""
        children = self.child_processes()
        if self._asked and not self._told:
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.terminate()
            self._told = self.ranks_begin and bool(children)
        return bool(children)

    def child_processes(self) -> list[psutil.Process]:
        """Return the processes started from here, without companions."""
        return [child for child in psutil.Process().children() if child.pid not in self.companions]
