"""The parts of benchmarks/control_architectures.py: recordings, a policy that replays them late, an arm that follows, and what is measured."""
