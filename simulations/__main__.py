"""`python -m meshnode_simulations` is `meshnode-sim`."""

from meshnode_simulations.cli import main

main()
