"""kopf without the official Kubernetes client beside it.

kopf imports that client where it is installed, to recognise objects of its classes. This operator has none of them, and
it takes 10 MB and half a second (docs/decisions/0008). Whoever here needs kopf takes it from this module.
"""

from __future__ import annotations

import sys

if "kubernetes" in sys.modules:
    import kopf
else:
    sys.modules["kubernetes"] = None  # type: ignore[assignment]  # "not installed", as the import system has it
    try:
        import kopf
    finally:
        del sys.modules["kubernetes"]

__all__ = ["kopf"]
