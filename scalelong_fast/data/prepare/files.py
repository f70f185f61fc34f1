"""Images in a local folder, or in a zip or tar archive, which is read in place."""

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scalelong_fast.data.prepare.progress import counting
from scalelong_fast.data.prepare.source import (
    Source,
    classes_of,
    fingerprint,
    is_hidden,
    is_image,
    without_common_folder,
)
from scalelong_fast.errors import UserError, invalid

ARCHIVES = (".zip", ".tar")


def list_files(path: Path, progress: bool = False) -> list[str]:
    """All files below a folder but hidden ones, as paths with ``/`` below it, in no order.

    Raises:
        UserError: a folder cannot be listed.
    """
    found: list[str] = []

    def give_up(error: OSError) -> None:  # os.walk would leave out a folder that it cannot list, and so a class
        raise error

    try:
        with counting("Listing the source", "files", progress) as tick:
            for parent, folders, names in os.walk(path, onerror=give_up, followlinks=True):
                folders[:] = [name for name in folders if not is_hidden(name)]
                below = Path(parent).relative_to(path)
                found += [(below / name).as_posix() for name in names if not is_hidden(name)]
                tick(len(names))
    except OSError as error:
        raise _unlistable(path, error) from error
    return found


def open_folder(path: Path, files: Sequence[str] | None = None, progress: bool = False) -> Source:
    """All images below a folder, sorted by their path; its subfolders that hold images are the classes.

    Args:
        path: the folder.
        files: of :func:`list_files`, where it was called already.
        progress: show how far it is.

    Raises:
        UserError: there are no images, they lie beside class folders, or a file cannot be looked at.
    """
    names = sorted(filter(is_image, list_files(path, progress) if files is None else files))
    listed = []
    try:
        with counting("Looking at sizes", "images", progress, total=len(names)) as tick:
            for name in names:
                listed.append((name, os.stat(path / name).st_size))
                tick(1)
    except OSError as error:
        raise _unlistable(path, error) from error
    return _source(path, "folder", listed, lambda name: (path / name).read_bytes(), common=False)


def _unlistable(path: Path, error: OSError) -> UserError:
    return UserError(f"--source: {str(path)!r} cannot be looked through ({error}). Mend or remove that.")


def open_archive(path: Path, progress: bool = False) -> Source:
    """All images in an archive, sorted by their path; the folders in it, or archives in a tar, are the classes.

    The folders that all images lie in do not count, so ``img_align_celeba/000001.jpg`` is unlabelled.

    Args:
        path: of the .zip or .tar.
        progress: show how far the listing of a tar is.

    Raises:
        UserError: the archive is damaged, compressed as a whole, or holds no images.
    """
    try:
        # A tar whose last file is a zip looks like one from behind.
        zipped = path.suffix == ".zip" or (path.suffix != ".tar" and zipfile.is_zipfile(path))
        return _open_zip(path) if zipped else _open_tar(path, progress)
    except UserError:
        raise
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"--source: the archive {str(path)!r} cannot be read ({type(error).__name__}: {error}). Download it again."
        ) from error


def _open_zip(path: Path) -> Source:
    archive = zipfile.ZipFile(path)
    members = {info.filename: info for info in archive.infolist() if is_image(info.filename)}
    listed = sorted((name, info.CRC) for name, info in members.items())
    return _source(path, "zip", listed, lambda name: archive.read(members[name]))


def _open_tar(path: Path, progress: bool) -> Source:
    if path.suffix != ".tar":
        raise invalid(
            "--source", str(path), "a folder, a .zip or an uncompressed .tar", "Unpack it, e.g. with tar -xf or gunzip."
        )
    members: dict[str, tuple[int, int]] = {}
    with open(path, "rb") as file, counting("Listing the source", "files", progress) as tick:
        _list_tar(file, "", members, tick)
    handle = os.open(path, os.O_RDONLY)

    def read(name: str) -> bytes:
        offset, size = members[name]
        return os.pread(handle, size, offset)

    return _source(path, "tar", sorted((name, size) for name, (_, size) in members.items()), read)


def _list_tar(file: object, prefix: str, members: dict[str, tuple[int, int]], tick: Callable[[int], None]) -> None:
    """Offset and size in ``file`` of every image in it, archives in the archive included (ImageNet's is such a one)."""
    with tarfile.open(fileobj=file, mode="r:") as archive:  # type: ignore[call-overload]
        inner = []
        for member in archive:
            tick(1)
            name = prefix + member.name.removeprefix("./")
            if member.isfile() and is_image(name):
                members[name] = (member.offset_data, member.size)
            elif member.isfile() and name.endswith(".tar") and not is_hidden(name):
                inner.append((name.removesuffix(".tar") + "/", member))
        for name, member in inner:
            part = archive.extractfile(member)
            assert part is not None
            below: dict[str, tuple[int, int]] = {}
            _list_tar(part, name, below, tick)
            members.update({key: (member.offset_data + offset, size) for key, (offset, size) in below.items()})


def _source(
    path: Path, kind: str, listed: list[tuple[str, int]], read: Callable[[str], bytes], common: bool = True
) -> Source:
    if not listed:
        raise invalid("--source", str(path), f"a {kind} that holds images (jpeg, png, webp, bmp)")
    names = [name for name, _ in listed]
    class_names, labels = classes_of(without_common_folder(names) if common else names, str(path))
    facts = {"kind": kind, "path": str(path), "images": len(names), "fingerprint": fingerprint(listed)}
    marks = [mark for _, mark in listed]
    return Source(names, lambda index: read(names[index]), labels, class_names, None, facts, marks)


def parents(name: str) -> Iterator[str]:
    """A path with ``/`` and each of its ends: ``a/b/c``, ``b/c``, ``c``."""
    while True:
        yield name
        if "/" not in name:
            return
        name = name.split("/", 1)[1]
