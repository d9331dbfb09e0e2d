"""The process of a run: its output, its exit code, its end; and what is read from event files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweep_stub import write_events

from lightning_ire.sweeps import _runs
from lightning_ire.sweeps._runs import last_line, last_values, run_process

LIBRARY = Path(_runs.__file__).parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_output_is_appended_and_the_exit_code_returned(tmp_path):
    log = tmp_path / "cell" / "output.log"
    assert run_process(python("print('one')"), log) == 0
    assert run_process(python("import sys; print('two', file=sys.stderr); sys.exit(3)"), log) == 3
    assert log.read_text() == "one\ntwo\n"
    assert run_process(python("import os; os.kill(os.getpid(), 9)"), log) == -9


@pytest.mark.parametrize(
    ("text", "line"), [("a\nb \n\n", "b"), ("bar 1\rbar 2\r", "bar 2"), ("", "no output")], ids=["text", "bar", "empty"]
)
def test_last_line(text, line, tmp_path):
    (tmp_path / "log").write_text(text)
    assert last_line(tmp_path / "log") == line


def test_ctrl_c_waits_for_the_run(tmp_path, monkeypatch):
    """The run gets Ctrl-C from the terminal as well and takes a moment to end."""
    code = "import time; print('begun', flush=True); time.sleep(0.3); print('saved')"
    waited = []
    wait = subprocess.Popen.wait

    def interrupted(process, timeout=None):
        if not waited:
            waited.append(True)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_process(python(code), tmp_path / "log")
    assert (tmp_path / "log").read_text() == "begun\nsaved\n"


def test_a_run_that_ignores_ctrl_c_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(_runs, "_PATIENCE_SECONDS", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    wait = subprocess.Popen.wait
    calls = []

    def interrupted(process, timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_process(python(code), tmp_path / "log")
    assert time.monotonic() - begun < 30


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_killed_sweep_takes_its_run_along(tmp_path):
    log = tmp_path / "log"
    pid = os.fork()
    if pid == 0:
        run_process(python("import os, time; print(os.getpid(), flush=True); time.sleep(60)"), log)
        os._exit(0)
    run = int(wait_for(lambda: log.is_file() and log.read_text().endswith("\n") and log.read_text()))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert wait_for(lambda: not is_alive(run))


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_last_value_of_the_newest_version_that_has_the_tag(tmp_path):
    write_events(tmp_path / "version_2", {"a": [1.0, 2.0], "b": [5.0]})
    write_events(tmp_path / "version_10", {"a": [4.0, 3.0]})
    (tmp_path / "version_11").mkdir()
    assert last_values(tmp_path) == {"a": 3.0, "b": 5.0}


def test_two_event_files_of_one_run(tmp_path):
    """Fit and test write one each; the second begins at an earlier step than the first one ended."""
    write_events(tmp_path / "version_0", {"val/accuracy": [0.1, 0.2, 0.3]})
    time.sleep(1.1)  # the name of an event file has whole seconds
    write_events(tmp_path / "version_0", {"test/accuracy": [0.5]})
    assert last_values(tmp_path) == pytest.approx({"val/accuracy": 0.3, "test/accuracy": 0.5})
