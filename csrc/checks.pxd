"""Check incoming integers: anything but an int in its range raises a ValueError."""

from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_Check
from libc.math cimport isfinite
from libc.stdint cimport INT64_MAX, int64_t


cdef enum:
    WEIGHT_MAX = 0x7FFFFFFF


cdef inline int64_t tokens_of(object request_id, object tokens) except -1:
    cdef int64_t number = in_range(tokens, WEIGHT_MAX)
    if number < 0:
        raise out_of_range(tokens, WEIGHT_MAX, f"StepMeter.begin: tokens of {request_id!r}")
    return number


cdef inline int64_t rejected_tokens_of(object request_id, object tokens) except -1:
    cdef int64_t number = in_range(tokens, WEIGHT_MAX)
    if number < 0:
        raise out_of_range(
            tokens, WEIGHT_MAX, f"StepMeter.settle: rejected tokens of {request_id!r}"
        )
    return number


cdef inline object tokens_out_of_range(int64_t total):
    return out_of_range(total, WEIGHT_MAX, "StepMeter.begin: tokens of all requests")


cdef inline int check_tokens(dict scheduled) except -1:
    """Raise ValueError unless each count of a step, and their sum, is in range."""
    cdef object total = 0
    for request_id, tokens in scheduled.items():
        total += tokens_of(request_id, tokens)
    if total > WEIGHT_MAX:
        raise tokens_out_of_range(total)
    return 0


cdef inline int check_encoded(dict encoded) except -1:
    """Raise ValueError unless each count of encoder tokens is in range."""
    for request_id, tokens in encoded.items():
        whole_number(tokens, WEIGHT_MAX, f"StepMeter.begin: encoder tokens of {request_id!r}")
    return 0


cdef inline int64_t whole_number(object value, int64_t maximum, str what) except -1:
    cdef int64_t number = in_range(value, maximum)
    if number < 0:
        raise out_of_range(value, maximum, what)
    return number


cdef inline int64_t instant(object now_ns) except -1:
    return whole_number(now_ns, INT64_MAX, "StepMeter: now_ns")


cdef inline int64_t in_range(object value, int64_t maximum):
    """Return an int from 0 to a maximum, or -1 for anything else."""
    cdef int overflow = 0
    cdef int64_t number = -1
    if PyLong_Check(value):
        number = PyLong_AsLongLongAndOverflow(value, &overflow)
    return number if 0 <= number <= maximum else -1


cdef inline object out_of_range(object value, int64_t maximum, str what):
    return ValueError(f"{what}: expected an int from 0 to {maximum}, got {value!r}")


cdef inline int coefficients_of(
    object rows, str what, int count, int terms, double *coefficients
) except -1:
    """Read rows of finite coefficients >= 0."""
    cdef int i, k
    try:
        checked = [[float(value) for value in row] for row in rows]
    except (TypeError, ValueError):
        checked = []
    if [len(row) for row in checked] != [terms] * count:
        raise ValueError(f"{what}: expected {count} rows of {terms} numbers, got {rows!r}")
    for i in range(count):
        for k in range(terms):
            coefficients[i * terms + k] = checked[i][k]
            if not (isfinite(coefficients[i * terms + k]) and checked[i][k] >= 0.0):
                raise ValueError(f"{what}: expected coefficients >= 0, got {rows!r}")
    return 0
