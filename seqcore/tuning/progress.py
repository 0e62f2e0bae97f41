"""How far a run is: a bar in a terminal, a line for each problem elsewhere."""

import sys

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    def __init__(self, total: int, what: str):
        self.total, self.done = total, 0
        self.bar = tqdm(total=total, unit=what, dynamic_ncols=True) if tqdm and sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def begin(self, name: str) -> None:
        if self.bar is not None:
            self.bar.set_description(name)

    def end(self, line: str) -> None:
        """One is finished, and ``line`` says how it went."""
        self.done += 1
        if self.bar is not None:
            self.bar.write(line)
            self.bar.update()
        else:
            print(f"[{self.done}/{self.total}] {line}", flush=True)
