"""Data sets and their loaders.

Available are scikit-learn's digits, image folders, Tiny-ImageNet, and the data sets of timm's
readers: Hugging Face's data sets, WebDataset shards and torchvision's data sets. Each yields images
as float32 tensors of shape ``(3, image_size, image_size)``, with a class index each. Photographs
pass through timm's transforms, by default those of PyTorch's ImageNet example: a random resized
crop and a horizontal flip for training, a resize and a centre crop for validation, normalized by
the mean and standard deviation of ImageNet.
"""

from starfire_prune.data.digits import digits_normalisation
from starfire_prune.data.errors import DataError, error_sentence
from starfire_prune.data.images import Datasets, LabelledImages
from starfire_prune.data.load import DATASETS, load_datasets
from starfire_prune.data.loaders import build_loader, prepare_loader
from starfire_prune.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, is_policy
from starfire_prune.data.readers import READER_OPTIONS, option_problems, reader_of
from starfire_prune.data.shards import PADDING_LABEL

__all__ = [
    "DATASETS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "INTERPOLATIONS",
    "PADDING_LABEL",
    "READER_OPTIONS",
    "DataError",
    "Datasets",
    "LabelledImages",
    "build_loader",
    "digits_normalisation",
    "error_sentence",
    "is_policy",
    "load_datasets",
    "option_problems",
    "prepare_loader",
    "reader_of",
]
