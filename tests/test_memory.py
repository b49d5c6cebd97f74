"""Files of any length cost no memory beyond a bound: a file of 8 GB, of which the disk holds nothing, in the place of each sound one."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from corpus import SOUND

TESTS = Path(__file__).parent
MORE = 400_000_000  # bytes of addresses that may be taken beside those of the interpreter, with torch and all else that is imported
LENGTH = 8_000_000_000
READ = [("record", "config.json"), ("record", "model.safetensors")]  # to their ends, piece by piece, to be hashed
FILES = [(kind, name) for kind, files in SOUND.items() for name in files if (kind, name) not in READ]
CODE = """
import json, os, resource, sys
sys.path[:0] = json.loads(sys.argv[1])
from pathlib import Path
from corpus import SOUND, Case, use
from recall_merge.runtime.errors import RecallError

place, more, length = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
for kind in SOUND:  # all that is imported at its first use
    use(kind, Case(kind, "sound", {}).write(place / kind))
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + more, taken + more))
for kind, name in json.loads(sys.argv[5]):
    folder = Case(kind, "long", {}).write(place / f"{kind} {name.replace('/', ' ')}")
    os.truncate(folder / name, length)
    try:
        use(kind, folder)
        print(kind, name, "was taken")
    except RecallError as error:
        assert error.faults[0].fix, error
    except MemoryError:
        print(kind, name, "takes more memory")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the bound is set from what Linux tells of a process")
def test_long_files(tmp_path):
    libraries = json.dumps([str(TESTS), str(TESTS.parent / "src")])
    command = [sys.executable, "-c", CODE, libraries, str(tmp_path), str(MORE), str(LENGTH), json.dumps(FILES)]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr[-2000:]


TOKENIZERS = """
import json, os, resource, shutil, sys
sys.path[:0] = json.loads(sys.argv[1])
from pathlib import Path
from recall_merge import make_plan
from recall_merge.models.load import build_model, load_tokenizer
from recall_merge.runtime.errors import RecallError
from tiny import fine_tuned, make_model, make_tokenizer, save_model

place, more, length = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
base = save_model(make_model(vocab_size=100), place / "base", template=True)
expert = fine_tuned(base, place / "expert", seed=1)
tokenizer = make_tokenizer()
tokenizer.add_tokens(["<new>"])
tokenizer.save_pretrained(expert)

def plan(base, expert):
    run = {"base": str(base), "experts": [{"name": "a", "path": str(expert)}], "method": "linear", "vocabulary": "union"}
    make_plan(run | {"out": {"path": str(place / "out")}})

uses = [(base, lambda folder: plan(folder, expert)), (expert, lambda folder: plan(base, folder)), (base, load_tokenizer)]
uses += [(base, build_model)]
for sound, use in uses:  # all that is imported at its first use
    use(sound)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + more, taken + more))
for name in json.loads(sys.argv[5]):
    for number, (sound, use) in enumerate(uses):
        folder = shutil.copytree(sound, place / "long")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).open("ab").truncate(length)
        try:
            use(folder)
            print(name, number, "was taken")
        except RecallError as error:
            if "longer than" not in str(error):
                print(name, number, error)
        except BaseException as error:
            print(name, number, repr(error))
        shutil.rmtree(folder)
"""
NAMES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"]
NAMES += ["tokenizer.model", "spiece.model", "tekken.json", "chat_template.jinja", "additional_chat_templates/a.jinja"]
NAMES += ["generation_config.json"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the bound is set from what Linux tells of a process")
def test_long_files_of_tokenizers(tmp_path):
    libraries = json.dumps([str(TESTS), str(TESTS.parent / "src")])
    command = [sys.executable, "-c", TOKENIZERS, libraries, str(tmp_path), str(MORE), str(LENGTH), json.dumps(NAMES)]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr[-2000:]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have nothing of the kind")
def test_what_is_freed_is_kept_for_the_next_and_can_be_given_back():
    """Faults of pages of taking and freeing 8 MB in pieces, once the heap has been at that size."""
    program = """
import resource, sys
from recall_merge.runtime import memory
import torch
if sys.argv[1] == "keep":
    memory.one_heap()
def pages(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        held = [torch.ones(1 << 18) for _ in range(8)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages(3)
again = pages(10)
memory.give_back()
print(again, pages(1))
"""
    faults, begin = {}, os.environ | {"MALLOC_TRIM_THRESHOLD_": "131072"}  # as the C library begins; imports raise it by chance
    for how in ("keep", "not"):
        ended = subprocess.run([sys.executable, "-c", program, how], env=begin, check=True, capture_output=True, text=True)
        faults[how] = [int(word) for word in ended.stdout.split()]
    assert faults["keep"][0] < 2000 < faults["not"][0]
    assert faults["keep"][1] > 1_000
