"""Merges on real file systems: full at every size, read-only, with blocks of 4 KB, and such as know no holes in files.

Each is mounted in a name space of its own, which ends with the process. Where the system does not let us, the test says so and is skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from disturbed import MERGED, make_world, prepare, weights

TESTS = Path(__file__).parent
LIBRARY = [str(TESTS), str(TESTS.parent / "src")]
OWN = ["unshare", "--mount", "--propagation", "private", *([] if os.geteuid() == 0 else ["--map-root-user"])]
KINDS = {"ext4 with blocks of 4 KB": ("ext4", ["-b", "4096"]), "vfat, without holes": ("vfat", [])}


def possible(*command: str) -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*OWN, *command], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disks") / "world"
    return make_world(folder, [MERGED])


HEAD = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
from pathlib import Path
import disturbed
from recall_merge import RecallError
import recall_merge.merging.plan as plan
world, place = disturbed.World(Path(sys.argv[2]), json.loads(sys.argv[3])), Path(sys.argv[4])

def merge(out):
    try:
        disturbed.merge_here(world, out)
    except RecallError as error:
        return error.faults[0].what
    return disturbed.weights(out)
"""


def on(mount: str, world, place: Path, code: str):
    """What code prints, as JSON, that runs after the shell's words `mount`; it knows `world`, `place` and `merge`."""
    python = [sys.executable, "-c", HEAD + code, json.dumps(LIBRARY), str(world.folder), json.dumps(world.experts), str(place)]
    run = subprocess.run([*OWN, "sh", "-ec", f'{mount}; exec "$@"', str(place), *python], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.skipif(not possible("sh", "-ec", "mount -t tmpfs none /mnt"), reason="the system lets nobody mount here")
class TestMounted:
    def test_a_disk_that_is_read_only(self, world, tmp_path):
        prepare(world, MERGED, tmp_path / "out")
        found = on('mount --bind "$0" "$0"; mount -o remount,ro,bind "$0"', world, tmp_path, 'print(json.dumps(merge(place / "out")))')
        assert found == "there is no permission to write here" or "Read-only file system" in found
        assert weights(tmp_path / "out") == weights(world.folder / "full1")

    @pytest.mark.parametrize("mount", ["mount -t tmpfs none", "mount --bind $0/elsewhere"])
    def test_a_volume_where_the_result_is_to_be(self, world, tmp_path, mount):
        """As a container has them. It is said before any work; a folder in it takes the result."""
        for name in ("a volume", "elsewhere"):
            (tmp_path / name).mkdir()
        code = """
out = place / "a volume"
print(json.dumps([merge(out), os.listdir(out), sorted(os.listdir(place)), merge(out / "merged")]))
"""
        refused, inside, beside, merged = on(f'{mount} "$0/a volume"', world, tmp_path, code)
        assert refused == "the output folder is where a disk or volume is mounted, so no finished folder can be renamed into its place"
        assert (inside, beside) == ([], ["a volume", "elsewhere"]) and merged == world.wanted[MERGED]

    def test_a_disk_that_is_full_at_every_size(self, world, tmp_path):
        """Page by page, although the plan, which looks at the free space first, is kept from seeing it."""
        code = """
import subprocess
plan.free_bytes = lambda path: 10**12
found, leftovers = [], []
for pages in range(1, 80, 3):
    subprocess.run(["mount", "-o", f"remount,size={pages * 4096}", str(place)], check=True)
    found.append(merge(place / "out"))
    leftovers += [name for name in os.listdir(place) if name != "out" or isinstance(found[-1], str)]
    if not isinstance(found[-1], str):
        break
print(json.dumps([found, leftovers]))
"""
        found, leftovers = on('mount -t tmpfs none "$0"', world, tmp_path, code)
        *full, whole = found
        assert len(full) > 10 and whole == world.wanted[MERGED] and leftovers == []
        assert {words.partition(": ")[0] for words in full} <= {"the result cannot be written"} and "No space left" in full[0]

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_file_system_of_its_own(self, world, tmp_path, kind):
        system, options = KINDS[kind]
        if shutil.which(f"mkfs.{system}") is None:
            pytest.skip(f"mkfs.{system} is not installed")
        image, place = tmp_path / "image", tmp_path / "place"
        place.mkdir()
        with image.open("wb") as file:
            file.truncate(16_000_000)
        subprocess.run([f"mkfs.{system}", *options, str(image)], check=True, capture_output=True)
        mount = f"mount -o loop '{image}' \"$0\""
        if not possible("sh", "-ec", mount, str(place)):
            pytest.skip(f"{system} cannot be mounted from a file here")
        code = 'print(json.dumps([merge(place / "out"), merge(place / "out"), merge(place / "ä b"), sorted(os.listdir(place))]))'
        first, again, other, names = on(mount, world, place, code)
        assert first == again == other == world.wanted[MERGED]
        assert [name for name in names if name != "lost+found"] == ["out", "ä b"]
