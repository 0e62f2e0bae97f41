"""Work shared out among processes: all of it is done, once, and nobody is left behind."""

import functools
import os
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest

from seqcore.testing.shares import Share, run_shares


def test_every_item_is_in_one_share():
    items = list(range(11))
    shares = [Share(index, 4).of(items) for index in range(4)]
    assert sorted(chain.from_iterable(shares)) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "a/b", "1/2/3"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError):
        Share.parse(text)


def test_each_process_gets_its_share_and_is_heard(capfd):
    code = "import sys; print('this is', sys.argv[1:]); sys.exit(int(sys.argv[-1][0]))"
    assert run_shares([sys.executable, "-c", code], 3) == [0, 1, 2]
    assert capfd.readouterr().out.splitlines() == [f"this is ['--share', '{i}/3']" for i in range(3)]


def test_who_shares_work_out_takes_the_others_along(tmp_path):
    sleep = "import os, sys, time; open(os.path.join(sys.argv[1], str(os.getpid())), 'w'); time.sleep(60)"
    code = f"from seqcore.testing.shares import run_shares; run_shares([{sys.executable!r}, '-c', {sleep!r}, "
    command = [sys.executable, "-c", f"{code}{str(tmp_path)!r}], 2)"]
    # Tests that run in the background were told to ignore interrupts, and what they begin would do so, too.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=heed)
    begin = time.monotonic()
    while len(os.listdir(tmp_path)) < 2:
        assert time.monotonic() - begin < 60
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(20)
    for child in os.listdir(tmp_path):
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)
