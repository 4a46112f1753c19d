"""Creation of run directories."""

import pytest

from gptlab.errors import UserError
from gptlab.tracking.run_directory import claim_directory


def test_a_dangling_link_in_the_path_of_a_run_directory_is_named(tmp_path):
    (tmp_path / "outputs").symlink_to("missing")
    with pytest.raises(UserError, match="outputs is a link to missing, which does not exist"):
        claim_directory(tmp_path / "outputs" / "name")


def test_a_file_in_the_path_of_a_run_directory_is_named(tmp_path):
    (tmp_path / "outputs").write_text("")
    with pytest.raises(UserError, match="outputs is a file"):
        claim_directory(tmp_path / "outputs" / "name")
