"""The data of a recipe."""

import re

import pytest

from starfire_prune.data import DataError
from starfire_prune.runs.data import recipe_datasets
from tests.support.image_folders import make_folder
from tests.support.runs import small_recipe


def test_another_number_of_classes_names_those_in_the_data(tmp_path):
    root = make_folder(tmp_path / "images")
    data = ("data.name=folder", f"data.root={root}", "model.num_classes=3")
    message = (
        "model.num_classes (=3) must be the number of classes in the data, 2 (ant, bee): correct "
        "it, or give other data"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        recipe_datasets(small_recipe(tmp_path, *data))
