"""``gptlab.prove``: a user's own configuration is run to verify order, resume and the equality of ranks.

Each proof compares short runs, in processes of their own, by the traces that they leave.
"""
