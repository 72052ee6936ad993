"""How byte-level tokenizers spell bytes in their entries: each by one visible character, a space by `Ġ`."""

_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(0x100 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_VISIBLE)))
}
"""The byte that each character of a byte-level entry stands for, as GPT-2 writes them."""
