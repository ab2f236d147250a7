"""A plugin for pytest: another day, folders that list their files backwards, other random numbers.

python -m pytest -p tests.elsewhere --collect-only
"""

from __future__ import annotations

import os
import random
import time

LATER_S = 3 * 86_400 + 3_661
_scandir, _listdir = os.scandir, os.listdir
_time, _time_ns, _localtime, _gmtime = time.time, time.time_ns, time.localtime, time.gmtime


class _Backwards:
    """What os.scandir gives, the last entry first."""

    def __init__(self, *args):
        with _scandir(*args) as entries:
            self._entries = reversed(list(entries))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._entries)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._entries = iter(())


os.scandir = _Backwards
os.listdir = lambda *args: _listdir(*args)[::-1]
time.time = lambda: _time() + LATER_S
time.time_ns = lambda: _time_ns() + LATER_S * 10**9
time.localtime = lambda at_s=None: _localtime(time.time() if at_s is None else at_s)
time.gmtime = lambda at_s=None: _gmtime(time.time() if at_s is None else at_s)
random.seed(LATER_S)
