"""One command as several processes (torchrun): the first one talks and writes, and of an error there is one word."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def first() -> bool:
    """Whether this process talks and writes: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def begin() -> None:
    """Clean up, as for Ctrl-C, where torchrun ends this process because another one has failed."""
    if by_torchrun():

        def stop(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, stop)


def has_the_word() -> bool:
    """Whether this process says what went wrong: the one of all that asks first, for errors of the others follow from it.

    They may not have met yet; what all of them know is torchrun's own store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return first()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    from datetime import timedelta

    from torch.distributed import TCPStore

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"reelflow/word/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:  # torchrun is gone
        return False


def lost(error: Exception) -> bool:
    """Whether this says that another process does not answer."""
    return by_torchrun() and isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo", "NCCL"))


def end(code: int) -> int:
    """Part from the other processes; after an error at once, for those that wait for this one may never answer."""
    distributed = sys.modules.get("torch.distributed")
    if by_torchrun() and distributed and distributed.is_initialized():
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        distributed.destroy_process_group()
    return code
