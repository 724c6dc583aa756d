"""The one thing pyproject.toml cannot say: which folder holds which package.

The folders `bootstrap/` and `simulations/` are installed as `meshnode_bootstrap` and
`meshnode_simulations`; top-level packages of such names would be rude guests in site-packages.
"""

from setuptools import find_packages, setup

PREFIXED = ("bootstrap", "simulations")

setup(
    packages=[
        *find_packages(include=["meshnode", "meshnode.*"]),
        *(
            f"meshnode_{name}"
            for folder in PREFIXED
            for name in find_packages(include=[folder, f"{folder}.*"])
        ),
    ],
    package_dir={f"meshnode_{folder}": folder for folder in PREFIXED},
)
