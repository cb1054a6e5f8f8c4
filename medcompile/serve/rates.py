"""How often each caller may ask: a bucket of tokens for each name, filled at the name's rate."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from medcompile.errors import UsageError

_MOST_NAMES = 65_536


@dataclass(frozen=True)
class Rate:
    """per_minute: requests in the long run. most_at_once: after a pause; None is a tenth of a minute's, at least 1."""

    per_minute: float
    most_at_once: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.per_minute) and self.per_minute > 0):
            raise UsageError("a rate is a number of requests a minute above 0", fix="give for example 600")
        if self.most_at_once is not None and self.most_at_once < 1:
            raise UsageError("burst: at least 1 request must be let through", fix="give 1 or more")

    @property
    def burst(self) -> int:
        return self.most_at_once or max(1, math.ceil(self.per_minute / 10))


class Rates:
    """The buckets, one for each of the names that asked last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name -> (requests spent, as of when)

    def take(self, name: str, rate: Rate) -> float:
        """0 where a request may go through, which is then counted; else the seconds until one may."""
        now_s = self._clock()
        spent, when_s = self._spent.pop(name, (0.0, now_s))
        spent = max(0.0, spent - (now_s - when_s) * rate.per_minute / 60)
        wait_s = max(0.0, (spent + 1 - rate.burst) * 60 / rate.per_minute)
        self._spent[name] = (spent if wait_s > 1e-9 else spent + 1, now_s)
        if len(self._spent) > _MOST_NAMES:
            self._spent.popitem(last=False)
        return wait_s if wait_s > 1e-9 else 0.0

    def left(self, name: str, rate: Rate) -> int:
        """Requests that may go through at once now."""
        spent, when_s = self._spent.get(name, (0.0, self._clock()))
        spent = max(0.0, spent - (self._clock() - when_s) * rate.per_minute / 60)
        return max(0, math.floor(rate.burst - spent + 1e-9))
