"""Copies of this process that may be killed: real processes, without a second load of torch."""

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable


def start_copy(action: Callable[[], object]) -> int:
    """Fork, call in the copy, and return its process id; the copy ends with the call.

    The copy runs one thread only: nothing that waits for another of this process may be called.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that could hold a lock; pytest-xdist's hold none of ours.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return child


def wait_for_copy(child: int) -> int:
    """Exit code of a copy: 0, 1 where it raised, minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_copy(action: Callable[[], object]) -> int:
    """Call in a copy of this process and return the copy's exit code."""
    return wait_for_copy(start_copy(action))
