"""Class folders: which folders are classes, which files are images, and which label each class has.

Nothing is passed over without a word: what is no image, or no class, is counted and named.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mopro_fast.data.decode import looks_like_image
from mopro_fast.data.paths import Paths, shown
from mopro_fast.distributed import say
from mopro_fast.errors import UserError
from mopro_fast.files import MARKER, open_regular

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff")
EXTENSIONS += (".ppm", ".pgm")
# Of files that lie beside images by the million: they are counted, and not opened.
_OTHERS = (
    ".json",
    ".jsonl",
    ".txt",
    ".xml",
    ".csv",
    ".tsv",
    ".npy",
    ".npz",
    ".md",
    ".html",
    ".htm",
    ".yaml",
    ".yml",
    ".tar",
)
_OTHERS += (".zip", ".gz", ".parquet", ".pt", ".pth", ".pkl", ".mat", ".mp4", ".pdf", ".py", ".log", ".cls", ".caption")
# Made by file systems, servers and archives: no classes, whatever is in them.
_OF_SYSTEMS = {"lost+found", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin"}
_OF_SYSTEMS |= {"system volume information"}
_THREADS = 16  # a network file system answers each read in a millisecond


@dataclass
class PassedOver:
    """What is not taken, by kind: how many, and the first."""

    kinds: dict[str, list] = field(default_factory=dict)

    def add(self, kind: str, name: str, count: int = 1) -> None:
        self.kinds.setdefault(kind, [0, name])[0] += count

    def tell(self, source: str) -> None:
        if self.kinds:
            said = [f"{kind}: {n}, such as {shown(first)}" for kind, (n, first) in self.kinds.items()]
            say(f"{source}: not taken: {'; '.join(said)}")


def read_classes(folder: str) -> dict[str, Paths]:
    """By class folder with images, sorted by name: the images' paths from ``folder`` on, sorted by name.

    Raises a UserError where it cannot tell: a folder that cannot be read, a link to nowhere.
    """
    passed = PassedOver()
    found = {}
    for name in subfolders(folder, passed):
        images = _images(folder, name, passed)
        if images is None:
            passed.add("folders that a command of this package made", name)
        elif images:
            found[name] = Paths(f"{name}/{image}" for image in images)
        else:
            passed.add("folders without an image, which are no classes", name)
    passed.tell(folder)
    return found


def subfolders(folder: str, passed: PassedOver | None = None) -> list[str]:
    """The folders in ``folder`` that can be classes, by name."""
    passed = passed or PassedOver()
    found = []
    for entry in _entries(folder):
        try:
            is_folder = entry.is_dir()
            lost = entry.is_symlink() and not is_folder and not os.path.exists(entry.path)
        except OSError as error:
            raise UserError(
                f"cannot read {shown(entry.path)}: {error.strerror}: make it readable, or remove it"
            ) from None
        if not is_folder and entry.name.lower().endswith(EXTENSIONS):
            passed.add("images beside the class folders", entry.name)
        elif lost:
            raise UserError(f"{shown(entry.path)} is a link to nowhere: mount what it names, or remove it")
        elif is_folder and entry.name.lower() in _OF_SYSTEMS:
            passed.add("folders of the system", entry.name)
        elif is_folder and not entry.name.startswith("."):
            found.append(entry.name)
    return found


def _images(folder: str, name: str, passed: PassedOver) -> list[str] | None:
    """The images in one class folder, by name; None: the folder is this package's own.

    One whose link leads nowhere is one: that it is lost is then said.
    """
    images, unknown, inner = [], [], []
    path, entries = os.path.join(folder, name), _entries(os.path.join(folder, name))
    if _is_output({entry.name for entry in entries}):
        return None
    for entry in entries:
        known = entry.name.lower().endswith(EXTENSIONS)
        if entry.name.startswith("."):
            if known:
                passed.add("hidden files", f"{name}/{entry.name}")
        elif _is(entry, "is_dir"):
            if entry.name.lower() not in _OF_SYSTEMS:
                inner.append(entry.name)
        elif known and (_is(entry, "is_file") or entry.is_symlink()):
            images.append(entry.name)
        elif entry.name.lower().endswith(_OTHERS):
            passed.add("files that are no images", f"{name}/{entry.name}")
        elif _is(entry, "is_file"):
            unknown.append(entry.name)
        else:
            passed.add("entries that are no files", f"{name}/{entry.name}")
    with ThreadPoolExecutor(_THREADS) as pool:
        judged = pool.map(_looks_like_image, [os.path.join(path, file) for file in unknown])
        for file, is_image in zip(unknown, judged, strict=True):
            if is_image:
                images.append(file)
            else:
                passed.add("files that are no images", f"{name}/{file}")
    if inner and not images:
        raise UserError(f"{shown(path)} holds folders, not images: if these are the classes, give it")
    if inner:
        passed.add("folders inside class folders", f"{name}/{inner[0]}", len(inner))
    return sorted(images)


def _is_output(names: set[str]) -> bool:
    """Whether a folder with these entries was made by a command of this package: runs and packs may lie in the data."""
    return bool({MARKER, ".packing.json"} & names) or any(
        both <= names for both in ({"manifest.json", "records"}, {"config.json", "checkpoints"})
    )


def _is(entry: os.DirEntry, kind: str) -> bool:
    try:
        return getattr(entry, kind)()
    except OSError:  # a link to itself, or into a folder that cannot be read
        return False


def _looks_like_image(path: str) -> bool:
    try:
        with open_regular(path) as file:
            return looks_like_image(file.read(32))
    except OSError:
        return False


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {shown(folder)}: {error.strerror}: make it readable") from None


def class_numbers(folders: Sequence[str], known: Sequence[str] | None, source: str) -> dict[str, int]:
    """The labels of class folders; a folder that is none of the known classes has none.

    known: the names of the classes in the order of their labels, of the data or the model that these are to agree
    with. Folders that are all called by numbers are these labels. Without ``known`` others are numbered by name.
    Raises a UserError where a folder that is called a number would get another one.
    """
    numbers = {name: int(name) for name in folders if is_number(name)}
    if known is not None:
        place = {name: label for label, name in enumerate(known)}
        labels = {name: place[name] for name in folders if name in place}
        agree = all(int(name) == label for name, label in place.items() if is_number(name))
        return numbers | labels if agree and len(numbers) == len(folders) else labels
    if len(numbers) < len(folders):
        labels = {name: label for label, name in enumerate(sorted(folders))}
        for name, number in numbers.items():
            if labels[name] != number:
                raise UserError(
                    f"{source}: class folder {name} would have the label {labels[name]}, since other class folders are "
                    "not called by numbers: rename it, or give a list file"
                )
        return labels
    of_number: dict[int, str] = {}
    for name, number in numbers.items():
        if of_number.setdefault(number, name) != name:
            raise UserError(f"{source}: class folders {of_number[number]} and {name} are the same number: rename one")
    return numbers


def is_number(name: str) -> bool:
    """Whether a class folder is called by a label."""
    return name.isascii() and name.isdigit() and len(name) <= 18
