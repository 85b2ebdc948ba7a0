"""What a process that torchrun started has to know about the others: who speaks, and who died (chapter 12)."""
from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist


@contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """While it lasts, the first Ctrl-C puts its signal in the list, and the second one interrupts as usual."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def watch() -> Iterator[None]:
    """While it lasts, a rank that dies ends the others with one line that names it, instead of an error of the network
    from each. torchrun sees the death and sends SIGTERM to the rest; where the main thread waits inside a collective and
    cannot run a handler, a second thread hears of it."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or threading.current_thread() is not threading.main_thread():
        yield
        return
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)

    def listen() -> None:
        while numbers := ear.recv(16):
            if signal.SIGTERM in numbers:
                _leave()

    before, fd = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    except ValueError:                          # one line of its own will say what is wrong
        with suppress(RuntimeError):
            _store().set("minimoe/said", "")
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            _leave()
        raise
    finally:
        signal.set_wakeup_fd(fd)
        signal.signal(signal.SIGTERM, before)
        mouth.close()


def _leave() -> None:
    """Ends this process. The ranks that do the same say so to each other through torchrun's store, so the one that is
    missing is the one that died, and the lowest that is left tells."""
    rank, size, text = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), ""
    try:
        store = _store()
        store.set(f"minimoe/leaving/{rank}", "")
        time.sleep(1.5)
        left = [r for r in range(size) if store.check([f"minimoe/leaving/{r}"])]
        gone = ", ".join(str(r) for r in range(size) if r not in left)
        if not store.check(["minimoe/said"]):
            text = f"rank {gone} of {size} died" if gone else "the run was told to stop"
    except (RuntimeError, ValueError):          # the store died too
        left, text = [rank], "another rank died"
    if rank == left[0] and text:
        print(f"\nminimoe: error: {text}; the same torchrun command with --resume goes on from the last checkpoint",
              file=sys.stderr, flush=True)
    os._exit(1)


def _store() -> dist.TCPStore:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5))


def is_main() -> bool:
    """Whether this process is the only one, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def let_rank_0_speak() -> None:
    """Called before an error is shown: one that all ranks meet is shown by rank 0, and torchrun ends the others meanwhile."""
    if not is_main():
        time.sleep(2)
