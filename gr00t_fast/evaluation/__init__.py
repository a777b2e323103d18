"""What the programs find out: engines compared, a checkpoint against recordings, two runs, and whether machine and arm are ready. No command line."""
