"""The file of decoded arrays: read when it is right, rebuilt when it is not, never half written."""

import errno
import json
import os
import shutil
import stat
from collections import namedtuple

import numpy as np
import pytest
from safetensors import SafetensorError

from adalfl_jax import data
from adalfl_jax.data import DatasetError, cache, images
from adalfl_jax.data.cache import cached
from tests.data.prepared import encode_example, encode_image, shard_file, write_dataset, write_records
from tests.training.tiny import snapshot

ARRAYS = {
    "inputs": np.random.default_rng(0).integers(0, 256, (30, 4, 4, 1), np.uint8),
    "targets": np.arange(30, dtype=np.int32),
}


@pytest.fixture
def file(tmp_path):
    """A good cache file of ARRAYS."""
    path = tmp_path / "arrays.safetensors"
    assert_same(cached(path, "one", lambda: ARRAYS), ARRAYS)
    return path


def test_a_digest_knows_names_types_shapes_and_values():
    zeros = np.zeros(4, np.float32)
    others = [{"b": zeros}, {"a": zeros.astype(np.int32)}, {"a": zeros.reshape(2, 2)}, {"a": zeros + 1}]
    assert len({cache.digest_of_arrays(arrays) for arrays in ({"a": zeros}, *others)}) == 5


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def must_not_build():
    raise AssertionError("what is in the file was built anew")


def load(tmp_path, **settings):
    dataset = data.load("cifar10", data_dir=tmp_path / "data", **settings)
    return [np.asarray(array) for split in (dataset.train, dataset.valid, dataset.test) for array in split]


def assert_all_equal(left, right):
    for ours, theirs in zip(left, right, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_second_call_reads_the_file(file):
    assert_same(cached(file, "one", must_not_build), ARRAYS)


def test_arrays_of_any_layout_are_kept(tmp_path):
    strided = {"inputs": ARRAYS["inputs"][::2].transpose(0, 2, 1, 3), "targets": ARRAYS["targets"][:0]}
    for build in (lambda: strided, must_not_build):
        assert_same(cached(tmp_path / "file", "one", build), strided)


def test_a_second_load_decodes_nothing(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data")
    first = load(tmp_path)
    monkeypatch.setattr(images, "_decode", must_not_build)
    before = snapshot(tmp_path)
    assert_all_equal(load(tmp_path), first)
    assert snapshot(tmp_path) == before


def test_another_source_is_decoded_anew_without_a_warning(tmp_path):
    write_dataset(tmp_path / "data")
    first = load(tmp_path)
    file = shard_file(tmp_path / "data")
    size = file.stat().st_size
    shutil.copytree(tmp_path / "data", tmp_path / "old")
    shutil.rmtree(tmp_path / "data")
    write_dataset(tmp_path / "data", seed=1)
    shutil.copy(cache_file(tmp_path / "old"), cache_file(tmp_path / "data"))
    assert file.stat().st_size == size  # ArrayRecord pads, so the size alone does not tell
    second = load(tmp_path)
    assert not np.array_equal(first[0], second[0])
    cache_file(tmp_path / "data").unlink()
    assert_all_equal(load(tmp_path), second)


def test_records_in_another_order_are_decoded_anew(tmp_path):
    written = write_dataset(tmp_path / "data", splits={"train": 40, "test": 200}, shape=(16, 16, 3))
    first, file = load(tmp_path), shard_file(tmp_path / "data", split="test")
    size = file.stat().st_size
    order = [*range(100), *range(199, 99, -1)]  # the file begins as it did
    records = [
        encode_example({"image": encode_image(written["test"][0][row]), "label": int(written["test"][1][row])})
        for row in order
    ]
    write_records(file, records)
    assert file.stat().st_size == size
    np.testing.assert_array_equal(load(tmp_path)[5], first[5][order])


def test_another_fingerprint_is_built_anew(file):
    other = {"inputs": ARRAYS["inputs"] + np.uint8(1)}
    assert_same(cached(file, "two", lambda: other), other)
    assert_same(cached(file, "two", must_not_build), other)


def cache_file(data_dir):
    return data_dir / "cifar10" / "1.0.0" / "adalfl_jax.safetensors"


def header_size(content):
    """Bytes before the arrays: the header's length, and the header."""
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("harm", ["empty", "cut", "cut in the header", "zeroed", "text", "longer"])
def test_a_damaged_file_is_named_and_built_anew(harm, file):
    content = file.read_bytes()
    spoilt = {
        "empty": b"",
        "cut": content[:-1],
        "cut in the header": content[:30],
        "zeroed": bytes(len(content)),
        "text": b"not an array",
        "longer": content + b"\0",
    }
    file.write_bytes(spoilt[harm])
    with pytest.warns(UserWarning, match=rf"{file} is damaged and is built anew"):
        assert_same(cached(file, "one", lambda: ARRAYS), ARRAYS)
    assert_same(cached(file, "one", must_not_build), ARRAYS)


def test_any_flipped_byte_of_the_arrays_is_noticed(file):
    content = file.read_bytes()
    for position in range(header_size(content), len(content), 7):
        file.write_bytes(flip(content, position))
        with pytest.warns(UserWarning, match="its checksum is not that of its contents"):
            assert_same(cached(file, "one", lambda: ARRAYS), ARRAYS)


@pytest.mark.filterwarnings("ignore:.*is damaged and is built anew")
@pytest.mark.parametrize("mask", [0x01, *(pytest.param(mask, marks=pytest.mark.slow) for mask in (0x20, 0xFF))])
def test_any_flipped_byte_of_the_header_gives_the_right_arrays(mask, file):
    content = file.read_bytes()
    for position in range(header_size(content)):
        file.write_bytes(flip(content, position, mask))
        assert_same(cached(file, "one", lambda: ARRAYS), ARRAYS)


def test_a_flipped_byte_of_the_checksum_is_noticed(file):
    content = file.read_bytes()
    position = content.index(b'"sha256"') + len(b'"sha256":"')
    file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    with pytest.warns(UserWarning, match=f"{file} is damaged"):
        assert_same(cached(file, "one", lambda: ARRAYS), ARRAYS)


def flip(content, position, mask=0xFF):
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


def test_a_damaged_file_of_a_dataset_is_decoded_anew(tmp_path):
    write_dataset(tmp_path / "data")
    first = load(tmp_path)
    file = cache_file(tmp_path / "data")
    file.write_bytes(flip(file.read_bytes(), -100 + file.stat().st_size))
    with pytest.warns(UserWarning, match=f"{file} is damaged"):
        assert_all_equal(load(tmp_path), first)


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path):
    (tmp_path / "arrays.safetensors").mkdir()
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(DatasetError, match=r"arrays\.safetensors cannot be"),
    ):
        cached(tmp_path / "arrays.safetensors", "one", lambda: ARRAYS)


