"""Image data sets that live outside the project: CIFAR and Flowers-102, as files or from the hub."""

from __future__ import annotations

from fedbench.data.formats.cifar import Cifar
from fedbench.data.formats.flowers import flowers
from fedbench.data.formats.images import ImageSource
from fedbench.data.sets.dataset import DataSet

CIFAR100_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
    "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)

CIFAR10 = DataSet(
    name="cifar10",
    about="CIFAR-10: small colour images of ten classes (folder or hub)",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    source=ImageSource(
        folders=("cifar10", "cifar-10", "CIFAR10", "CIFAR-10", "cifar-10-batches-py"),
        hub=("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", None),
        official=Cifar(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            "test_batch",
            b"labels",
        ),
    ),
)

CIFAR100 = DataSet(
    name="cifar100",
    about="CIFAR-100: small colour images, its 100 fine classes (folder or hub)",
    classes=tuple(CIFAR100_CLASSES.split()),
    source=ImageSource(
        folders=("cifar100", "cifar-100", "CIFAR100", "CIFAR-100", "cifar-100-python"),
        hub=("uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", None),
        official=Cifar("cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", b"fine_labels"),
        label=("fine_label", "label"),
    ),
)

FLOWERS102 = DataSet(
    name="flowers102",
    about="Oxford Flowers-102: photographs of flowers (folder or hub)",
    # The authors number their classes and publish no names with them.
    classes=tuple(map(str, range(1, 103))),
    source=ImageSource(
        folders=("flowers-102", "flowers102", "102flowers", "oxford_flowers102", "oxford-flowers-102"),
        hub=("dpdl-benchmark/oxford_flowers102", "544b55c9af69a05742ead7571cd7ae23cfcd758b", None),
        official=flowers,
        train=(("train",), ("validation", "valid", "val")),
    ),
    note="training rows are the official parts train and validation (1,020 images each), test rows the official "
    "test part (6,149)",
)
