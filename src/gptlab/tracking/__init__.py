"""Run directories: what is written there during a run, and how it is shown and read later.

The directory and its lock, the recorded environment, logs, console output and loggers; ``run_store`` reads past runs,
``wandb`` keeps a record at Weights & Biases.
"""
