"""The parts of open_loop.py: what was recorded, what the policy says to it, and what the difference means."""