def test_cache_dir_takes_the_file_and_the_data_are_left_alone(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data")
    before = snapshot(tmp_path / "data")
    first = load(tmp_path, cache_dir=tmp_path / "deep" / "cache")
    assert snapshot(tmp_path / "data") == before
    assert [path.name for path in (tmp_path / "deep" / "cache").iterdir()] == ["cifar10-1.0.0.safetensors"]
    monkeypatch.setattr(images, "_decode", must_not_build)
    assert_all_equal(load(tmp_path, cache_dir=str(tmp_path / "deep" / "cache")), first)


def test_data_that_cannot_be_written_beside_are_read_with_a_cache_dir(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data")
    refuse_writes_below(tmp_path / "data", monkeypatch)
    with pytest.raises(DatasetError, match=r"cannot be written .*; set dataset\.cache_dir") as caught:
        load(tmp_path)
    assert str(cache_file(tmp_path / "data")) in str(caught.value)
    assert len(load(tmp_path, cache_dir=tmp_path / "cache")) == 6


def refuse_writes_below(folder, monkeypatch):
    """As permissions do, but to root too."""
    folder.chmod(0o555)
    write = cache.save_file

    def save_file(arrays, path, **options):
        if path.is_relative_to(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        write(arrays, path, **options)

    monkeypatch.setattr(cache, "save_file", save_file)


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_decoded(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(images, "_decode", must_not_build)
    with pytest.raises(
        DatasetError, match=r"cifar10-1\.0\.0\.safetensors cannot be written .*; set dataset\.cache_dir"
    ):
        load(tmp_path, cache_dir=tmp_path / "file")


def test_a_file_the_disk_has_no_room_for_is_not_begun(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data")
    before = snapshot(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5000))
    monkeypatch.setattr(cache, "save_file", must_not_build)
    with pytest.raises(DatasetError) as caught:
        load(tmp_path)
    # 160 images of 192 bytes and labels of 4, and 64 KiB for the header
    assert f"{cache_file(tmp_path / 'data')} needs 0.1 MB and its disk has 0.0 MB left" in str(caught.value)
    assert "set dataset.cache_dir" in str(caught.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("Error while serializing: I/O error")],
)
@pytest.mark.parametrize("begins", [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(begins, error, file, monkeypatch):
    before = snapshot(file.parent)

    def fail(arrays, path, metadata):
        if begins:
            path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(cache, "save_file", fail)
    with pytest.raises(DatasetError) as caught:
        cached(file, "two", lambda: ARRAYS)
    text = str(caught.value)
    assert text.startswith(f"{file} cannot be written ({error})")
    assert "dataset.cache_dir" in text
    assert snapshot(file.parent) == before
    monkeypatch.undo()
    assert_same(cached(file, "one", must_not_build), ARRAYS)


def test_an_interrupt_leaves_no_half_written_file(file, monkeypatch):
    before = snapshot(file.parent)

    def interrupt(arrays, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached(file, "two", lambda: ARRAYS)
    assert snapshot(file.parent) == before


def test_an_error_of_the_build_leaves_the_old_file(file):
    before = snapshot(file.parent)
    with pytest.raises(AssertionError, match="built anew"):
        cached(file, "two", must_not_build)
    assert snapshot(file.parent) == before


def test_each_image_size_has_a_file_of_its_own(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", shape=(12, 10, 3))
    sizes = (0, 4, 8)
    loaded = {size: load(tmp_path, image_size=size) for size in sizes}
    names = sorted(path.name for path in cache_file(tmp_path / "data").parent.glob("*.safetensors"))
    assert names == ["adalfl_jax.safetensors", "adalfl_jax_4.safetensors", "adalfl_jax_8.safetensors"]
    monkeypatch.setattr(images, "_decode", must_not_build)
    for size in sizes:
        assert loaded[size][0].shape[1:] == ((size, size, 3) if size else (12, 10, 3))
        assert_all_equal(load(tmp_path, image_size=size), loaded[size])


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_everyone_may_read_the_file_and_its_owner_may_write_it(umask, tmp_path):
    old = os.umask(umask)
    try:
        cached(tmp_path / "file", "one", lambda: ARRAYS)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_the_file_is_plain_safetensors_with_its_fingerprint(file):
    content = file.read_bytes()
    header = json.loads(content[8 : header_size(content)])
    assert header["__metadata__"]["fingerprint"] == "one"
    assert header["inputs"]["shape"] == [30, 4, 4, 1]
