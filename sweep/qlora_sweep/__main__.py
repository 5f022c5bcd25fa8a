"""Draw the parameters of the trials that a sweep creates next, in a process that ends then: Optuna takes 38 MiB.

``python -m qlora_sweep`` reads a sweep's spec and its trials as one JSON object, and prints the values by number.
"""

from __future__ import annotations

import sys

from qlora_sweep.decide import Create, Proceed, decide
from qlora_sweep.draw import DrawnTrials, DrawRequest
from qlora_sweep.suggest import suggest


def main() -> None:
    request = DrawRequest.model_validate_json(sys.stdin.buffer.read())
    decision = decide(request.spec, request.trials, suggest)
    actions = decision.actions if isinstance(decision, Proceed) else ()
    drawn = {action.number: dict(action.values) for action in actions if isinstance(action, Create)}
    sys.stdout.write(DrawnTrials(values=drawn).model_dump_json(by_alias=True))


if __name__ == "__main__":
    main()
