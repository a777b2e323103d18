"""`python -m gr00t_fast`: the command `gr00t-fast`."""

from gr00t_fast.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
