"""What a run is: the configuration's schema and messages, option groups, the Hydra application, merging on resume."""
