"""Forecast of the parameters, memory, time, network traffic and disk space of a run.

``gptlab.plan`` prints a plan, or chooses a run for a budget of FLOPs. Every run writes its own forecast and compares it
with the measured values at the end. Only ``forecast_callback`` imports torch.
"""
