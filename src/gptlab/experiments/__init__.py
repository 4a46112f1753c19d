"""Configuration, run directories, launching, loggers: one experiment from command line to record."""
