"""Run directories: environment, logs, console output and loggers, and the reading of past runs."""
