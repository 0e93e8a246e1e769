"""A model's files as a preflight sees them: on one node, and compared between nodes.

Nodes are folders here. Not covered: the hub itself, and what it answers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from cluster.preflight.findings import Fault
from cluster.preflight.weight_files import SUMS, Weights, look_at_weights
from cluster.preflight.weights import judge_weights
from pipeline.profile import REPO_ROOT
from tests.preflight_cases import FIRST, SECOND, put_model, put_tensors


def look(folder: Path, *, checksums: bool = False, needs_tensors: bool = True) -> Weights:
    return look_at_weights(str(folder), None, needs_tensors=needs_tensors, checksums=checksums)


def fault_of(folder: Path, *, checksums: bool = False) -> Fault:
    (fault,) = judge_weights({"a": look(folder, checksums=checksums)})
    assert fault.nodes == ("a",)
    return fault


def make_large(path: Path) -> None:
    """Beyond what is hashed without being asked; sparse, so it costs no disk."""
    tensors = 17 * 2**20
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, tensors]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + tensors)


def put_sums(folder: Path) -> None:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.name}\n"
        for path in sorted(folder.iterdir())
    ]
    (folder / SUMS).write_text("".join(lines))


def put_hub_cache(cache: Path, model: Path) -> None:
    """``model`` as the hub's client keeps it: links to blobs that are named by their digest."""
    repo = cache / "models--some--model"
    snapshot = repo / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c0ffee")
    for path in model.iterdir():
        content = path.read_bytes()
        is_weights = path.suffix == ".safetensors"
        named = content if is_weights else b"blob %d\0" % len(content) + content
        digest = hashlib.new("sha256" if is_weights else "sha1", named).hexdigest()
        (repo / "blobs" / digest).write_bytes(content)
        (snapshot / path.name).symlink_to(repo / "blobs" / digest)


def test_a_sound_model_has_no_fault(tmp_path: Path) -> None:
    found = look(put_model(tmp_path / "model"))
    assert judge_weights({"a": found, "b": found}) == []
    assert [file.name for file in found.files] == [
        *("config.json", FIRST, SECOND),
        "model.safetensors.index.json",
    ]
    assert found.unhashed == 0


def test_the_model_in_this_tree_has_no_fault() -> None:
    found = look(REPO_ROOT / "cluster" / "models" / "mini-maverick", checksums=True)
    assert judge_weights({"a": found}) == []
    assert found.size > 3_000_000


def test_a_missing_weight_file_is_named(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model")
    (model / SECOND).unlink()
    assert f"{model}/{SECOND} is missing, and model.safetensors.index.json names it" in (
        fault_of(model).message
    )


@pytest.mark.parametrize("left", [40, 3])
def test_a_truncated_weight_file_is_named(tmp_path: Path, left: int) -> None:
    model = put_model(tmp_path / "model")
    content = (model / FIRST).read_bytes()
    (model / FIRST).write_bytes(content[:-1] if left == 40 else content[:left])
    message = fault_of(model).message
    assert f"{model}/{FIRST} has" in message
    assert "fetch or copy the file again" in message


def test_files_of_two_versions_of_a_model_are_told(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model")
    put_tensors(model / SECOND, ["other"])
    assert f"{SECOND} lacks 1 tensors" in fault_of(model).message


def test_a_folder_without_weights_is_a_fault_unless_the_engine_reads_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "holds no .safetensors file" in fault_of(tmp_path).message
    assert look(tmp_path, needs_tensors=False).problems == ()


def test_an_absent_folder_is_a_fault(tmp_path: Path) -> None:
    assert f"model folder {tmp_path}/absent is not there" in fault_of(tmp_path / "absent").message


def test_nodes_with_one_shared_fault_are_told_of_once(tmp_path: Path) -> None:
    found = look(tmp_path / "absent")
    (fault,) = judge_weights({"a": found, "b": found})
    assert fault.nodes == ("a", "b")


def test_a_config_that_was_changed_on_one_node_is_seen_without_a_manifest(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model")
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "config.json").write_text('{"model_type": "llama3"}')
    (fault,) = judge_weights({"a": look(model), "b": look(model), "c": look(other)})
    assert fault.nodes == ("c",)
    assert "config.json is not the same everywhere" in fault.message


def test_a_changed_byte_in_a_large_file_is_seen_with_checksums_only(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        make_large(folder / "model.safetensors")
    with (folders[1] / "model.safetensors").open("r+b") as file:
        file.seek(2**24)
        file.write(b"\1")
    quick = {folder.name: look(folder) for folder in folders}
    assert [weights.unhashed for weights in quick.values()] == [1, 1]
    assert judge_weights(quick) == []
    (fault,) = judge_weights({folder.name: look(folder, checksums=True) for folder in folders})
    assert "model.safetensors is not the same everywhere" in fault.message
    assert "SHA-256" in fault.message


def test_a_changed_file_is_held_against_the_folders_own_checksums(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model")
    put_sums(model)
    assert look(model).vouched == 4
    put_tensors(model / SECOND, ["c"], fill=b"\2")
    assert f"{model}/{SECOND} has another checksum" in fault_of(model).message


def test_a_file_that_the_checksums_list_and_nobody_has_is_missing(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    put_sums(model)
    (model / "tokenizer.json").unlink()
    assert f"tokenizer.json is missing, and {SUMS} lists it" in fault_of(model).message


def test_a_changed_file_is_held_against_the_names_of_the_hubs_blobs(tmp_path: Path) -> None:
    put_hub_cache(tmp_path / "cache", put_model(tmp_path / "model"))
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / "c0ffee"
    assert look(snapshot).problems == ()
    assert look(snapshot).vouched == 4
    for name in (SECOND, "config.json"):
        changed = (snapshot / name).resolve()
        changed.write_bytes(
            changed.read_bytes().replace(b"llama4", b"llama5").replace(b"\1", b"\2")
        )
    assert [problem.split(" has ")[0] for problem in look(snapshot).problems] == [
        f"{snapshot}/config.json",
        f"{snapshot}/{SECOND}",
    ]


def test_a_changed_file_is_held_against_what_the_hubs_client_noted(tmp_path: Path) -> None:
    model = put_model(tmp_path / "model")
    notes = model / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    digest = hashlib.sha256((model / FIRST).read_bytes()).hexdigest()
    (notes / f"{FIRST}.metadata").write_text(f"c0ffee\n{digest}\n1764000000.0\n")
    assert look(model).vouched == 1
    put_tensors(model / FIRST, ["a", "b"], fill=b"\2")
    assert f"{model}/{FIRST} has another checksum" in fault_of(model).message


def test_a_hub_model_that_was_not_fetched_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = look_at_weights("nobody/nothing", "abc", needs_tensors=True, checksums=False)
    (problem,) = found.problems
    assert "nobody/nothing at revision abc is not in the cache" in problem
    assert "HF_HUB_OFFLINE forbids asking the hub" in problem
    assert "hf download nobody/nothing --revision abc" in problem
