"""The network and what is true of it: no Lightning, no Hydra, no file of the data layer."""
