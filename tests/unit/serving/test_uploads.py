"""Uploaded files under their bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.uploads import Budget, Uploads


@pytest.fixture
def uploads() -> Iterator[Uploads]:
    uploads = Uploads(10)
    yield uploads
    uploads.close()
    assert not uploads.folder.exists()


def add(uploads: Uploads, data: bytes) -> str:
    path = uploads.new_path()
    path.write_bytes(data)
    return uploads.add(path)


def test_the_oldest_go_but_not_what_is_being_read(uploads: Uploads) -> None:
    first, second = add(uploads, b"1234"), add(uploads, b"5678")
    assert first != second and len(first) > 30
    with uploads.hold(first) as path:
        assert path.read_bytes() == b"1234"
        third = add(uploads, b"9abc")
        with (
            pytest.raises(RequestError, match="send the file again") as caught,
            uploads.hold(second),
        ):
            pass
        assert caught.value.status == 404
        with uploads.hold(third), pytest.raises(RequestError, match="in use") as caught:
            add(uploads, b"defg")
        assert caught.value.status == 507
        assert path.read_bytes() == b"1234"
    assert uploads.num_bytes == 8
    add(uploads, b"0123456789")
    assert uploads.num_bytes == 10 and len(list(uploads.folder.iterdir())) == 1
    assert not uploads._held


@pytest.mark.parametrize("key", ["", ".", "..", "../x", "/etc/passwd", "part-1"])
def test_ids_are_no_paths(uploads: Uploads, key: str) -> None:
    with pytest.raises(RequestError), uploads.hold(key):
        pass


def test_a_budget_is_shared() -> None:
    budget = Budget(10, "too much")
    budget.take(6)
    with pytest.raises(RequestError, match="too much; come back later") as caught:
        budget.take(5)
    assert caught.value.status == 503 and budget.taken == 6
    budget.give(6)
    budget.take(10)
