"""The command line: arguments, progress, printing, exit codes; not the place for results."""
