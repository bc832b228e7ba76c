"""Runs a program for as long as its own standard input stays open, which is as long as its parent lives.

A script of its own, without imports of this package, so that it starts at once:
``python -I guard.py FOLDER PROGRAM …``.
The first line it prints is the program's process id. FOLDER is removed at the end; ``-`` is none.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading


def main() -> None:
    folder = sys.argv[1]
    child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=sys.stderr)
    print(child.pid, flush=True)

    def end(*_: object) -> None:
        child.terminate()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the parent's to handle

    def watch() -> None:
        code = child.wait()
        if folder != "-":
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(code if code >= 0 else 128 - code)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    sys.stdin.buffer.read()
    child.terminate()
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
    watching.join()


if __name__ == "__main__":
    main()
