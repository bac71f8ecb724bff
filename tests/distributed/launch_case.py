"""A rank that says who it is, and then ends in a way of its own. Rank 0 waits unless all pass.

torchrun --nproc-per-node 2 -m tests.distributed.launch_case pass|raise|exit|kill|wait
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")


def main() -> None:
    said = {name: os.environ[name] for name in PLACE} | {"hash": str(hash("a word")), "pid": str(os.getpid())}
    sys.stdout.write(json.dumps(said) + "\n")  # one write, since ranks share the log
    sys.stdout.flush()
    how = sys.argv[1]
    if how == "pass":
        return
    while os.environ["RANK"] == "0":
        time.sleep(1)
    if how == "exit":
        sys.exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ZeroDivisionError


if __name__ == "__main__":
    main()
