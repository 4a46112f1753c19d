"""What runs and sweeps leave behind in outputs/, and how it is read. Imports no torch, no Hydra."""
