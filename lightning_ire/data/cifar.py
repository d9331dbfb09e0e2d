"""CIFAR-10 and CIFAR-100 in their Python format."""

from __future__ import annotations

import errno
import hashlib
import operator
import os
import pickle
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from lightning_ire._checks import ConfigurationError
from lightning_ire.data._text_sources import in_one_line
from lightning_ire.data.image_data import ImageData
from lightning_ire.data.transforms import torchvision, torchvision_v2

__all__ = ["CIFAR10", "CIFAR100"]


class _CIFAR(ImageData):
    """Images of 32 x 32 pixels; see the subclasses."""

    _source_name: ClassVar[str]

    def __init__(
        self,
        root: str | Path = "data",
        global_batch_size: int = 128,
        download: bool = False,
        verify: bool = True,
        **settings: Any,
    ) -> None:
        """Check the settings; nothing is read yet.

        Args:
            root: Folder that holds the unpacked archive's folder, or will hold it.
            global_batch_size: Images per optimizer step, over all devices and micro-batches.
            download: Whether to download the data if it is not there.
            verify: Whether the files must have the checksums of the original. Switch it off for data of your own in
                the same format: other labels, a part of the images. Files are pickles; nothing in them is executed.
            settings: The other settings of :class:`ImageData`.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        super().__init__(root=root, global_batch_size=global_batch_size, **settings)
        self.download = download
        self.verify = verify

    def prepare_data(self) -> None:
        """Download the data if asked to and if it is not there; Lightning calls this in one process per machine.

        It is downloaded and unpacked in a folder of another name beside its place, checked, and renamed. What was
        interrupted is never seen as data; a folder that is there already is not touched.

        Raises:
            ConfigurationError: If the download fails, or a folder is there that is not whole.
        """
        if not self.download or self._fault() is None:
            return
        if self._folder.exists():
            raise ConfigurationError(f"{self._fault()} Move {self._folder} away to download it again.")
        source = self._source
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.root, prefix=".download-") as place:
                source(place, download=True)
                os.replace(Path(place) / source.base_folder, self._folder)
        except (OSError, RuntimeError) as error:
            if self._fault() is None:  # another process was faster
                return
            raise ConfigurationError(_download_error(error, source.url, self.root)) from error

    def read(self, part: Literal["train", "test"]) -> Dataset:
        """Read one part into memory.

        Args:
            part: Which part.

        Raises:
            ConfigurationError: If files are missing, broken or not the original ones.
        """
        if fault := self._fault():
            raise ConfigurationError(fault)
        files = self._source.train_list if part == "train" else self._source.test_list
        images, labels = zip(*(self._read(self._folder / name) for name, _ in files), strict=True)
        return _InMemory(np.concatenate(images), [label for some in labels for label in some])

    def geometry(self, training: bool) -> list[nn.Module]:
        """Crop with 4 pixels of black padding and flip, or nothing.

        Args:
            training: Whether these are wanted.
        """
        v2 = torchvision_v2()
        return [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if training else []

    def autoaugment_policy(self) -> Any:
        """The policy found on CIFAR-10, used for both datasets."""
        return torchvision_v2().AutoAugmentPolicy.CIFAR10

    @property
    def _folder(self) -> Path:
        return self.root / self._source.base_folder

    @property
    def _source(self) -> Any:
        """Torchvision's class, which knows the names of the files, their checksums and the download."""
        return getattr(torchvision("datasets"), self._source_name)

    def _read(self, path: Path) -> tuple[np.ndarray, list[int]]:
        """The images [N, 32, 32, 3] and labels of a file."""
        assert self.num_classes is not None
        try:
            with path.open("rb") as file:
                entry = _Arrays(file, encoding="latin1").load()
            data, labels = entry["data"], entry["labels" if "labels" in entry else "fine_labels"]
            if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
                raise ValueError(f"`data` is no array of uint8 but {getattr(data, 'dtype', type(data).__name__)}")
            if data.ndim != 2 or data.shape[1] != 3072:
                raise ValueError(f"`data` has the shape {list(data.shape)} in place of [N, 3072]: planes of 32 x 32")
            images = np.asarray(data).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            labels = list(map(operator.index, labels))
            if len(images) != len(labels) or not set(labels) <= set(range(self.num_classes)):
                raise ValueError(f"not each of {len(images)} images has a label in [0, {self.num_classes})")
        except Exception as error:  # no one class: a damaged pickle may ask for any operation on any value
            raise ConfigurationError(
                f"Expected `root` to hold {self._source_name} in Python format, got a file in {self._folder} that "
                f"cannot be read ({type(error).__name__}: {in_one_line(error)}): {path.name}."
            ) from error
        return images, labels

    def _fault(self) -> str | None:
        """What is wrong with the files; `None`: nothing."""
        from torchvision.datasets.utils import check_integrity

        source = self._source
        files = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        names = ", ".join(name for name, _ in files)
        if not self._folder.is_dir():
            return (
                f"Expected `root` to be a folder that holds {source.base_folder}/ with {names}, got {self.root}: "
                "change `root`, or set `download` to true."
            )
        missing = [name for name, _ in files if not (self._folder / name).is_file()]
        if missing:
            return f"Expected {self._folder} to hold {names}, got a folder without {', '.join(missing)}."
        for name, checksum in files:
            if self.verify and not check_integrity(str(self._folder / name), checksum):
                return (
                    f"Expected {self._folder / name} to have the MD5 checksum {checksum}, got another one: the file is "
                    "damaged (data of your own: set `verify` to false)."
                )
        return None


