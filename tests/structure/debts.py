"""What the house does not yet meet: each entry is to go, and none may be added."""

from __future__ import annotations

UPWARDS: dict[str, set[tuple[str, str]]] = {"launcher": set(), "training": set()}
"""(importing module, imported module) against the order of folders."""

CIRCLES: dict[str, set[str]] = {"launcher": set(), "training": set()}

LARGER: dict[str, dict[str, set[str]]] = {"launcher": {"classes": {"Run"}, "functions": {"verdicts"}}, "training": {}}
"""Classes, functions, folders and files above their limit."""

UNDOCUMENTED: dict[str, set[str]] = {}

WRITTEN_OFTEN: dict[str, int] = {}
"""In how many places that is written which is to be written once."""

WRITTEN_STILL: dict[str, int] = {}

REPLACED_WORDS = 86
"""How many words are left of those that the style replaces."""
