"""A signal ends a run where its state is whole."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lacfast.runtime.signals import ENDING, Stopped, held_back, raised


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_is_an_exception_with_its_exit_code(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, raised():
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_waits_until_what_it_would_cut_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    done = []

    def work() -> None:
        with held_back("the update"), held_back("this save"):
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("update")
        done.append("more")

    with raised(), pytest.raises(Stopped):
        work()
    assert done == ["update"]
    assert "stopping after this save" in capfd.readouterr().err


def test_a_second_signal_does_not_wait(capfd: pytest.CaptureFixture[str]) -> None:
    done = []

    def work() -> None:
        with held_back("the update"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("update")

    with raised(), pytest.raises(Stopped):
        work()
    assert done == []
    assert "once more stops at once" in capfd.readouterr().err


def test_other_threads_are_left_alone() -> None:
    def work() -> None:
        with raised(), held_back("the update"):
            done.append("work")

    done: list[str] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["work"]
