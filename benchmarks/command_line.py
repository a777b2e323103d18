"""The command behind a result, fit to be published."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

# A path from the root, at the begin of a word or after `--flag=` and `measured:`, down to its last name.
_DIRECTORIES = re.compile(r"(^|[=:])/(?:[^/]*/)*(?=[^/])")


def without_machine_paths(words: Sequence[str]) -> str:
    """The words as a shell would need them, absolute paths shortened to their last name."""
    return shlex.join(_DIRECTORIES.sub(r"\1", word.rstrip("/")) for word in words)
