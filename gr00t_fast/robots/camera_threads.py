"""lerobot reads each camera in a thread that ends with an uncaught exception when the camera dies; Python would print its traceback.

The arm notices the missing frame itself and explains it in the control thread, so the thread's own last words are left out.
"""

from __future__ import annotations

import threading
from weakref import WeakSet

_cameras: WeakSet[threading.Thread] = WeakSet()
_previous_hook = threading.excepthook


def leave_explaining_to_the_arm(thread: threading.Thread | None) -> None:
    """From now on no traceback is printed when this thread dies; other threads keep theirs."""
    global _previous_hook
    if thread is None:
        return
    _cameras.add(thread)
    if threading.excepthook is not _hook:
        _previous_hook, threading.excepthook = threading.excepthook, _hook


def _hook(arguments: threading.ExceptHookArgs) -> None:
    if arguments.thread not in _cameras:
        _previous_hook(arguments)
