"""Our ops under the names of other libraries: a module per peer, with `replacements()`, and `patch` over them."""

from rlhf_fast.integrations._patch import Peer, patch, patched, peers, unpatch

__all__ = ["Peer", "patch", "patched", "peers", "unpatch"]
