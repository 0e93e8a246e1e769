"""Which files are the input: read by suffix or by content, left out with a reason, or refused."""

import gzip
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.duplicates import find_duplicates
from pipeline.errors import InputError
from pipeline.input_files import HIDDEN, Form, form_by_suffix, list_input
from pipeline.plan import make_plan
from pipeline.read import Input, open_input, read_shard

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n'


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["?"]}), sink)
    return sink.getvalue()


def put(folder: Path, **contents: bytes) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def settled(uri: str | list[str]) -> Input:
    return open_input(uri, renamed={}, carry=None)


def names(found: Input) -> list[str]:
    return [Path(file.uri).name for file in found.files]


def test_whatever_lies_in_a_folder_is_read_or_left_out_with_a_reason(tmp_path: Path) -> None:
    read = ["a.parquet", "B.PARQUET", "c.Pq", "sub/d.snappy.parquet"]
    rest = ["000000_0", "e.parquet.gz", "f.jsonl.gz", "g.png", "_SUCCESS", ".a.crc", "_tmp/h.pq"]
    put(tmp_path, **dict.fromkeys([*read, *rest], parquet()))
    found = settled(str(tmp_path))
    assert sorted(names(found)) == sorted(Path(name).name for name in read)
    left_out = {group.reason.split(";")[0].split(",")[0]: group for group in found.left_out}
    assert {reason: group.files for reason, group in left_out.items()} == {
        "their names": 3,
        "their names end in none of .parquet": 2,
        "they are compressed": 2,
    }
    assert left_out["they are compressed"].examples == (
        f"file://{tmp_path}/e.parquet.gz",
        f"file://{tmp_path}/f.jsonl.gz",
    )
    assert str(left_out["they are compressed"]).startswith("2 files left out (file://")
    assert sum(group.files for group in found.left_out) + len(found.files) == len(read + rest)


def test_a_file_that_another_uri_names_is_not_left_out(tmp_path: Path) -> None:
    put(tmp_path, **{"in/a.parquet": parquet(), "in/000000_0": parquet()})
    found = settled([f"{tmp_path}/in", f"{tmp_path}/in/000000_0"])
    assert (names(found), found.left_out) == (["000000_0", "a.parquet"], ())


@pytest.mark.parametrize("uri", ["in/000000_0", "in/0*_0"])
def test_a_named_file_or_a_glob_is_told_by_its_content(tmp_path: Path, uri: str) -> None:
    put(tmp_path, **{"in/000000_0": parquet()})
    found = settled(f"{tmp_path}/{uri}")
    assert (found.files[0].form, found.is_jsonl, found.files[0].rows) == ("parquet", False, 1)


def test_hidden_files_of_a_glob_without_suffixes_are_left_out(tmp_path: Path) -> None:
    rest = ["_SUCCESS", "._SUCCESS.crc", ".000000_0.crc"]
    put(tmp_path / "_stage/in", **{"000000_0": parquet(), **dict.fromkeys(rest, b"")})
    found = settled(f"{tmp_path}/_stage/in/*")
    assert names(found) == ["000000_0"]
    (group,) = found.left_out
    assert (group.reason, group.files) == (HIDDEN, len(rest))


def test_a_glob_of_hidden_files_alone_is_told_by_its_content(tmp_path: Path) -> None:
    put(tmp_path, **{"in/_000000_0": parquet(), "in/b": LINE})
    assert names(settled(f"{tmp_path}/in/_0*")) == ["_000000_0"]


@pytest.mark.parametrize(
    "uris",
    [["_stage/in"], ["_stage/in/*"], ["_stage/in", "*/in/*"], ["*/in/*", "_stage/in"]],
)
def test_folders_above_the_input_hide_none_of_its_files(tmp_path: Path, uris: list[str]) -> None:
    put(tmp_path / "_stage/in", **{"a.parquet": parquet(), "b.csv": b"prompt"})
    found = settled([f"{tmp_path}/{uri}" for uri in uris])
    assert names(found) == ["a.parquet"]
    (group,) = found.left_out
    assert group.reason != HIDDEN
    assert group.examples == (f"file://{tmp_path}/_stage/in/b.csv",)


