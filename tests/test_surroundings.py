"""Commands as a process of their own: what they send to the network, without a home, with stderr closed."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from recall_merge.runtime.errors import is_out_of_memory
from tiny import fine_tuned, make_model, save_model
from workspaces import write_tasks

COMMANDS = """
import os, pwd, sys, json
def nobody(*_):
    raise KeyError("getpwuid(): uid not found")
if os.environ.pop("NOBODY", ""):
    pwd.getpwuid = nobody
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        os.environ.pop(name, None)
from recall_merge.cli.app import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["recall", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
"""


@pytest.fixture
def listener():
    """A port that notes who connects, and answers nothing."""
    met = []
    server = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            met.append(connection.recv(2000))
            connection.close()

    threading.Thread(target=accept, daemon=True).start()
    yield server.getsockname()[1], met
    server.close()


@pytest.mark.parametrize("kind", ["listened", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("asked for", "nobody"))])
def test_nothing_is_sent_unless_it_is_asked_for_and_no_home_is_needed(kind, listener, tmp_path):
    port, met = listener
    base = save_model(make_model("llama"), tmp_path / "base")
    fine_tuned(base, tmp_path / "a", seed=1)
    write_tasks(tmp_path, "a")
    rows = ["--train", "a-train.jsonl", "--test", "a-test.jsonl"]
    small = ["--set", "training.epochs=1", "--set", "training.rank=2", "--set", "samples.count=2"]
    commands = [
        ["merge", "--base", "base", "-e", "a=a", "-s", "a-train.jsonl", "--method", "recall", "-o", "out", "--set", "samples.count=2"],
        ["verify", "out"],
        ["evaluate", "out", "--tasks", "a-test.jsonl"],
        ["init", "ws", "--base", "base"],
        ["learn", "ws", "--task", "a", *rows, *small],
        ["status", "ws"],
        ["report", "ws"],
    ]
    url, kept = f"http://127.0.0.1:{port}", ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if kind != "nobody":
        environment |= {"HF_ENDPOINT": url, "HOME": str(tmp_path), "NO_PROXY": "nowhere"}
        environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), url)
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "0"} if kind == "asked for" else {}
    else:
        environment |= {"NOBODY": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert bool(met) == (kind == "asked for"), met


@pytest.mark.parametrize(("closed", "status"), [("2>&-", 1), (">&-", 1), ("2>&- >&-", 1)])
def test_closed_streams(closed, status, tmp_path):
    words = f"{sys.executable} -m recall_merge status {tmp_path / 'none'} {closed}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == status and "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("bytes_of_addresses", [600_000, 700_000, 800_000])
def test_too_little_memory_is_told_in_words(bytes_of_addresses, llama, tmp_path):
    expert = fine_tuned(llama, tmp_path / "a", seed=1)
    words = f"{sys.executable} -m recall_merge merge --base {llama} -e a={expert} --method linear -o {tmp_path / 'out'}"
    limited = f"ulimit -v {bytes_of_addresses}; {words}"
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True, timeout=100, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    if done.returncode:
        assert "memory" in done.stderr and not (tmp_path / "out").exists(), done.stderr
    else:
        assert (tmp_path / "out" / "record.json").is_file()


@pytest.mark.parametrize("words", ["error return without exception set", "<function f at 0x7> returned NULL without setting an exception"])
def test_what_the_interpreter_raises_where_memory_fails_it(words):
    assert is_out_of_memory(SystemError(words)) and not is_out_of_memory(SystemError("bad argument to internal function"))
