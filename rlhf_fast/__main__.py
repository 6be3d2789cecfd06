"""`python -m rlhf_fast`."""

from rlhf_fast.cli import main

main()
