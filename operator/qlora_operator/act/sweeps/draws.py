"""Draw the parameters of trials in a short-lived process: Optuna takes more memory than is left to the operator."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.trials import Trial
from qlora_sweep.draw import DrawnTrials, DrawRequest

COMMAND = (sys.executable, "-I", "-m", "qlora_sweep")
TIMEOUT_SECONDS = 300
"""With 1,000 trials, TPE takes some seconds."""
LONGEST_ERROR = 500


class DrawError(Exception):
    """The process failed, or took too long."""


class Draws:
    """One process at a time, whatever number of sweeps asks."""

    def __init__(self) -> None:
        self._slot = asyncio.Semaphore(1)

    async def draw(self, spec: QLoRASweepSpec, trials: Sequence[Trial]) -> Mapping[int, Mapping[str, Any]]:
        """Return the values of each trial that is to be created now, by number and path.

        Raises:
            DrawError: there are none.

        """
        request = DrawRequest(spec=spec, trials=list(trials)).model_dump_json(by_alias=True, exclude_none=True)
        async with self._slot:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                out, error = await asyncio.wait_for(process.communicate(request.encode()), TIMEOUT_SECONDS)
            except TimeoutError:
                raise DrawError(f"no parameters were drawn within {TIMEOUT_SECONDS} s") from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if process.returncode:
            stderr = error.decode(errors="replace").strip()[-LONGEST_ERROR:]
            raise DrawError(f"no parameters were drawn, exit code {process.returncode}: {stderr}")
        return DrawnTrials.model_validate_json(out).values
