"""From a checkpoint to files that other runtimes run: graphs, 8-bit versions of them, and the proof that they agree."""