def test_named_lines_are_lines_whatever_their_suffix(tmp_path: Path) -> None:
    put(tmp_path, **{"requests.txt": b"\xef\xbb\xbf" + LINE * 2})
    found = settled(f"{tmp_path}/requests.txt")
    assert (found.is_jsonl, found.files[0].is_jsonl, found.files[0].rows) == (True, True, 2)
    plan = make_plan(found.files, shard_rows=1, shard_bytes=99, offsets=found.row_offsets())
    tables = [read_shard(shard, found.columns) for shard in plan.shards]
    assert [table.column("line").to_pylist() for table in tables] == [[LINE.strip()]] * 2
    assert len(find_duplicates(found.files, "custom_id")) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gz", gzip.compress(LINE, mtime=0), r"a\.gz: is compressed \(gzip\); unpack it"),
        ("a.jsonl", gzip.compress(LINE, mtime=0), r"a\.jsonl: is compressed \(gzip\); unpack it"),
        ("a.parquet", gzip.compress(parquet()), r"a\.parquet: is compressed \(gzip\)"),
        ("a.zst", b"\x28\xb5\x2f\xfd1234", r"a\.zst: is compressed \(zstd\)"),
        ("a.jsonl", "{}".encode("utf-16"), r"a\.jsonl: is UTF-16 text; store it as UTF-8"),
        ("a.parquet", LINE, r"a\.parquet: holds JSON lines; let its name end in \.jsonl"),
        ("a.json", b'[{"a": 1}]', r"a\.json: holds neither Parquet nor JSON lines"),
        ("a.txt", b"", r"a\.txt: holds neither Parquet nor JSON lines"),
    ],
)
def test_a_named_file_that_holds_no_rows_is_refused_with_the_remedy(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    put(tmp_path, **{name: content})
    with pytest.raises(InputError, match=words):
        settled(f"{tmp_path}/{name}")


TABLES = {
    "Delta": "_delta_log/00000000000000000000.json",
    "Hudi": ".hoodie/hoodie.properties",
    "Iceberg": "metadata/v1.metadata.json",
    "Lance": "_versions/1.manifest",
    "Paimon": "snapshot/snapshot-1",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_is_more_than_its_files_is_refused(tmp_path: Path, table: str) -> None:
    put(tmp_path / "in/t", **{TABLES[table]: b"", "data/date=1/a.parquet": parquet()})
    for uri in ("in/t", "in"):
        with pytest.raises(InputError, match=rf"{tmp_path}/in/t is an? {table} .*plain Parquet"):
            settled(f"{tmp_path}/{uri}")


@pytest.mark.parametrize("table", ["Delta", "Hudi", "Iceberg"])
@pytest.mark.parametrize(
    "uri", ["data", "data/date=1", "data/*/*.parquet", "data/date=1/a.parquet"]
)
def test_a_part_of_such_a_table_is_refused_too(tmp_path: Path, table: str, uri: str) -> None:
    put(tmp_path / "t", **{TABLES[table]: b"", "data/date=1/a.parquet": parquet()})
    with pytest.raises(InputError, match=rf"{tmp_path}/t is an? {table} table"):
        settled(f"{tmp_path}/t/{uri}")


def test_a_table_beside_the_files_that_are_read_is_no_matter(tmp_path: Path) -> None:
    put(tmp_path, **{"in/a.parquet": parquet(), "in/_old/_delta_log/0.json": b""})
    put(tmp_path, **{"_delta_log/0.json": b"", "in/metadata/readme.json": b""})
    assert names(settled(f"{tmp_path}/in")) == ["a.parquet"]


def test_a_lance_dataset_is_named_though_none_of_its_files_could_be_read(tmp_path: Path) -> None:
    put(tmp_path / "d.lance", **{"_versions/1.manifest": b"", "data/0.lance": b""})
    with pytest.raises(InputError, match=r"d\.lance is a Lance dataset"):
        list_input([str(tmp_path)])


@pytest.mark.parametrize(
    ("uri", "form"),
    [
        ("s3://b/in/a.jsonl", Form.JSONL),
        ("s3://b/in/A.JSONL", Form.JSONL),
        ("s3://b/in/a.Parquet", Form.PARQUET),
        ("file:///a.jsonl.gz", None),
        ("/in.jsonl/a.parquet", Form.PARQUET),
        ("/in.parquet/a", None),
    ],
)
def test_the_suffix_tells(uri: str, form: Form | None) -> None:
    assert form_by_suffix(uri) is form
