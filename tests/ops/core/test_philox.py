import pytest
import torch

from rlhf_fast.ops.core.philox import philox

# Known answers published with the generator (Random123, kat_vectors, philox4x32 10): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    seed = key[1] << 32 | key[0]
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    found = philox(seed, *(torch.tensor([c]) for c in counter))
    assert tuple(word.item() for word in found) == words
