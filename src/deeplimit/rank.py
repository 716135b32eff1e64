"""Which of several processes this one is, as their launcher says it."""

import os

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_first_process() -> bool:
    """This process speaks and writes: with several devices the same command runs often."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"
