/* A small libnvidia-ml.so.1 for the tests: the real binding loads it, a file says what it answers.
 *
 * The file that FAKE_NVML names is read anew at every call. Its first line is
 *     init RESULT
 * and every other line one device, MIG slices ("mig") after the cards ("gpu"):
 *     KIND UUID HANDLE_RESULT ENERGY_RESULT ENERGY_MJ MIG_MODE MAX_MW POWER_MW NAME
 * A result is an nvmlReturn_t: 0 success, 3 not supported, 15 GPU is lost, 999 unknown.
 * https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceEnumvs.html
 *
 * As in the real library, a handle of a card that was lost stays dead until the library was shut
 * down by everyone who initialised it, and initialised again. -DNO_ENERGY leaves the counter out,
 * as in the library of a driver that is older than it.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
enum { INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15, DEVICES_MAX = 16 };

struct device {
    char kind[8], uuid[96], name[96];
    int handle_result, energy_result, mig_mode;
    unsigned long long energy_mj;
    unsigned max_mw, power_mw;
};

static struct device devices[DEVICES_MAX];
static int lost[DEVICES_MAX];
static int users;
static int inits;

int fake_inits(void) { return inits; }
int fake_users(void) { return users; }

/* Returns how many devices the file names; *init is what initialising returns. */
static int load(int *init)
{
    int count = 0;
    char line[512];
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    *init = NOT_FOUND;
    if (!file)
        return 0;
    while (count < DEVICES_MAX && fgets(line, sizeof line, file)) {
        struct device *d = &devices[count];
        if (sscanf(line, "init %d", init) == 1)
            continue;
        count += sscanf(line, "%7s %95s %d %d %llu %d %u %u %95[^\n]", d->kind, d->uuid,
                        &d->handle_result, &d->energy_result, &d->energy_mj, &d->mig_mode,
                        &d->max_mw, &d->power_mw, d->name) == 9;
    }
    fclose(file);
    return count;
}

/* A handle is a device's line, counted from 1. */
static int find(void *handle, struct device **device)
{
    int init, count = load(&init);
    intptr_t line = (intptr_t)handle;
    if (!users)
        return UNINITIALIZED;
    if (line < 1 || line > count)
        return INVALID_ARGUMENT;
    *device = &devices[line - 1];
    return lost[line - 1] ? GPU_IS_LOST : SUCCESS;
}

static int copy(const char *from, char *to, unsigned size)
{
    if (strlen(from) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags)
{
    int result;
    (void)flags;
    load(&result);
    inits++;
    if (result)
        return result;
    if (!users++)
        memset(lost, 0, sizeof lost);
    return SUCCESS;
}

int nvmlShutdown(void)
{
    if (!users)
        return UNINITIALIZED;
    users--;
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    int init, all = load(&init);
    if (!users)
        return UNINITIALIZED;
    *count = 0;
    for (int i = 0; i < all; i++)
        *count += !strcmp(devices[i].kind, "gpu");
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    unsigned count;
    int result = nvmlDeviceGetCount_v2(&count);
    if (result)
        return result;
    if (index >= count)
        return INVALID_ARGUMENT;
    *handle = (void *)(intptr_t)(index + 1);
    return devices[index].handle_result;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    int init, count = load(&init);
    if (!users)
        return UNINITIALIZED;
    for (int i = 0; i < count; i++) {
        *handle = (void *)(intptr_t)(i + 1);
        if (!strcmp(devices[i].uuid, uuid))
            return devices[i].handle_result;
    }
    return NOT_FOUND;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned size)
{
    struct device *d;
    int result = find(handle, &d);
    return result ? result : copy(d->name, name, size);
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size)
{
    struct device *d;
    int result = find(handle, &d);
    return result ? result : copy(d->uuid, uuid, size);
}

/* A mode below 0 stands for a card that knows no MIG. */
int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending)
{
    struct device *d;
    int result = find(handle, &d);
    if (!result && d->mig_mode < 0)
        return NOT_SUPPORTED;
    if (!result)
        *current = *pending = (unsigned)d->mig_mode;
    return result;
}

int nvmlDeviceGetPowerManagementLimitConstraints(void *handle, unsigned *least, unsigned *most)
{
    struct device *d;
    int result = find(handle, &d);
    if (!result && !d->max_mw)
        return NOT_SUPPORTED;
    if (!result) {
        *least = d->max_mw / 2;
        *most = d->max_mw;
    }
    return result;
}

/* A power of 0 stands for a card that does not say it. */
int nvmlDeviceGetPowerUsage(void *handle, unsigned *power_mw)
{
    struct device *d;
    int result = find(handle, &d);
    if (!result && !d->power_mw)
        return NOT_SUPPORTED;
    if (!result)
        *power_mw = d->power_mw;
    return result;
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory)
{
    struct device *d;
    int result = find(handle, &d);
    if (!result) {
        memory[0] = 80ULL << 30; /* total, free, used */
        memory[1] = memory[0];
        memory[2] = 0;
    }
    return result;
}

int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    return users ? copy("580.65.06", version, size) : UNINITIALIZED;
}

int nvmlSystemGetCudaDriverVersion(int *version)
{
    *version = 13000;
    return SUCCESS;
}

#ifndef NO_ENERGY
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *energy_mj)
{
    struct device *d;
    int result = find(handle, &d);
    if (!result)
        result = d->energy_result;
    if (result == GPU_IS_LOST)
        lost[(intptr_t)handle - 1] = 1;
    if (!result)
        *energy_mj = d->energy_mj;
    return result;
}
#endif
