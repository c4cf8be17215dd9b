"""Checks of the integers that come in: anything but an int in its range is a ValueError."""

from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_Check
from libc.stdint cimport int64_t

cdef enum:
    WEIGHT_MAX = 0x7FFFFFFF


cdef inline int64_t tokens_of(object request_id, object tokens) except -1:
    cdef int64_t number = in_range(tokens, WEIGHT_MAX)
    if number < 0:
        raise out_of_range(tokens, WEIGHT_MAX, f"StepMeter.begin: tokens of {request_id!r}")
    return number


cdef inline int64_t whole_number(object value, int64_t maximum, str what) except -1:
    cdef int64_t number = in_range(value, maximum)
    if number < 0:
        raise out_of_range(value, maximum, what)
    return number


cdef inline int64_t in_range(object value, int64_t maximum):
    """Return an int from 0 to a maximum, or -1 for anything else."""
    cdef int overflow = 0
    cdef int64_t number = -1
    if PyLong_Check(value):
        number = PyLong_AsLongLongAndOverflow(value, &overflow)
    return number if 0 <= number <= maximum else -1


cdef inline object out_of_range(object value, int64_t maximum, str what):
    return ValueError(f"{what}: expected an int from 0 to {maximum}, got {value!r}")
