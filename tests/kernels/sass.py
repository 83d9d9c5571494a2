"""Machine code as `nvdisasm` prints it, written by hand."""

from __future__ import annotations


def program(*lines: str) -> str:
    """A disassembly: labels end with a colon, all else is an instruction."""
    text, address = [], 0
    for part in lines:
        if part.endswith(":"):
            text.append(part)
            continue
        text.append(f"        /*{address:04x}*/                   {part} ;")
        address += 16
    return "\n".join(text)
