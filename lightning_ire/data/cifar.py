"""CIFAR-10 and CIFAR-100 in their Python format."""

from __future__ import annotations

import errno
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn
from torch.utils.data import Dataset

from lightning_ire._checks import ConfigurationError
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
                the same format: other labels, a part of the images.
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
        source = self._source(verify=True)
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
        try:
            return _InMemory(self._source(self.verify)(self.root, train=part == "train"))
        except RuntimeError as error:  # torchvision: "not found or corrupted"
            raise ConfigurationError(self._fault() or str(error)) from error
        except (OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
            raise ConfigurationError(
                f"Expected `root` to hold {self._source_name} in Python format, got a file in {self._folder} that "
                f"cannot be read ({type(error).__name__}: {error})."
            ) from error

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
        return self.root / self._source(verify=True).base_folder

    def _source(self, verify: bool) -> Any:
        """Torchvision's class; without checksums, if these are not to be verified."""
        original = getattr(torchvision("datasets"), self._source_name)
        if verify:
            return original

        anything = {
            "train_list": [(name, None) for name, _ in original.train_list],
            "test_list": [(name, None) for name, _ in original.test_list],
            "meta": {**original.meta, "md5": None},
        }
        return type(original.__name__, (original,), anything)

    def _fault(self) -> str | None:
        """What is wrong with the files; `None`: nothing."""
        from torchvision.datasets.utils import check_integrity

        source = self._source(self.verify)
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
            if not check_integrity(str(self._folder / name), checksum):
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
    """The images of one of torchvision's datasets; unlike a class made on the fly it can be sent to other processes."""

    def __init__(self, source: Any) -> None:
        self.images = source.data
        self.labels = source.targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.fromarray(self.images[index]), self.labels[index]


def _download_error(error: Exception, url: str, root: Path) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"Expected space on the disk for `root`, got none left in {root}: nothing of the download was kept."
    return (
        f"Expected to download {url}, got {type(error).__name__}: {error}. Nothing of it was kept; start again, or "
        f"unpack the archive into {root} by hand."
    )
