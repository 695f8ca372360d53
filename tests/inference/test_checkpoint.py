"""Export directories: whole or absent, and every damage to a file gives one line."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from draftsmith.inference import checkpoint
from draftsmith.inference.checkpoint import write_export
from draftsmith.inference.errors import InvalidState, InvalidValue
from tests import tiny


def writes(**files: str) -> Callable[[Path], None]:
    def writer(directory: Path) -> None:
        for name, text in files.items():
            (directory / f"{name}.json").write_text(text)

    return writer


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def refused(call: Callable[[], object], *said: str, kind: type[Exception] = InvalidValue) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in said:
        assert part in message
    return message


class TestWriteExport:
    def test_appears_whole_and_leaves_nothing_beside_it(self, tmp_path: Path) -> None:
        seen: list[Path] = []

        def writer(directory: Path) -> None:
            seen.append(directory)
            assert not (tmp_path / "deep" / "out").exists()
            assert directory.parent == tmp_path / "deep"  # same file system: the rename is atomic
            assert directory.stat().st_mode & 0o077 == 0  # private until it is finished
            (directory / "sub").mkdir()
            (directory / "sub" / "a.txt").write_text("a")

        write_export(tmp_path / "deep" / "out", writer)
        assert names(tmp_path / "deep") == ["out"]
        assert (tmp_path / "deep" / "out" / "sub" / "a.txt").read_text() == "a"
        assert (tmp_path / "deep" / "out").stat().st_mode & 0o700 == 0o700
        assert checkpoint.is_unfinished(seen[0]) and not checkpoint.is_unfinished(tmp_path / "deep" / "out")

    def test_into_an_empty_directory(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        write_export(tmp_path / "out", writes(config="{}"))
        assert names(tmp_path / "out") == ["config.json"]

    def test_a_filled_directory_is_refused_before_any_work(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("old")
        worked: list[Path] = []
        refused(lambda: write_export(tmp_path / "out", worked.append), "is not empty", "--overwrite", str(tmp_path))
        assert not worked and (tmp_path / "out" / "config.json").read_text() == "old"

    @pytest.mark.parametrize("exchange", [True, False], ids=["exchanged in one step", "file systems without that call"])
    def test_overwrite_replaces_an_export(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
    ) -> None:
        if not exchange:
            monkeypatch.setattr(checkpoint, "_exchange", lambda a, b: False)
        write_export(tmp_path / "out", writes(config="old", only_old="x"))
        write_export(tmp_path / "out", writes(config="new"), overwrite=True)
        assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["config.json"]
        assert (tmp_path / "out" / "config.json").read_text() == "new"

    def test_overwrite_replaces_a_folder_of_several_drafts(self, tmp_path: Path) -> None:
        write_export(tmp_path / "out", writes(router="old"))
        write_export(tmp_path / "out", writes(router="new"), overwrite=True)
        assert (tmp_path / "out" / "router.json").read_text() == "new"

    def test_overwrite_never_replaces_what_is_not_an_export(self, tmp_path: Path) -> None:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").write_text("years of work")
        refused(lambda: write_export(tmp_path / "home", writes(config="{}"), overwrite=True), "replaces only an export")
        assert names(tmp_path / "home") == ["thesis.tex"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_file_or_a_link_in_the_way(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "file").write_text("x")
        (tmp_path / "link").symlink_to(tmp_path)
        for name in ("file", "link"):
            refused(lambda n=name: write_export(tmp_path / n, writes(), overwrite=overwrite), "is not a directory")  # type: ignore[misc]  # mypy cannot type a lambda default
        assert names(tmp_path) == ["file", "link"]

    @pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), InvalidValue("bad")])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_whatever_is_raised_leaves_the_destination_as_it_was(
        self, tmp_path: Path, error: BaseException, overwrite: bool
    ) -> None:
        if overwrite:
            write_export(tmp_path / "out", writes(config="old"))

        def writer(directory: Path) -> None:
            (directory / "config.json").write_text("half")
            raise error

        with pytest.raises(type(error)):
            write_export(tmp_path / "out", writer, overwrite=overwrite)
        assert names(tmp_path) == (["out"] if overwrite else [])
        assert not overwrite or (tmp_path / "out" / "config.json").read_text() == "old"

    @pytest.mark.parametrize("call", ["fsync", "rename"])
    def test_disk_full_in_the_middle(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, call, full)
        refused(lambda: write_export(tmp_path / "out", writes(config="{}")), "disk is full", kind=InvalidState)
        assert names(tmp_path) == []

    def test_another_error_of_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(os, "fsync", denied)
        refused(lambda: write_export(tmp_path / "out", writes(a="")), "Read-only file system", kind=InvalidState)

    def test_a_disk_that_is_really_full(self, tmp_path: Path) -> None:
        mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root")
        try:
            tensors = {"a": torch.zeros(200_000)}
            refused(
                lambda: write_export(tmp_path / "out", lambda d: save_file(tensors, d / "model.safetensors")),
                "disk is full",
                kind=InvalidState,
            )
            assert names(tmp_path) == []
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    def test_somebody_fills_the_destination_meanwhile(self, tmp_path: Path) -> None:
        def writer(directory: Path) -> None:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("x")

        refused(lambda: write_export(tmp_path / "out", writer), "cannot write", kind=InvalidState)
        assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


def killed_while_writing(out: Path) -> Path:
    """kill -9 in the middle of an export to `out`; returns what it left."""
    program = f"""
        import os, signal, time
        from pathlib import Path
        from draftsmith.inference.checkpoint import write_export
        def writer(directory):
            (directory / "config.json").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
        write_export(Path({str(out)!r}), writer)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (left,) = [p for p in out.parent.iterdir() if p.name.startswith(".")]
    return left


