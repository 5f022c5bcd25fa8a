"""``python -m qlora_operator --config FILE``"""

from __future__ import annotations

from qlora_operator.app import main

if __name__ == "__main__":
    main()
