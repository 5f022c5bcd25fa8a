"""Names of the profiles of pods, which a platform team defines and jobs choose."""

from __future__ import annotations

from collections.abc import Collection

from qlora_api.errors import closest

DEFAULT_PROFILE = "default"
"""Profile of jobs that name none. It exists even if nobody has defined it."""


def unknown_profile(name: str, known: Collection[str], sentence: str) -> str | None:
    """Return what is wrong with the name of a profile, and which are allowed; None where there is such a profile.

    Args:
        name: as the job has it.
        known: names of the profiles that are defined.
        sentence: beginning of the answer, such as ``is not a profile of this cluster``.

    """
    if name == DEFAULT_PROFILE or name in known:
        return None
    close = closest(name, known)
    hint = f'; did you mean "{close[0]}"? Allowed' if close else "; allowed"
    return f"{sentence}{hint}: {', '.join(sorted({DEFAULT_PROFILE, *known}))}"
