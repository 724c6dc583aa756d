"""The one thing pyproject.toml cannot say: which folder holds which package.

The folder `bootstrap/` is installed under the name `meshnode_bootstrap`; a
top-level package called "bootstrap" would be a rude guest in site-packages.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["meshnode", "meshnode.*"]),
        *(f"meshnode_{name}" for name in find_packages(include=["bootstrap", "bootstrap.*"])),
    ],
    package_dir={"meshnode_bootstrap": "bootstrap"},
)