class TestKilled:
    def test_leaves_nothing_under_the_name_and_the_rest_is_swept_by_the_next_export(self, tmp_path: Path) -> None:
        left = killed_while_writing(tmp_path / "out")
        assert not (tmp_path / "out").exists() and checkpoint.is_unfinished(left)
        write_export(tmp_path / "out", writes(config="{}"))
        assert left.exists()  # too young: it might belong to an export that has not locked it yet
        os.utime(left, (time.time() - 3600,) * 2)
        write_export(tmp_path / "other", writes(config="{}"))
        write_export(tmp_path / "out.2", writes(config="{}"))
        assert left.exists()  # only an export to the same name removes it
        write_export(tmp_path / "out", writes(config="{}"), overwrite=True)
        assert names(tmp_path) == ["other", "out", "out.2"]

    def test_a_running_export_is_not_swept(self, tmp_path: Path) -> None:
        def outer(directory: Path) -> None:
            os.utime(directory, (time.time() - 3600,) * 2)
            write_export(tmp_path / "out", writes(config="inner"))
            assert directory.exists()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_export(tmp_path / "out", outer)
        assert names(tmp_path) == ["out"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny.write_lm(tmp_path_factory.mktemp("lm"), width=8, vocab_size=300)
    tiny.add_manifest(directory)
    return directory


class TestVerifyFiles:
    @pytest.fixture
    def copy(self, export: Path, tmp_path: Path) -> Path:
        for path in export.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    def verify(self, directory: Path, hashes: bool = True) -> None:
        from draftsmith.inference import manifest as manifests

        found = manifests.read(directory)
        assert found is not None
        checkpoint.verify_files(directory, found, hashes=hashes)

    def test_intact(self, copy: Path) -> None:
        self.verify(copy)
        (copy / "README.md").write_text("a file that nobody loads")
        self.verify(copy)

    @given(st.data())
    def test_any_truncation_or_flipped_bit_is_found(self, export: Path, data: st.DataObject) -> None:
        path = export / "model.safetensors"
        whole = path.read_bytes()
        broken = bytearray(whole)
        if data.draw(st.booleans(), label="truncate"):
            del broken[data.draw(st.integers(0, len(whole) - 1), label="length") :]
        else:
            broken[data.draw(st.integers(0, len(whole) - 1), label="byte")] ^= 1 << data.draw(st.integers(0, 7), "bit")
        expected = checkpoint.sha256(path)
        try:
            path.write_bytes(broken)
            found = checkpoint.sha256(path)
            refused(lambda: self.verify(export), str(path), expected, found)
        finally:
            path.write_bytes(whole)

    def test_the_fast_path_sees_sizes_only(self, copy: Path) -> None:
        path = copy / "model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        self.verify(copy, hashes=False)
        path.write_bytes(whole[:-1])
        refused(lambda: self.verify(copy, hashes=False), str(path), "expected sha256", f"({len(whole) - 1} bytes)")

    def test_missing_file(self, copy: Path) -> None:
        (copy / "tokenizer.json").unlink()
        refused(lambda: self.verify(copy), "tokenizer.json is missing")

    def test_weights_that_nobody_vouches_for(self, copy: Path) -> None:
        save_file({"a": torch.zeros(1)}, copy / "extra.safetensors")
        refused(lambda: self.verify(copy), "extra.safetensors", "does not list")


class TestWeightFiles:
    def test_headers_say_what_safetensors_says(self, export: Path) -> None:
        (path,) = checkpoint.weight_files(export)
        tensors = load_file(path)
        header = checkpoint.read_header(path)
        assert {n: t.shape for n, t in header.items()} == {n: tuple(x.shape) for n, x in tensors.items()}
        raw = path.read_bytes()
        name = "model.norm.weight"
        stored = torch.frombuffer(bytearray(raw[header[name].start : header[name].end]), dtype=torch.float32)
        assert torch.equal(stored, tensors[name])

    @given(st.data())
    def test_any_truncation_is_found_without_hashes(self, export: Path, data: st.DataObject) -> None:
        path = export / "model.safetensors"
        whole = path.read_bytes()
        try:
            path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
            refused(lambda: checkpoint.weight_files(export), str(path), "copy")
        finally:
            path.write_bytes(whole)

    @given(st.data())
    def test_a_header_with_a_flipped_bit_is_refused_or_still_fits_the_file(
        self, export: Path, data: st.DataObject
    ) -> None:
        path = export / "model.safetensors"
        whole = path.read_bytes()
        broken = bytearray(whole)
        length = int.from_bytes(whole[:8], "little")
        broken[data.draw(st.integers(0, 8 + length - 1))] ^= 1 << data.draw(st.integers(0, 7))
        try:
            path.write_bytes(broken)
            try:
                header = checkpoint.read_header(path)
            except InvalidValue as error:
                assert str(path) in str(error) and len(str(error).splitlines()) == 1
            else:
                assert max(t.end for t in header.values()) == len(whole)
        finally:
            path.write_bytes(whole)

    def test_shards(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
        save_file({"b": torch.zeros(2)}, tmp_path / "model-2.safetensors")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
        assert [p.name for p in checkpoint.weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
        (tmp_path / "model-2.safetensors").unlink()
        refused(lambda: checkpoint.weight_files(tmp_path), "model-2.safetensors is missing")
        for bad, said in (('{"weight_map": {}}', "no weight_map"), ("{", "not valid JSON"), ("[]", "JSON object")):
            index.write_text(bad)
            refused(lambda: checkpoint.weight_files(tmp_path), said)
        index.write_text('{"weight_map": {"a": "../x.safetensors"}}')
        refused(lambda: checkpoint.weight_files(tmp_path), "is missing")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "consolidated.00.pth"])
    def test_pickled_weights(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
        refused(lambda: checkpoint.weight_files(tmp_path), name, "pickle", "safetensors")

    def test_a_pickle_beside_safetensors_is_not_read(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
        (tmp_path / "training_args.bin").write_bytes(b"anything")
        assert len(checkpoint.weight_files(tmp_path)) == 1

    def test_no_weights(self, tmp_path: Path) -> None:
        refused(lambda: checkpoint.weight_files(tmp_path), "model.safetensors")
