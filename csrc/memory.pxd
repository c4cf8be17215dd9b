"""Memory that grows: a failure is a MemoryError, and the old memory stays as it was."""

from cpython.mem cimport PyMem_Realloc


cdef inline void *resized(void *memory, size_t count, size_t size) except NULL:
    """Return the memory, moved if need be, with room for so many things."""
    cdef void *room = PyMem_Realloc(memory, count * size)
    if room == NULL:
        raise MemoryError
    return room
