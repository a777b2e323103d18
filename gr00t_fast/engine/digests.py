"""Content digests of large files, computed once per content.

Digests decide whether an export belongs to a checkpoint. Reading gigabytes at every start would cost seconds, so a digest is remembered with the
file's size and times of change; a file whose times moved is read again, and the content stays the truth.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_CACHE_NAME = ".digests.json"
_CHUNK_BYTES = 8 * 2**20
_THREADS = 4  # hashlib lets go of the interpreter lock


class Digests:
    """SHA-256 of files, remembered in a hidden file of `directory` (the export's)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self._known = self._read()

    def of(self, files: Iterable[Path]) -> list[str]:
        """Hexadecimal SHA-256 of each file, in order. Raises OSError for one that cannot be read."""
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._digest, files))
        self._known.update({key: [*stamp, digest] for key, stamp, digest in found})
        self._write()
        return [digest for _, _, digest in found]

    def _digest(self, file: Path) -> tuple[str, list[int], str]:
        status = os.stat(file)
        # ctime too: tools that copy the modification time cannot copy that
        key, stamp = self._key(file), [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        known = self._known.get(key, [])
        return key, stamp, known[3] if known[:3] == stamp else sha256(file)

    def _key(self, file: Path) -> str:
        """Files of the export by name, so that renaming its directory loses nothing; others by their whole path."""
        resolved = file.resolve()
        return resolved.name if resolved.parent == self._directory else str(resolved)

    def _read(self) -> dict[str, list]:
        try:
            known = json.loads((self._directory / _CACHE_NAME).read_text(encoding="utf-8"))
            return {str(key): [int(size), int(mtime), int(ctime), str(digest)] for key, (size, mtime, ctime, digest) in known.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # absent or damaged: only time is lost

    def _write(self) -> None:
        temporary = self._directory / f"{_CACHE_NAME}.{os.getpid()}"
        with contextlib.suppress(OSError):  # a read-only export is hashed at every start instead
            temporary.write_text(json.dumps(self._known), encoding="utf-8")
            temporary.replace(self._directory / _CACHE_NAME)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_json(value: object) -> str:
    """Of the value, not of its spelling: keys sorted, no white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
