"""The generators of the house, a package each; `lumos.registry` lists them."""
