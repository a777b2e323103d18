"""`python -m gr00t_fast.robots.feetech_bus` is `gr00t-fast bus`."""

from gr00t_fast.cli.bus import main
from gr00t_fast.cli.program import leave

if __name__ == "__main__":
    leave(main())
