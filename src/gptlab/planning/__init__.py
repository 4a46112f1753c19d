"""What a run will need, before it is trained: parameters, memory, time, network traffic and disk.

``gptlab.plan`` prints it, or chooses a run for a budget of FLOPs; every run writes its own forecast and scores it at
its end. Only ``forecast_callback`` imports torch.
"""
