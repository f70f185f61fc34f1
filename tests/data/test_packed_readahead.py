"""What is read next is announced, page by page, and nothing else changes."""

import mmap

import pytest
import torch

from scalelong_fast.data.packed import PackedSet, readahead


@pytest.fixture
def calls(monkeypatch):
    """What the C library would be told."""
    made = []
    monkeypatch.setattr(readahead, "_madvise", lambda: lambda *call: made.append(call))
    return made


def test_the_pages_of_each_row_are_announced_before_they_are_copied(pack_images, calls):
    packed = pack_images(count=400, shard_size=300)
    dataset = PackedSet(packed.path)
    chosen = [399, 0, 299]
    assert torch.equal(dataset.fetch(torch.tensor(chosen)).images, packed.images[chosen])
    assert len(calls) == 3
    for (start, length, advice), index in zip(calls, chosen, strict=True):
        address = dataset._rows["images"][index // 300][index % 300].data_ptr()
        assert start % mmap.PAGESIZE == 0
        assert address - mmap.PAGESIZE < start <= address
        assert start + length == address + 48
        assert advice == mmap.MADV_WILLNEED


def test_every_field_is_announced(pack_text, calls):
    PackedSet(pack_text().path).fetch(torch.tensor([0, 4]))
    assert len(calls) == 4


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="the platform cannot be told")
def test_the_c_library_takes_it(pack_images):
    dataset = PackedSet(pack_images().path)
    start = dataset._rows["images"][0].data_ptr()
    assert readahead._madvise()(start - start % mmap.PAGESIZE, 100, mmap.MADV_WILLNEED) == 0


def test_a_platform_that_cannot_be_told(pack_images, monkeypatch):
    monkeypatch.setattr(readahead, "_madvise", lambda: None)
    packed = pack_images()
    assert torch.equal(PackedSet(packed.path).fetch(torch.arange(10)).images, packed.images)
