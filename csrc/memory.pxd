"""Growing memory: a failure raises MemoryError and leaves the old memory as it was."""

from cpython.mem cimport PyMem_Realloc


cdef inline void *resized(void *memory, size_t count, size_t size) except NULL:
    """Return the memory, moved if necessary, with room for `count` items."""
    cdef void *room = PyMem_Realloc(memory, count * size)
    if room == NULL:
        raise MemoryError
    return room
