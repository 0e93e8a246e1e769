"""Storage: whole objects or nothing, listings that skip what readers skip, errors that name."""

from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import InputError, StorageError


def test_what_was_put_is_read_back_and_replaced_whole(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/deep/er/object"
    storage.put_bytes(uri, b"long first version")
    storage.put_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["object"]


def test_a_failed_put_leaves_the_old_object_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "object").mkdir()
    with pytest.raises(StorageError, match=r"cannot write file://.*/object"):
        storage.put_bytes(f"file://{tmp_path}/folder/object", b"data")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["object"]


def test_a_listing_skips_hidden_names_at_every_level(tmp_path: Path) -> None:
    for name in (
        "a.parquet",
        "sub/b.parquet",
        "_journal/c.parquet",
        "sub/.d.parquet",
        "_e.parquet",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    found = storage.list_files(f"file://{tmp_path}/", suffixes=(".parquet",))
    assert [entry.uri.removeprefix(f"file://{tmp_path}/") for entry in found] == [
        "a.parquet",
        "sub/b.parquet",
    ]


def test_a_hidden_folder_above_the_root_hides_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "_hidden" / ".deep"
    folder.mkdir(parents=True)
    (folder / "a.parquet").write_bytes(b"x")
    assert len(storage.list_files(f"file://{folder}")) == 1
    assert len(storage.list_files(f"file://{folder}/a.parquet")) == 1


def test_a_glob_lists_what_matches(tmp_path: Path) -> None:
    for name in ("a1.parquet", "a2.parquet", "b1.parquet"):
        (tmp_path / name).write_bytes(b"x")
    assert len(storage.list_files(f"file://{tmp_path}/a*.parquet")) == 2


def test_an_absent_folder_lists_as_empty(tmp_path: Path) -> None:
    assert storage.list_files(f"file://{tmp_path}/nowhere") == []


def test_an_absent_object_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"file://{tmp_path}/nowhere")


def test_deleting_twice_is_fine(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/object"
    storage.put_bytes(uri, b"x")
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_an_unknown_scheme_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"nope://bucket/x.*nope"):
        storage.check_reachable("nope://bucket/x")


def test_an_endpoint_without_a_server_is_refused_in_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    with pytest.raises(InputError, match="s3://bucket/x: the bucket cannot be reached") as caught:
        storage.check_reachable("s3://bucket/x")
    assert "planted" not in str(caught.value).lower()


def test_plain_paths_become_file_uris(tmp_path: Path) -> None:
    assert storage.absolute(str(tmp_path)) == f"file://{tmp_path}"
    assert storage.absolute("s3://b/k") == "s3://b/k"
