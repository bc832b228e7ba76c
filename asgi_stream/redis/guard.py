"""Runs a program for as long as its own standard input stays open, which is as long as its parent lives.

A script of its own, without imports of this package, so that it starts at once: ``python -I guard.py PROGRAM …``. The
first line it prints is the program's process id.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr)
    print(child.pid, flush=True)

    def end(*_: object) -> None:
        child.terminate()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the parent's to handle
    threading.Thread(target=lambda: os._exit(child.wait()), daemon=True).start()
    sys.stdin.buffer.read()
    child.terminate()
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()


if __name__ == "__main__":
    main()
