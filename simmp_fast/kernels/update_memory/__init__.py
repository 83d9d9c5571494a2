"""The update of the memory bank in four launches, all on the device."""

from .operator import update_memory

__all__ = ["update_memory"]
