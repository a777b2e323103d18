"""Train a small GR00T N1.5 on demonstrations of the simulated arm's scripted expert; see train.py."""
