"""Whatever a user names as an output: it has its old contents or the new ones, and what cannot be is said at once."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from helpers import tiny_backbone

from hyperadapters.config import ModelConfig, Task
from hyperadapters.errors import OutputError
from hyperadapters.interop.export import FORMATS
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import (
    check_folder,
    check_target,
    locked,
    make_folder,
    making_folder,
    new_folder,
    open_atomically,
    write_atomically,
)

LONGEST = "n" * 250 + ".json"


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def _umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _as_ordinary_user() -> Iterator[Path]:
    """An empty folder, and no right to write what others have; root has it everywhere."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)


# A file


@pytest.mark.parametrize("name", ["scores.json", LONGEST, "größe 1.json"])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(name: str, tmp_path: Path) -> None:
    with _umask(0o027):
        write_atomically(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"
    assert _mode(tmp_path / name) == 0o640
    assert os.listdir(tmp_path) == [name]


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")
    path.chmod(0o604)
    write_atomically(path, b"new")
    assert (path.read_text(), _mode(path)) == ("new", 0o604)


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old.json").write_text("old")
    for name, target in (("link.json", "disk/old.json"), ("dangling.json", "disk/new.json")):
        (tmp_path / name).symlink_to(target)
        check_target(tmp_path / name, (".json",))
        write_atomically(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target).read_text() == "new"


def test_a_relative_name_is_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_target(Path("scores.json"), (".json",))
    write_atomically(Path("scores.json"), b"new")
    assert (tmp_path / "scores.json").read_text() == "new"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "expected a file, found a folder"),
        (lambda path: path.symlink_to(path.parent), "expected a file, found a folder"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links|does not exist"),
        (lambda path: path.symlink_to("gone/scores.json"), "the folder .*gone does not exist; create it first"),
    ],
)
def test_a_name_that_cannot_be_a_file_is_refused_before_and_on_writing(make: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    make(path)
    with pytest.raises(OutputError, match=f"scores.json: .*({message}|cannot be written)"):
        check_target(path, (".json",))
    with pytest.raises(OutputError, match=r"scores.json: cannot be written"):
        write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_name_that_is_too_long_is_refused_before_and_on_writing(tmp_path: Path) -> None:
    path = tmp_path / f"n{LONGEST}"
    with pytest.raises(OutputError, match=r"cannot be written: .*File name too long"):
        check_target(path, (".json",))
    with pytest.raises(OutputError, match=r"cannot be written: .*File name too long"):
        write_atomically(path, b"new")
    assert not os.listdir(tmp_path)


def test_a_file_or_a_folder_that_may_not_be_written_is_refused_and_stays() -> None:
    with _as_ordinary_user() as folder:
        path = folder / "scores.json"
        path.write_text("old")
        path.chmod(0o444)
        for call in (lambda: check_target(path, (".json",)), lambda: write_atomically(path, b"new")):
            with pytest.raises(OutputError, match=r"scores.json: cannot be written: .*Permission denied"):
                call()
        path.chmod(0o644)
        (folder / "closed").mkdir(mode=0o555)
        other = folder / "closed" / "scores.json"
        for call in (lambda: check_target(other, (".json",)), lambda: write_atomically(other, b"new")):
            with pytest.raises(OutputError, match=r"scores.json: cannot be written: .*Permission denied"):
                call()
        assert path.read_text() == "old"


def test_a_pipe_and_a_device_are_written_to_directly(tmp_path: Path) -> None:
    check_target(Path("/dev/null"), (".json",))
    write_atomically(Path("/dev/null"), b"new")
    assert not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        check_target(tmp_path / "pipe", (".json",))
        with open_atomically(tmp_path / "pipe") as file:
            file.write("größe\n")
        assert reader.communicate()[0].decode() == "größe\n"
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("to_file", [True, False])
def test_standard_output_can_be_named_wherever_it_goes(to_file: bool, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom hyperadapters.utils.files import *\n"
        "out = Path('/dev/stdout')\nprint('before')\ncheck_target(out, ('.json',))\n"
        "write_atomically(out, b'between\\n')\nprint('after')\n"
    )
    command = [sys.executable, "-c", code]
    if to_file:
        with (tmp_path / "all.txt").open("wb") as file:
            subprocess.run(command, stdout=file, check=True)
        found = (tmp_path / "all.txt").read_text()
    else:
        found = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    assert found == "before\nbetween\nafter\n"


def test_a_system_that_cannot_open_folders_writes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows, where `os.open` of a folder is refused and there are no locks."""
    real = os.open

    def windows_open(path: Any, *arguments: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr("hyperadapters.utils.files.fcntl", None)
    write_atomically(tmp_path / "scores.json", b"new")
    with new_folder(tmp_path / "export") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "scores.json").read_text() == "new"
    assert (tmp_path / "export" / "file").read_text() == "new"


@contextmanager
def _full_disk(limit: int) -> Iterator[None]:
    """No file can have more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [200, 2000])  # of which one stops JSON files, and the other weights
