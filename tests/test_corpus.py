"""Every malformed input of the corpus: refused with the words that are kept for it, in little memory and time, and with nothing touched."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from corpus import KEPT, SOUND, Case, cases, said, use
from recall_merge.runtime.errors import RecallError
from workspaces import tree

ALL = cases()
WORDS = json.loads(KEPT.read_text("utf-8"))
QUIET = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "ctypes.dlopen", "pickle.find_class"}


def test_the_corpus_is_what_is_kept():
    assert len(ALL) >= 200 and len({case.digest for case in ALL}) == len({case.id for case in ALL}) == len(ALL)
    assert {case.id for case in ALL} == set(WORDS)
    assert min(Counter(case.kind for case in ALL).values()) >= 20


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_input_is_taken(kind, tmp_path):
    """So what is refused is refused for what is wrong with it."""
    folder = Case(kind, "sound", {}).write(tmp_path)
    use(kind, folder)


@pytest.mark.parametrize("case", ALL, ids=[case.id for case in ALL])
def test_malformed(case, tmp_path):
    folder = tmp_path / "input"
    found = said(case, folder)
    assert found == WORDS[case.id] != "nothing"
    faults = found.split("\n  fix: ")
    assert len(faults) > 1 and all(len(line) < 1000 for line in found.splitlines()), "each fault says how to mend it, in few words"
    assert not any("pwned" in path.name for path in Path.cwd().iterdir())


def test_nothing_is_run_and_nothing_outside_is_written(tmp_path):
    """All inputs once more, with an ear on all that Python opens, starts and loads."""
    heard, listening = [], True

    def listen(event, given):
        if listening and (event in QUIET or (event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR))):
            heard.append((event, str(given[0])))

    for number, case in enumerate(ALL):
        case.write(tmp_path / str(number))
    before = tree(tmp_path)
    sys.addaudithook(listen)
    try:
        for number, case in enumerate(ALL):
            with pytest.raises(RecallError):
                use(case.kind, tmp_path / str(number))
    finally:
        listening = False
    assert [event for event in heard if not event[1].startswith(os.environ["XDG_CACHE_HOME"])] == []
    assert tree(tmp_path) == before
