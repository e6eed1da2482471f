import inspect
import signal
import socket
import subprocess
import sys
import threading

import pytest

from adalfl_jax.training.preemption import SIGNALS, Preemption

# A minute of one call into C, as a chunk is to Python, within the ear of `Preemption`. Its file alone is run: to import
# the library would take longer than the test.
BUSY = """
import hashlib, runpy, sys
with runpy.run_path(sys.argv[1])["Preemption"]():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_handlers_come_back(number, capsys):
    before = [signal.getsignal(each) for each in SIGNALS]
    with Preemption() as preemption:
        assert preemption.signal is None
        signal.raise_signal(number)
    assert preemption.signal is number
    assert f"{number.name}: the run ends when this chunk is done and saved" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_another_listener_of_the_program_hears_signals_again_afterwards():
    theirs, ours = socket.socketpair()
    ours.setblocking(False)
    before = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    try:
        with Preemption():
            assert signal.set_wakeup_fd(-1) != ours.fileno()
    finally:
        assert signal.set_wakeup_fd(before) == ours.fileno()
        theirs.close()
        ours.close()


def test_a_signal_that_is_ignored_stays_ignored(capsys):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's `&` has it
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGINT)
            assert preemption.signal is None
            signal.raise_signal(signal.SIGTERM)
        assert preemption.signal is signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_ends_the_process_at_once(second):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", BUSY, inspect.getfile(Preemption)]
    with subprocess.Popen(command, **pipes) as process:  # noqa: S603, the command is ours
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert "a second signal ends it at once" in process.stderr.readline()
        process.send_signal(second)
        assert process.wait(timeout=60) == 128 + second


def test_in_another_thread_nothing_is_listened_for():
    before = [signal.getsignal(each) for each in SIGNALS]
    seen = []

    def run():
        with Preemption() as preemption:
            seen.extend([preemption.signal, *map(signal.getsignal, SIGNALS)])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None, *before]