@pytest.mark.parametrize(
    "target", ["peft-lora", "merged", "adapterhub", pytest.param("onnx", marks=pytest.mark.slow), "save"]
)
def test_a_full_disk_ends_in_one_error_and_leaves_nothing(target: str, limit: int, tmp_path: Path) -> None:
    if target == "peft-lora":
        pytest.importorskip("peft")
    if target == "onnx":
        pytest.importorskip("onnxscript")
    form = "lora" if target in ("peft-lora", "merged") else "bottleneck"
    tasks = [Task.classification("mood", ["bad", "good"])]
    model = HyperAdapterModel(tiny_backbone("bert"), tasks, ModelConfig(preset="paper", form=form)).eval()
    write = FORMATS.get(target, lambda model, _, folder: model.save_pretrained(folder))
    with (
        _full_disk(limit),
        pytest.raises(OutputError, match=r"run: cannot be written: |safetensors: cannot be written"),
    ):
        write(model, "mood", tmp_path / "a" / "run")
    assert not os.listdir(tmp_path)


# A folder


def _fill(path: str | Path, beside: Path | None = None, error: Exception | None = None) -> None:
    """Fill a new folder, while somebody else writes a file, or until there is an exception."""
    with new_folder(path) as folder:
        (folder / "file").write_text("new")
        (folder / "inner").mkdir()
        if beside is not None:
            beside.write_text("other")
        if error is not None:
            raise error


def _make_in_vain(path: Path, file: Path | None = None) -> None:
    with making_folder(path):
        if file is not None:
            file.write_text("")
        raise ValueError("no luck")


@pytest.mark.parametrize("name", ["export", "n" * 255, "a/b/c/", "link", "dangling", "a/../export"])
def test_a_folder_is_filled_under_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "dangling").symlink_to("new")
    with _umask(0o022):
        _fill(f"{tmp_path}/{name}")
    assert sorted(os.listdir(tmp_path / name)) == ["file", "inner"]
    assert _mode(tmp_path / name) == 0o755
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_empty_folder_is_kept_and_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount point cannot be replaced, and a shell's working directory should not be."""
    folder = tmp_path / "export"
    folder.mkdir(mode=0o700)
    number = folder.stat().st_ino
    monkeypatch.chdir(folder)
    _fill(".")
    assert sorted(os.listdir(".")) == ["file", "inner"]
    assert (folder.stat().st_ino, _mode(folder)) == (number, 0o700)


def test_an_empty_folder_in_one_that_may_not_be_written_is_filled() -> None:
    with _as_ordinary_user() as folder:
        (folder / "closed" / "export").mkdir(parents=True)
        (folder / "closed").chmod(0o555)
        _fill(folder / "closed" / "export")
        assert sorted(os.listdir(folder / "closed" / "export")) == ["file", "inner"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_failed_leaves_nothing_behind(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "export"
    if there:
        folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="no luck"):
        _fill(folder, error=ValueError("no luck"))
    assert list(tmp_path.rglob("*")) == ([tmp_path / "a", tmp_path / "a" / "b", folder] if there else [])


def test_what_was_there_before_or_came_meanwhile_stays(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    with pytest.raises(OutputError, match="something was written into the folder meanwhile"):
        _fill(folder, beside=folder / "other")
    assert os.listdir(folder) == ["other"]
    with pytest.raises(OutputError, match="already exists; choose another name, or remove it"):
        _fill(folder)
    with pytest.raises(OutputError, match="already exists"):
        _fill(folder / "other")


@pytest.mark.parametrize("name", ["file/export", "n" * 256, "loop/export"])
def test_a_folder_that_cannot_be_made_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputError, match=r"cannot be (written|created): "):
        _fill(tmp_path / name)
    with pytest.raises(OutputError, match="the folder cannot be created: "):
        make_folder(tmp_path / name)
    with pytest.raises(OutputError, match="the folder cannot be written to: "):
        check_folder(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_computed() -> None:
    with _as_ordinary_user() as folder:
        check_folder(folder / "a" / "b")
        (folder / "closed").mkdir(mode=0o555)
        for name in ("closed", "closed/new", "closed/a/b"):
            with pytest.raises(OutputError, match=r"the folder cannot be written to: .*Permission denied"):
                check_folder(folder / name)
        assert os.listdir(folder) == ["closed"]


def test_folders_that_were_made_in_vain_are_removed_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no luck"):
        _make_in_vain(tmp_path / "a" / "b")
    assert not os.listdir(tmp_path)
    with pytest.raises(ValueError, match="no luck"):
        _make_in_vain(tmp_path / "a" / "b", file=tmp_path / "a" / "file")
    assert os.listdir(tmp_path / "a") == ["file"]


def test_a_lock_excludes_other_threads_but_not_the_one_that_holds_it(tmp_path: Path) -> None:
    def is_free() -> bool:
        try:
            with locked(tmp_path, wait=False):
                return True
        except OutputError:
            return False

    with ThreadPoolExecutor(1) as other:
        with locked(tmp_path):
            with locked(tmp_path / "." / "", wait=False):
                assert not other.submit(is_free).result()
            assert not other.submit(is_free).result()  # the inner one has not released it
        assert other.submit(is_free).result()
