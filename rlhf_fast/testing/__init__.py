"""What tests and benchmarks share: the numerics contract, small calls of every op, memory, stand-ins for a cluster.

`import rlhf_fast` does not bring it, and nothing else of the package uses it.
"""
