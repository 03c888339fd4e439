# SPDX-License-Identifier: Apache-2.0
"""Sealing and opening directories: everything is sealed or nothing is, and nothing is overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.didkey import did_key
from cloister.errors import CloisterError, Code
from cloister.sealed.directory import SealedDirectory, SealedDirectoryWriter, open_directory, seal_directory
from cloister.sealed.manifest import MANIFEST_NAME, Manifest
from fakes.sealed_material import content, data_key

FILES = {"train.tsv": 200_000, "empty": 0, "sub/.hidden": 5, "sub/deep/训练 数据.tsv": 65_480}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    for name, size in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content(size, salt=name))
    return path


def seal(source: Path, out: Path) -> Manifest:
    return seal_directory(source, out, data_key=data_key(), dataset="reviews")


def refusal(code: Code, source: Path, out: Path) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        seal(source, out)
    assert caught.value.code is code
    assert caught.value.todo
    return caught.value


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_directory_comes_back_as_it_was(source: Path, tmp_path: Path) -> None:
    manifest = seal(source, tmp_path / "out")
    assert [entry.path for entry in manifest.files] == sorted(FILES)
    assert manifest.size == sum(FILES.values())
    opened = open_directory(tmp_path / "out", tmp_path / "back", data_key=data_key())
    assert opened == manifest
    assert tree(tmp_path / "back") == tree(source)


def test_nothing_of_the_content_stands_in_the_sealed_directory(source: Path, tmp_path: Path) -> None:
    seal(source, tmp_path / "out")
    marker = content(200_000, salt="train.tsv")[100_000:100_016]
    sealed = tree(tmp_path / "out")
    assert set(sealed) == {*(f"{name}.sealed" for name in FILES), MANIFEST_NAME}
    assert not any(marker in data for data in sealed.values())


def test_a_single_file_becomes_a_directory_of_one(source: Path, tmp_path: Path) -> None:
    assert [entry.path for entry in seal(source / "train.tsv", tmp_path / "out").files] == ["train.tsv"]


def test_files_are_read_one_by_one(source: Path, tmp_path: Path) -> None:
    seal(source, tmp_path / "out")
    directory = SealedDirectory.open(tmp_path / "out", data_key=data_key())
    assert directory.files == tuple(sorted(FILES))
    assert directory.read("sub/.hidden") == content(5, salt="sub/.hidden")
    with directory.open_file("train.tsv") as file:
        file.seek(150_000)
        assert file.read(10) == content(200_000, salt="train.tsv")[150_000:150_010]
    with pytest.raises(CloisterError) as caught:
        directory.read("tarin.tsv")
    assert caught.value.code is Code.FILE_NOT_FOUND
    assert "train.tsv" in caught.value.why


def test_a_peek_names_the_key_and_the_digest(source: Path, tmp_path: Path) -> None:
    manifest = seal(source, tmp_path / "out")
    digest, key_uri, key_version, wrapped = SealedDirectory.peek(tmp_path / "out")
    assert digest == manifest.digest
    assert (key_uri, key_version, wrapped) == (data_key().key_uri, data_key().key_version, data_key().wrapped)


def test_progress_rises_to_the_total_and_names_every_file(source: Path, tmp_path: Path) -> None:
    for run in range(2):
        seen: list[tuple[int, int, str]] = []

        def report(done: int, total: int, file: str, seen: list[tuple[int, int, str]] = seen) -> None:
            seen.append((done, total, file))

        if run == 0:
            seal_directory(source, tmp_path / "out", data_key=data_key(), dataset="d", progress=report)
        else:
            open_directory(tmp_path / "out", tmp_path / "back", data_key=data_key(), progress=report)
        total = sum(FILES.values())
        assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
        assert seen[-1][:2] == (total, total)
        assert {file for _, _, file in seen} == set(FILES)


def test_verify_reads_everything(source: Path, tmp_path: Path) -> None:
    seal(source, tmp_path / "out")
    directory = SealedDirectory.open(tmp_path / "out", data_key=data_key())
    directory.verify()
    damaged = tmp_path / "out" / "train.tsv.sealed"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CloisterError, match=r"train\.tsv"):
        directory.verify()


def test_a_finished_directory_is_never_written_again(source: Path, tmp_path: Path) -> None:
    seal(source, tmp_path / "out")
    before = tree(tmp_path / "out")
    assert "never changed" in refusal(Code.FILE_EXISTS, source, tmp_path / "out").why
    assert tree(tmp_path / "out") == before


def test_a_directory_with_other_files_is_not_written_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("do not touch")
    assert "thesis.tex" in refusal(Code.FILE_EXISTS, source, tmp_path / "out").why
    assert tree(tmp_path / "out") == {"thesis.tex": b"do not touch"}


def test_an_interrupted_sealing_is_taken_up(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with SealedDirectoryWriter(out, data_key=data_key("two"), dataset="reviews") as writer:
        writer.add("left-over.tsv", b"x")
        writer.add("train.tsv", b"x")
    (out / ".cloister-0123456789abcdef.partial").write_bytes(b"ciphertext of a killed writer")
    with pytest.raises(CloisterError, match="sealing did not end"):
        SealedDirectory.open(out, data_key=data_key("two"))
    seal(source, out)
    assert set(tree(out)) == {*(f"{name}.sealed" for name in FILES), MANIFEST_NAME}
    SealedDirectory.open(out, data_key=data_key()).verify()


def test_two_writers_do_not_mix(source: Path, tmp_path: Path) -> None:
    first = SealedDirectoryWriter(tmp_path / "out", data_key=data_key("two"), dataset="reviews")
    first.add("a", b"x")
    assert "in use" in refusal(Code.FILE_EXISTS, source, tmp_path / "out").what
    manifest = first.finish()
    assert SealedDirectory.open(tmp_path / "out", data_key=data_key("two")).manifest == manifest


def test_an_exception_while_sealing_a_file_leaves_the_file_out(tmp_path: Path) -> None:
    with SealedDirectoryWriter(tmp_path / "out", data_key=data_key(), dataset="d") as writer:

        def interrupted() -> None:
            with writer.open("a") as file:
                file.write(b"half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        writer.add("a", b"whole")
        with pytest.raises(CloisterError, match="sealed into"):
            writer.add("a", b"again")
        writer.finish()
    assert SealedDirectory.open(tmp_path / "out", data_key=data_key()).read("a") == b"whole"


def test_an_empty_directory_is_not_sealed(tmp_path: Path) -> None:
    (tmp_path / "source" / "sub").mkdir(parents=True)
    refusal(Code.ARGUMENT_INVALID, tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "nowhere" in refusal(Code.FILE_NOT_FOUND, tmp_path / "nowhere", tmp_path / "out").what


@pytest.mark.parametrize("target", ["train.tsv", "sub", "/etc", "dangling"])
def test_a_symbolic_link_in_the_source_is_refused_by_name(source: Path, tmp_path: Path, target: str) -> None:
    (source / "sub" / "link").symlink_to(target)
    error = refusal(Code.ARGUMENT_INVALID, source, tmp_path / "out")
    assert "sub/link" in error.what
    assert "symbolic link" in error.why
    assert not (tmp_path / "out").exists()


def test_a_pipe_in_the_source_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "pipe")
    assert "pipe" in refusal(Code.ARGUMENT_INVALID, source, tmp_path / "out").what


def test_a_name_that_is_not_text_is_refused(source: Path, tmp_path: Path) -> None:
    (source / os.fsdecode(b"caf\xe9")).write_bytes(b"")
    assert "UTF-8" in refusal(Code.ARGUMENT_INVALID, source, tmp_path / "out").why


def test_what_is_sealed_is_not_sealed_again(source: Path, tmp_path: Path) -> None:
    seal(source, tmp_path / "out")
    assert "not sealed again" in refusal(Code.ARGUMENT_INVALID, tmp_path / "out", tmp_path / "twice").why


def test_the_output_may_not_lie_in_the_source(source: Path) -> None:
    refusal(Code.ARGUMENT_INVALID, source, source / "out")
    assert not (source / "out").exists()


def test_a_file_that_changes_while_it_is_sealed_is_refused(source: Path, tmp_path: Path) -> None:
    def append(_done: int, _total: int, name: str) -> None:
        if name == "train.tsv":
            with (source / "train.tsv").open("ab") as file:
                file.write(b"more")

    with pytest.raises(CloisterError, match="changed while it was read") as caught:
        seal_directory(source, tmp_path / "out", data_key=data_key(), dataset="d", progress=append)
    assert "train.tsv" in caught.value.what
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


@pytest.mark.parametrize("arguments", [{"dataset": ""}, {"version": 0}, {"parent": b"x"}])
def test_arguments_that_no_manifest_can_hold(source: Path, tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(CloisterError) as caught:
        seal_directory(source, tmp_path / "out", **({"data_key": data_key(), "dataset": "d"} | arguments))  # type: ignore[arg-type]
    assert caught.value.code is Code.ARGUMENT_INVALID
    assert not (tmp_path / "out").exists()


def test_opening_does_not_overwrite(source: Path, tmp_path: Path) -> None:
    seal(source, tmp_path / "out")
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "train.tsv").write_text("mine")
    with pytest.raises(CloisterError) as caught:
        open_directory(tmp_path / "out", tmp_path / "back", data_key=data_key())
    assert caught.value.code is Code.FILE_EXISTS
    assert tree(tmp_path / "back") == {"train.tsv": b"mine"}


def test_opening_stops_at_a_damaged_file_and_leaves_no_part_of_it(source: Path, tmp_path: Path) -> None:
    seal(source, tmp_path / "out")
    damaged = tmp_path / "out" / "train.tsv.sealed"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CloisterError, match=r"train\.tsv"):
        open_directory(tmp_path / "out", tmp_path / "back", data_key=data_key())
    whole = {name: data for name, data in tree(tmp_path / "back").items() if not name.startswith(".cloister-")}
    assert whole.items() <= tree(source).items()
    assert "train.tsv" not in whole


def test_a_directory_can_be_asked_for_by_its_signer(source: Path, tmp_path: Path) -> None:
    owner, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    seal_directory(source, tmp_path / "signed", data_key=data_key(), dataset="d", signing_key=owner)
    seal(source, tmp_path / "unsigned")
    SealedDirectory.open(tmp_path / "signed", data_key=data_key(), signers=[did_key(other), did_key(owner)])
    for name, signers in (("signed", [did_key(other)]), ("unsigned", [did_key(owner)])):
        with pytest.raises(CloisterError, match="signed by") as caught:
            SealedDirectory.open(tmp_path / name, data_key=data_key(), signers=signers)
        assert caught.value.code is Code.MANIFEST_INVALID
