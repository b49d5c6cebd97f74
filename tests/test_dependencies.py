"""What the package claims to run with is what its tests run with."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = {
    canonicalize_name(name): Version(version)
    for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    if name.replace("-", "").replace("_", "").isalnum()
}
CALENDAR = {"regex"}  # versions are days, and promise nothing about what they break
USED = [Requirement(word) for word in PROJECT["dependencies"]]
USED += [Requirement(word) for extra, words in PROJECT["optional-dependencies"].items() if extra != "dev" for word in words]


@pytest.mark.parametrize("requirement", [one for one in USED if one.name != "recall-merge"], ids=str)
def test_the_lowest_version_that_is_claimed_is_the_one_that_is_tested(requirement):
    pin = PINS[canonicalize_name(requirement.name)]
    assert pin in requirement.specifier
    [lowest] = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
    assert lowest == pin
    assert any(one.operator in ("<", "==") for one in requirement.specifier) or requirement.name in CALENDAR
