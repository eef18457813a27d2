"""What training shows while it runs: a bar on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

BARS = "▁▂▃▄▅▆▇█"
SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows each line of the metrics as it comes.

    Parameters
    ----------
    steps
        Of the whole run.
    done
        Steps taken before, when it is resumed.
    """

    def __init__(self, steps: int, done: int):
        self.steps, self.val_loss = steps, ""
        self.console = Console()
        self.shown = 0.0
        self.begin, self.done = time.monotonic(), done
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console) if self.console.is_terminal else None
        self.task = self.bar.add_task("", total=steps, completed=done) if self.bar else None

    def __enter__(self) -> "TrainingProgress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, line: dict[str, Any]) -> None:
        """Show one line of the metrics."""
        if "val_loss" in line:
            self.val_loss = f"  held out {line['val_loss']:.3f}"
        text = f"loss {line['train_loss']:.3f}{self.val_loss}  {line['tokens_per_second']:,} tok/s"
        if load := uneven(line["expert_load"]):
            text += f"  load {load}"
        now = time.monotonic()
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=line["step"], description=text)
        elif now - self.shown >= SECONDS_BETWEEN_LINES or "val_loss" in line:
            left = (now - self.begin) / (line["step"] - self.done) * (self.steps - line["step"])
            print(f"step {line['step']}/{self.steps}  {text}  {left:.0f} s left", flush=True)
            self.shown = now


def uneven(load: list[list[float]]) -> str:
    """Return the load of the experts as bars, in the layer where it is most uneven; half height is an even share."""
    if not load or not load[0]:
        return ""
    worst = max(load, key=max)
    return "".join(BARS[min(int(share * len(worst) * len(BARS) / 2), len(BARS) - 1)] for share in worst)
