"""What fuzz tests share: how many inputs they try, how inputs are altered, and what may come out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hyperadapters.errors import HyperAdaptersError

MAX_MESSAGE = 20_000
HOSTILE_TEXTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "../x",
        "./../x",
        "/etc/passwd",
        "/dev/zero",
        "~",
        "a\0b",
        "./a\0b",
        "a/b",
        "a\\b",
        "C:\\x",
        "CON",
        "-",
    ),
    *(
        "\ud800",
        "\udcff",
        "e\u0301",
        "\u00e9",
        "\u202e",
        "\u2028",
        "\ufeff",
        "\u200b",
        "\r\n",
        "\x1b[31m",
        "\U0001f600",
    ),
    *("x" * 300, "x" * 5000, "9" * 5000, "0x" + "f" * 5000, "1e999", "NaN", "-inf", "1_000", "12:30:45", "2024-99-99"),
    *("{text}", "{split}", "{0}", "{", "%s", "=", "<<", "*a", "&a", "!!int", "null", "true", "no", "text", "label"),
)
"""Texts that break parsers, paths, encodings, limits or templates somewhere."""
TEXTS = st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text(max_size=12))
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 8, 2**31, 2**63, 2**64, -(2**63) - 1, 10**40, 10**400]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]),
    st.integers(-100, 100),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
"""Values of any type that JSON has, and numbers that it has not."""
EDITS = st.lists(
    st.tuples(
        st.integers(0, 2**16 - 1),
        st.one_of(st.integers(0, 6), st.integers(0, 400)),
        st.one_of(st.binary(max_size=4), st.sampled_from([text.encode("utf-8", "replace") for text in HOSTILE_TEXTS])),
    ),
    min_size=1,
    max_size=4,
)
"""Changes of bytes: place, number of bytes that are removed there, and bytes that are put in their place."""
REMOVED: Any = object()
AT_ONCE = 5
"""Number of inputs in one example of hypothesis, whose own work would otherwise take most of the time."""


def num_inputs(default: int) -> int:
    """How many inputs a fuzz test tries: the number in HYPERADAPTERS_FUZZ, which `make fuzz` sets."""
    return int(os.environ.get("HYPERADAPTERS_FUZZ", default))


def fuzz_settings(default: int) -> settings:
    """The same inputs in every run of the tests, and others in each `make fuzz`, which remembers those that failed."""
    in_tests: dict[str, Any] = {"derandomize": True, "database": None}
    return settings(
        max_examples=max(1, num_inputs(default) // AT_ONCE),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **({} if "HYPERADAPTERS_FUZZ" in os.environ else in_tests),
    )


def edited(data: bytes, edits: Sequence[tuple[int, int, bytes]]) -> bytes:
    """The bytes after each of some `EDITS`."""
    for place, removed, inserted in edits:
        place %= len(data) + 1
        data = data[:place] + inserted + data[place + removed :]
    return data


def paths_in(value: Any) -> list[tuple[Any, ...]]:
    """The keys and indices that lead to each value in nested dictionaries and lists, the whole among them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *path) for key, inner in items for path in paths_in(inner))]


def changes_of(value: Any) -> st.SearchStrategy[list[tuple[tuple[Any, ...], Any]]]:
    """One to three changes of nested dictionaries and lists: a value is replaced, removed, or put beside another."""
    places = st.sampled_from(paths_in(value))
    new = st.one_of(SCALARS, SCALARS, VALUES, st.just(REMOVED))
    beside = st.tuples(places, TEXTS).map(lambda place: (*place[0][:-1], place[1]))
    return st.lists(st.tuples(st.one_of(places, places, beside), new), min_size=1, max_size=3)


def changed(value: Any, changes: Sequence[tuple[tuple[Any, ...], Any]]) -> Any:
    """A copy of nested dictionaries and lists with the given changes; those that no longer fit are left out."""
    for path, new in changes:
        value = _changed(value, path, new)
    return value


def _changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return value if new is REMOVED else new
    key, rest = path[0], path[1:]
    if isinstance(value, list) and isinstance(key, int) and key < len(value):
        inner = [] if not rest and new is REMOVED else [_changed(value[key], rest, new)]
        return [*value[:key], *inner, *value[key + 1 :]]
    # A list may have been replaced by a mapping, whose keys in JSON are texts.
    if not isinstance(value, dict) or not isinstance(key, str) or (rest and key not in value):
        return value
    if not rest and new is REMOVED:
        return {name: inner for name, inner in value.items() if name != key}
    return {**value, key: _changed(value.get(key), rest, new)}


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of each file and folder."""
    found = {}
    for entry in os.scandir(folder):
        stat = entry.stat(follow_symlinks=False)
        found[entry.path] = (stat.st_size, stat.st_mtime_ns)
        if entry.is_dir(follow_symlinks=False):
            found.update(files_in(Path(entry.path)))
    return found


@contextmanager
def only_own_errors(folder: Path) -> Iterator[None]:
    """Only errors of the library come out, each with a message to be shown, and no file below a folder changes."""
    before = files_in(folder)
    try:
        yield
    except HyperAdaptersError as error:
        message = str(error)
        assert message.splitlines()[0].strip()
        assert len(message) < MAX_MESSAGE
        assert " object at 0x" not in message
    assert files_in(folder) == before
