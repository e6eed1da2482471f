"""Signals that ask a run to end: the first is obeyed at the end of a chunk, the second at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PreemptionError(RuntimeError):
    """A signal ended a run before its end.

    Attributes:
      signal: which one; a program exits with 128 + its number.
    """

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(f"{number.name}: {message}")
        self.signal = number


class Preemption:
    """Listens for SIGTERM and SIGINT while a run goes on; a context manager.

    A handler of Python's runs when the device is done with a chunk, which may take minutes. So Python's own one only
    tells a thread, which runs at once: it notes the first signal, and ends the process at the second. A signal that the
    process ignores, as a script's `&` has SIGINT, stays ignored. Outside of the main thread, where no handler
    can be set, nothing is listened for.

    Attributes:
      signal: the one that came to this process, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._sender, self._receiver = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in heard}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._thread is None:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None where it is not Python's
        signal.set_wakeup_fd(self._wakeup)
        self._sender.close()  # ends the thread
        self._thread.join()
        self._receiver.close()

    def _listen(self) -> None:
        while numbers := self._receiver.recv(1):
            if numbers[0] not in SIGNALS:
                continue
            number = signal.Signals(numbers[0])
            if self.signal is not None:
                os._exit(128 + number)
            self.signal = number
            sys.stderr.write(
                f"{number.name}: the run ends when this chunk is done and saved; a second signal ends it at once.\n"
            )
            sys.stderr.flush()
