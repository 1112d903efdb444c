"""Where a run stands, for the person watching: a bar on a terminal, plain lines elsewhere."""

import shutil
import sys
import time
from typing import TextIO


class Progress:
    """Show step, loss, tokens a second and time left.

    On a terminal one line is redrawn in place, ten times a second at most. Elsewhere (a file, a
    pipe, a notebook's log) a plain line is written at the first and last report, and in
    between every `seconds_between_lines`.

    Args:
        label: put before everything, for instance the method and the seed.
        stream: standard error where None.
        quiet: show nothing.

    Examples:
        >>> import sys
        >>> progress = Progress("biweight", stream=sys.stdout)
        >>> progress.update(1, 10, loss=2.5, seconds_per_step=3.0)
        biweight  step 1/10  loss 2.5000  0:27 left
        >>> progress.note("val_loss 2.4")
        biweight  val_loss 2.4
    """

    def __init__(
        self,
        label: str = "",
        *,
        stream: TextIO | None = None,
        quiet: bool = False,
        seconds_between_lines: float = 10.0,
    ):
        self._label = f"{label}  " if label else ""
        self._stream = None if quiet else stream or sys.stderr
        self._bar = self._stream is not None and self._stream.isatty()
        self._pause = 0.1 if self._bar else seconds_between_lines
        self._shown_at: float | None = None
        self._drawn = False

    def update(
        self,
        step: int,
        steps: int,
        *,
        loss: float,
        seconds_per_step: float | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Report a step; what is not known yet (the first step compiles) is left out."""
        now = time.monotonic()
        due = self._shown_at is None or now - self._shown_at >= self._pause or step == steps
        if self._stream is None or not due:
            return
        self._shown_at = now
        text = f"step {step}/{steps}  loss {loss:.4f}"
        if tokens_per_second is not None:
            text += f"  {_short(tokens_per_second)} tokens/s"
        if seconds_per_step is not None:
            text += f"  {_clock((steps - step) * seconds_per_step)} left"
        if self._bar:
            self._draw(text, step / max(steps, 1))
        else:
            self._print(self._label + text)

    def note(self, text: str) -> None:
        """Write a line that stays, for instance an evaluation."""
        self._clear()
        self._print(self._label + text)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._drawn:
            self._print("")
            self._drawn = False

    def _draw(self, text: str, fraction: float) -> None:
        width = shutil.get_terminal_size().columns
        room = min(width - len(self._label) - len(text) - 4, 30)
        filled = round(max(room, 0) * fraction)
        bar = f"[{'#' * filled}{'.' * (room - filled)}] " if room >= 5 else ""
        line = (self._label + bar + text)[: width - 1]
        self._write(f"\r\x1b[2K{line}")
        self._drawn = True

    def _clear(self) -> None:
        if self._drawn:
            self._write("\r\x1b[2K")
            self._drawn = False

    def _print(self, line: str) -> None:
        self._write(line + "\n")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # A closed pipe or terminal must not end a run of hours.
            self._stream = None


def _short(number: float) -> str:
    """Three digits or so: 950, 12.3k, 4.56M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    """A duration: 0:42, 12:03, 3:04:05."""
    whole = round(max(seconds, 0.0))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
