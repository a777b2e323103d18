"""`python -m gr00t_fast.robots.so100_sim` is `gr00t-fast sim`."""

from gr00t_fast.cli.program import leave
from gr00t_fast.cli.sim import main

if __name__ == "__main__":
    leave(main())
