"""The wheel and the source archive hold what git tracks, and nothing that happens to lie about."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tracked() -> list[str]:
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return out.stdout.splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, built from a copy of the tracked files with strays beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        target = source / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    for stray in (
        "rubrics/.env",
        "prompts/notes.txt",
        "judges/key.txt",
        "grape/__pycache__/x.pyc",
        "examples/quickstart/.env",
    ):
        (source / stray).parent.mkdir(parents=True, exist_ok=True)
        (source / stray).write_text("SECRET=1")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_holds_the_package_and_its_data(built):
    wheel, _ = built
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = set()
    for name in tracked():
        if name.startswith("grape/"):
            wanted.add(name)
        elif name.startswith(("rubrics/", "prompts/", "judges/")):
            wanted.add(f"grape/_data/{name}")
        elif name.startswith("examples/quickstart/"):
            wanted.add(name.replace("examples/", "grape/_data/"))
    assert names == wanted


def test_no_archive_ships_a_stray_secret(built):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        names = zipfile.ZipFile(wheel).namelist() + archive.getnames()
    assert not [name for name in names if name.endswith((".env", "key.txt", "notes.txt", ".pyc"))]


def test_a_project_outside_the_checkout_finds_the_packaged_data(built, tmp_path):
    wheel, _ = built
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import grape, grape.resources as r; print(r.packaged('rubrics')); print(grape.load_rubric('math').category)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str(tmp_path / "site/grape/_data/rubrics"), "math"]
