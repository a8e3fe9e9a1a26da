"""JSON from outside is read within limits, and paths from outside are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperadapters.utils.reading import MAX_DEPTH, is_file, is_folder, leads_outside, parse_json


def test_json_is_read_up_to_the_maximum_depth() -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deepest = opening * (MAX_DEPTH - 1) + "[]" + closing * (MAX_DEPTH - 1)
        assert parse_json(deepest) == parse_json(deepest.encode())
        for text in (f"[{deepest}]", opening * 100_000):
            with pytest.raises(ValueError, match="expected at most 100 levels of nested lists and objects, found more"):
                parse_json(text)
    assert parse_json("[" + "[]," * 1000 + "[]]") == [[]] * 1001


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "\ud800", "gone", "link"])
def test_a_path_that_cannot_be_is_no_file_and_no_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    assert not is_file(tmp_path / name)
    assert not is_folder(tmp_path / name)
    assert not leads_outside(tmp_path, name)


@pytest.mark.parametrize(
    ("link", "target", "outside"),
    [
        ("link", "file", False),
        ("link", "../folder/file", False),
        ("folder/link", "../file", False),
        ("link", "../beside/file", True),
        ("link", "..", True),
        ("folder", "../beside", True),
        ("link", "/etc/passwd", True),
        ("link", "../gone", True),
    ],
)
def test_links_out_of_a_folder_are_found(link: str, target: str, outside: bool, tmp_path: Path) -> None:
    for folder in ("folder", "beside"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("")
    if link.startswith("folder/"):
        (tmp_path / "folder" / "folder").mkdir()
    (tmp_path / "folder" / link).symlink_to(target)
    assert leads_outside(tmp_path / "folder", link) is outside
    assert leads_outside(tmp_path / "folder", "../beside/file")
    assert leads_outside(tmp_path / "folder", f"{link}/file") is (outside or target == "..")


def test_the_links_of_the_hubs_cache_lead_to_its_own_files_only(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--user--name" / "snapshots" / "0123"
    (snapshot / "tokenizer").mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot / "a.json").symlink_to("../../blobs/1")
    (snapshot / "tokenizer" / "b.json").symlink_to("../../../blobs/2")
    (snapshot / "c.json").symlink_to("../../refs/main")
    (snapshot / "d.json").symlink_to("../../../models--user--other/blobs/3")
    assert [leads_outside(snapshot, name) for name in ("a.json", "tokenizer/b.json", "c.json", "d.json")] == [
        False,
        False,
        True,
        True,
    ]
    (snapshot.parent.parent / "blobs").rmdir()
    (snapshot.parent.parent / "blobs").symlink_to("/etc")
    assert leads_outside(snapshot, "a.json")
