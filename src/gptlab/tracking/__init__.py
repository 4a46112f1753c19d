"""Tracking of runs: run directory and lock, environment, logs, console output and loggers.

``run_store`` reads run directories, ``wandb`` logs to Weights & Biases.
"""