class CIFAR10(_CIFAR):
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes (Krizhevsky, 2009).

    On disk: `root/cifar-10-batches-py/` with `data_batch_1` to `_5`, `test_batch` and `batches.meta`. Batches, split,
    mixing and what validation means: see :class:`ImageData`.

    Images are float32 [3, 32, 32], standardised with the mean and the standard deviation of the training pixels.

    Attributes:
        num_classes: 10.
    """

    num_classes: int | None = 10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    _source_name = "CIFAR10"


class CIFAR100(_CIFAR):
    """CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 pixels in 100 classes (Krizhevsky, 2009).

    On disk: `root/cifar-100-python/` with `train`, `test` and `meta`. Batches, split, mixing and what validation means:
    see :class:`ImageData`.

    Images are float32 [3, 32, 32], standardised with the mean and the standard deviation of the training pixels.

    Attributes:
        num_classes: 100.
    """

    num_classes: int | None = 100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    _source_name = "CIFAR100"


class _InMemory(Dataset):
    """Images [N, 32, 32, 3] and their labels."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Of all pixels and labels."""
        digest = hashlib.blake2b(np.asarray(self.labels, dtype="<i8").tobytes(), digest_size=8)
        for image in self.images:
            digest.update(image.tobytes())
        return f"checksum {digest.hexdigest()} of pixels and labels"

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.fromarray(self.images[index]), self.labels[index]


class _Arrays(pickle.Unpickler):
    """Makes arrays of numbers, and what needs no class: strings, bytes, numbers, lists, tuples and dicts.

    Pickles of Python 2 and 3 and of numpy 1 and 2 are understood. Whatever else a pickle asks for is refused.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name; nothing is imported."""
        try:
            return _ALLOWED[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it is to hold arrays, strings, numbers, lists and dicts only, and asks for {module}.{name}"
            ) from None


def _bytes(text: str, _encoding: str) -> bytes:
    """How Python 3 writes bytes in an old protocol; the encoding is always this one."""
    return text.encode("latin1")


class _Kind:
    """Stands for a type of numbers: numpy's own believes whatever state it is given, as wrong as it may be."""

    def __init__(self, name: str, *_: Any) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biuf":  # objects would be read as addresses in memory
            raise pickle.UnpicklingError(f"it is to hold arrays of numbers only, and asks for one of {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose type comes as a `_Kind`."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, kind, *rest = state
        super().__setstate__((version, shape, kind.dtype, *rest))


_scalar: Any = np.uint8(0).__reduce__()[0]
_from_buffer: Any = np.empty(0, np.uint8).__reduce_ex__(5)[0]

_ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _bytes,
    ("__builtin__", "bytes"): bytes,
    ("builtins", "bytes"): bytes,
    ("numpy", "ndarray"): None,  # only named; called it could be given any memory
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: np.empty(0, np.uint8).view(_Array),
    ("numpy.core.multiarray", "scalar"): lambda kind, content: _scalar(kind.dtype, content),
    ("numpy.core.numeric", "_frombuffer"): lambda content, kind, *rest: _from_buffer(content, kind.dtype, *rest),
}
"""What `_Arrays` takes for which name."""


def _download_error(error: Exception, url: str, root: Path) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"Expected space on the disk for `root`, got none left in {root}: nothing of the download was kept."
    return (
        f"Expected to download {url}, got {type(error).__name__}: {error}. Nothing of it was kept; start again, or "
        f"unpack the archive into {root} by hand."
    )
