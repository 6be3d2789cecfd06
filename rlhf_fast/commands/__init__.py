"""What the command line does with finished runs: sample, talk, export, average, plot."""
