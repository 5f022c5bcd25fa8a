"""``python -m qlora_operator --config FILE``"""

from __future__ import annotations

import gc

gc.disable()  # nothing that is imported is garbage; main() enables it

from qlora_operator.app import main  # noqa: E402

if __name__ == "__main__":
    main()
