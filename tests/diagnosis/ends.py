"""Ranks of a diagnosis that end badly: `python ends.py KIND JOB`."""

import json
import os
import signal
import sys
import time


def main(kind, text):
    rank = json.loads(text)["rank"]
    if kind == "asleep" or (kind == "one asleep" and rank == 1):
        time.sleep(600)
    if kind == "gone":
        sys.stderr.write("no memory\nor something else\n")
        sys.exit(7)
    from lightning_longnet.diagnosis import exactness
    from lightning_longnet.diagnosis.rank import main as check

    attend = exactness.attend

    def broken(q, k, v, pattern, exchange="auto", **options):
        out = attend(q, k, v, pattern, exchange=exchange, **options)
        if "shard" in options and rank == 1 and exchange == "ring":
            if kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "raising":
                raise RuntimeError("no such wire\nand more of it")
            if kind == "wrong":
                return out + 1e-6 * q.sum()
        return out

    exactness.attend = broken
    check(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
