"""Fuzz the readers of files, guided by coverage (atheris): python tests/fuzz/fuzz.py RUNS [TARGET].

Each target gets its share of the runs, in a process of its own, since libFuzzer ends its process.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]


def one(name: str, runs: int) -> None:
    """All runs of one target in this process."""
    import atheris

    with atheris.instrument_imports(include=["slimfx", "yaml", "json"]):
        from targets import seeds, tried
    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp())
    for i, seed in enumerate(seeds(name)):
        (folder / str(i)).write_bytes(seed)
    longest = 2 * max(map(len, seeds(name)))
    options = [f"-runs={runs}", f"-max_len={longest}", "-timeout=20", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, str(folder)], lambda data: tried(name, data) and None)
    atheris.Fuzz()


def main() -> None:
    """Every target, and a line of what came of it."""
    runs, *given = sys.argv[1:]
    if given:
        one(given[0], int(runs))
        return
    failed = False
    for name, share in {"loader": 1, "graph": 1, "recipe": 1, "manifest": 7}.items():
        count = int(runs) * share // 10
        began = time.time()
        done = subprocess.run(
            [sys.executable, __file__, str(count), name], capture_output=True, text=True
        )
        rate = count / (time.time() - began)
        crashed = done.returncode != 0
        failed |= crashed
        print(f"{name:<10}{count:>9} executions{rate:>9.0f}/s{int(crashed):>3} crashes", flush=True)
        if crashed:
            print(done.stderr[-3000:])
    sys.exit(failed)


if __name__ == "__main__":
    main()
