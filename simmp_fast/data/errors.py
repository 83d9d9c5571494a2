"""The error for files and data that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence


class DataError(ValueError):
    """Files or data that cannot be used: names the file, what was found and what is needed."""

    @classmethod
    def listing(cls, what: str, problems: Sequence[str]) -> DataError:
        """One error for all `problems`, each on its own line under a heading."""
        noun = "problem" if len(problems) == 1 else "problems"
        return cls(f"{what}: {len(problems)} {noun}\n" + "\n".join(f"  {problem}" for problem in problems))
