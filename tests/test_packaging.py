"""What is built and shipped: packages, sources, version, wheel tags, documented commands."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from setuptools import find_packages

import cbam_fused

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


# Runs in a process of its own, where setuptools is imported before anything imports distutils.
READ_SETUP = """
import json, setuptools
from distutils.core import run_setup
distribution = run_setup("setup.py", stop_after="config")
wheel = distribution.get_command_obj("bdist_wheel")
wheel.ensure_finalized()
tags = {}
for wheel.root_is_pure in (True, False):
    tags["pure" if wheel.root_is_pure else "with_library"] = wheel.get_tag()
print(json.dumps({
    "packages": distribution.packages,
    "version": distribution.get_version(),
    "sources": distribution.get_command_obj("build_library").get_source_files(),
    "tags": tags,
}))
"""


@pytest.fixture(scope="module")
def setup() -> dict:
    """setup.py with pyproject.toml, as setuptools reads them."""
    command = [sys.executable, "-c", READ_SETUP]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_triton_kernels_ships_inside_the_package_only(setup):
    found = find_packages(str(ROOT), include=["cbam_fused", "cbam_fused.*"])
    assert set(setup["packages"]) == {*found, "cbam_fused.triton_kernels"}
    installed = importlib.metadata.distribution("cbam_fused")
    assert installed.read_text("top_level.txt").split() == ["cbam_fused"]
    assert importlib.util.find_spec("cbam_fused.triton_kernels")


def test_setup_lists_every_source(setup):
    found = {p for kind in ("cpp", "cu") for p in ROOT.glob(f"csrc/**/*.{kind}")}
    assert set(setup["sources"]) == {str(path.relative_to(ROOT)) for path in found}


def test_version_is_written_once(setup):
    version = cbam_fused.__version__
    assert setup["version"] == version
    assert importlib.metadata.version("cbam_fused") == version
    assert version not in (ROOT / "pyproject.toml").read_text()
    assert version not in (ROOT / "setup.py").read_text()
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == version


def test_wheel_tag_depends_on_no_python(setup):
    assert setup["tags"]["pure"] == ["py3", "none", "any"]
    python, abi, machine = setup["tags"]["with_library"]
    assert (python, abi) == ("py3", "none")
    assert machine == sysconfig.get_platform().replace("-", "_").replace(".", "_")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CBAM_FUSED_CPP": "0"}, "CBAM_FUSED_CPP=0 was set when the package was built"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler was not found"),
    ],
    ids=["switched_off", "no_compiler"],
)
def test_build_without_library_succeeds_and_records_why(tmp_path, environment, reason):
    for name in ("setup.py", "build_library.py", "build_cuda.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("cbam_fused", "triton_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name)
    assert (tmp_path / "cbam_fused/lib/libcbam_fused.so").exists(), "nothing to be removed"
    command = [sys.executable, "setup.py", "-q", "build_library", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | environment, check=True)
    record = json.loads((tmp_path / "cbam_fused/lib/build.json").read_text())
    assert record.keys() == {"reason"}
    assert record["reason"].startswith(reason)
    assert not (tmp_path / "cbam_fused/lib/libcbam_fused.so").exists()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_targets_that_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / document).read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    help_text = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    assert set(re.findall(r"^make ([a-z]+) ", help_text.stdout, re.MULTILINE)) == phony - {"help"}


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert packages
    assert [line for line in packages if not re.fullmatch(r"[\w-]+==[\w.]+", line)] == []
