# cython: cdivision=True
"""Least squares with no negative coefficient. The twin `least_squares_py.py` explains the theory.

Matrices have rows of `WIDTH`, whatever the number of equations. All is on the stack.
"""

from libc.math cimport sqrt

from csrc.terms cimport FIT_TERMS

cdef enum:
    WIDTH = 39  # FIT_TERMS, the most equations there are

cdef extern from *:
    """
    #define NOISE 0.03
    #define UNKNOWN_PART 0.05
    #define EMPTY 8.0
    #define PIVOT_MIN 1e-12
    #define GAIN_MIN 1e-9
    """
    const double NOISE, UNKNOWN_PART, EMPTY, PIVOT_MIN, GAIN_MIN

cdef struct Equations:
    int count
    double moments[WIDTH][WIDTH]
    double right[WIDTH]
    double scales[WIDTH]
    double found[WIDTH]
    bint barred[WIDTH]
    int free_count
    int free[WIDTH]  # terms that are not 0, ascending
    double tried[WIDTH]  # of the free terms


cdef inline double solve_scaled(double[WIDTH] *matrix, double *vector, int count) noexcept nogil:
    """Solve the first equations in place. Return the error explained, or -1 if they are singular."""
    cdef double gain = 0.0, factor, value
    cdef int i, j, k
    for i in range(count):
        if matrix[i][i] < PIVOT_MIN:
            return -1.0
        gain += vector[i] * vector[i] / matrix[i][i]
        for k in range(i + 1, count):
            factor = matrix[k][i] / matrix[i][i]
            vector[k] -= factor * vector[i]
            for j in range(i + 1, count):
                matrix[k][j] -= factor * matrix[i][j]
    for i in range(count - 1, -1, -1):
        value = vector[i]
        for j in range(i + 1, count):
            value -= matrix[i][j] * vector[j]
        vector[i] = value / matrix[i][i]
    return gain


cdef inline void solve_nonnegative(Equations *e, const double *before) noexcept nogil:
    """Write into `found` the x >= 0 with the least x'Mx - 2r'x; begin with the terms of `before`."""
    cdef int i, k, round, entering
    e.free_count = 0
    for i in range(e.count):
        e.scales[i] = 1.0 / sqrt(e.moments[i][i]) if e.moments[i][i] > 0.0 else 0.0
        e.found[i] = 0.0
        e.barred[i] = e.scales[i] == 0.0
        if before != NULL and before[i] > 0.0 and not e.barred[i]:
            e.free[e.free_count] = i
            e.free_count += 1
    begin_with_free(e)
    for round in range(3 * e.count):
        entering = steepest(e)
        if entering < 0:
            break
        insert_free(e, entering)
        while e.free_count > 0:
            if not try_free(e):
                remove_free(e, entering)
                e.barred[entering] = True
                break
            if all_positive(e):
                for k in range(e.free_count):
                    e.found[e.free[k]] = e.tried[k]
                break
            step_back(e)


cdef inline void begin_with_free(Equations *e) noexcept nogil:
    cdef int k, kept
    while e.free_count > 0:
        if not try_free(e):
            e.free_count = 0
        elif all_positive(e):
            for k in range(e.free_count):
                e.found[e.free[k]] = e.tried[k]
            return
        else:
            kept = 0
            for k in range(e.free_count):
                if e.tried[k] > 0.0:
                    e.free[kept] = e.free[k]
                    kept += 1
            e.free_count = kept


cdef inline int steepest(const Equations *e) noexcept nogil:
    cdef int i, k, next_free = 0, entering = -1
    cdef double gain, steep = GAIN_MIN
    for i in range(e.count):
        if next_free < e.free_count and e.free[next_free] == i:
            next_free += 1
            continue
        if e.barred[i]:
            continue
        gain = e.right[i]
        for k in range(e.free_count):
            gain -= e.moments[i][e.free[k]] * e.found[e.free[k]]
        if gain * e.scales[i] > steep:
            entering = i
            steep = gain * e.scales[i]
    return entering


cdef inline void insert_free(Equations *e, int term) noexcept nogil:
    cdef int at = e.free_count
    while at > 0 and e.free[at - 1] > term:
        e.free[at] = e.free[at - 1]
        at -= 1
    e.free[at] = term
    e.free_count += 1


cdef inline void remove_free(Equations *e, int term) noexcept nogil:
    cdef int k, kept = 0
    for k in range(e.free_count):
        if e.free[k] != term:
            e.free[kept] = e.free[k]
            kept += 1
    e.free_count = kept


cdef inline bint all_positive(const Equations *e) noexcept nogil:
    cdef int k
    for k in range(e.free_count):
        if not e.tried[k] > 0.0:
            return False
    return True


cdef inline void step_back(Equations *e) noexcept nogil:
    cdef double part = 1.0, reach
    cdef int k, i, first = -1, kept = 0
    for k in range(e.free_count):
        i = e.free[k]
        if e.tried[k] <= 0.0:
            reach = e.found[i] / (e.found[i] - e.tried[k]) if e.found[i] > 0.0 else 0.0
            if first < 0 or reach < part:
                part = reach
                first = i
    for k in range(e.free_count):
        i = e.free[k]
        e.found[i] += part * (e.tried[k] - e.found[i])
        if i == first or e.found[i] <= 0.0:
            e.found[i] = 0.0
        else:
            e.free[kept] = i
            kept += 1
    e.free_count = kept


cdef inline bint try_free(Equations *e) noexcept nogil:
    """Solve for the free terms into `tried`. Return False if they determine one another."""
    cdef double matrix[WIDTH][WIDTH]
    cdef int i, j
    for i in range(e.free_count):
        e.tried[i] = e.right[e.free[i]] * e.scales[e.free[i]]
        for j in range(e.free_count):
            matrix[i][j] = (
                e.moments[e.free[i]][e.free[j]] * e.scales[e.free[i]] * e.scales[e.free[j]]
            )
    if solve_scaled(matrix, e.tried, e.free_count) < 0.0:
        return False
    for i in range(e.free_count):
        e.tried[i] = e.tried[i] * e.scales[e.free[i]]
    return True
