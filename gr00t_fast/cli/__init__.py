"""The command `gr00t-fast`: one thin module per subcommand, joined by `main`; `shared_flags` has what several take."""
