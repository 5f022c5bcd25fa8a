"""``python skewed_operator.py SECONDS --config FILE``: an operator on a machine whose clock is wrong by so much."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta, tzinfo

from qlora_operator.app import main

if __name__ == "__main__":
    SKEW = timedelta(seconds=int(sys.argv.pop(1)))

    class Skewed(datetime):
        """Tell the wrong time."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + SKEW

    for name, module in list(sys.modules.items()):
        if name.startswith("qlora_operator") and getattr(module, "datetime", None) is datetime:
            module.datetime = Skewed  # type: ignore[attr-defined]
    main()
