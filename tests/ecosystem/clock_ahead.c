/* Sets the wall clock of a program ahead by CMT_AHEAD_S seconds: load it by LD_PRELOAD.

   Clocks that count from a start stay right, and so does every wait. libfaketime cannot do that for
   vLLM: with it Python's time.sleep fails, as it waits until an instant of the monotonic clock. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static int (*real_clock_gettime)(clockid_t, struct timespec *);
static time_t ahead_s;

__attribute__((constructor)) static void begin(void)
{
    const char *given = getenv("CMT_AHEAD_S");

    *(void **)&real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    ahead_s = given ? atol(given) : 0;
}

int clock_gettime(clockid_t id, struct timespec *now)
{
    if (!real_clock_gettime)
        begin();
    int status = real_clock_gettime(id, now);
    if (!status && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += ahead_s;
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec at;

    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &at))
        return -1;
    now->tv_sec = at.tv_sec;
    now->tv_usec = at.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now)
{
    struct timespec at;

    clock_gettime(CLOCK_REALTIME, &at);
    if (now)
        *now = at.tv_sec;
    return at.tv_sec;
}
