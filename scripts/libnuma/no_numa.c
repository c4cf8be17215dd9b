/* libnuma.so.1 as a machine without NUMA has it: vLLM's CPU kernels ask numa_available(), hear
 * "no" and leave memory where it is. Only what these kernels link against is here; see
 * install_vllm_cpu.py, which builds this where the system has no libnuma.
 */
#include <stddef.h>

struct bitmask;

int numa_available(void) { return -1; }
struct bitmask *numa_get_mems_allowed(void) { return NULL; }
struct bitmask *numa_parse_nodestring(const char *text) { (void)text; return NULL; }
int numa_migrate_pages(int pid, struct bitmask *from, struct bitmask *to)
{
    (void)pid, (void)from, (void)to;
    return 0;
}
void numa_bitmask_free(struct bitmask *mask) { (void)mask; }
void numa_set_interleave_mask(struct bitmask *mask) { (void)mask; }
void numa_set_membind(struct bitmask *mask) { (void)mask; }
void numa_set_strict(int strict) { (void)strict; }
