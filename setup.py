"""The README with links that work on a package index, where there is no checkout."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
HOME = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["urls"][
    "Homepage"
]


def absolute(readme: str) -> str:
    """Pictures as files, everything else as pages of the repository."""
    readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{HOME}/raw/main/", readme)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{HOME}/blob/main/", readme)


setup(
    long_description=absolute((HERE / "README.md").read_text()),
    long_description_content_type="text/markdown",
)
