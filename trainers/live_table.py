"""The live table of `draftsmith diagnose`: found through the entry point group `draftsmith.live`."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from draftsmith.inference.diagnose import Row

SHOWN = 8


class DiagnoseTable:
    """A context manager whose value takes the search's reports: the best hypotheses so far, and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self._live = Live(console=console or Console(stderr=True), transient=True, refresh_per_second=8)
        self._stage, self._began = "", time.monotonic()

    def __enter__(self) -> Callable[[str, int, int, Sequence[Row]], None]:
        self._live.start()
        return self.watch

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def watch(self, stage: str, done: int, of: int, rows: Sequence[Row]) -> None:
        """One more hypothesis was scored."""
        if stage != self._stage or done == 1:
            self._stage, self._began = stage, time.monotonic()
        left = (time.monotonic() - self._began) / done * (of - done)
        table = Table(title=f"{stage}: {done} of {of} hypotheses, about {left:.0f} s left")
        for title in ("hypothesis", "S", "gain", "at least"):
            table.add_column(title, justify="left" if title == "hypothesis" else "right")
        for row in rows[:SHOWN]:
            table.add_row(row.hypothesis.name, f"{row.score:.3f}", f"{row.gain:+.3f}", f"{row.low:+.3f}")
        self._live.update(table)
