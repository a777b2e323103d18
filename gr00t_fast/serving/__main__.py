"""`python -m gr00t_fast.serving` is `gr00t-fast serve`."""

from gr00t_fast.cli.main import leave
from gr00t_fast.cli.serve import main

if __name__ == "__main__":
    leave(main())
