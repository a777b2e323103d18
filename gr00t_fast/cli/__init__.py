"""The command `gr00t-fast`: one module per subcommand, joined by `main`; `program` holds what they share."""
