// Allocations that fail on demand, for a process that is started with this library before others (LD_PRELOAD).
#include <errno.h>
#include <stddef.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

// After so many that are good, so many fail.
volatile long good_allocations, failing_allocations;

static int fails(void) {
  if (failing_allocations == 0) return 0;
  if (good_allocations > 0) return --good_allocations, 0;
  --failing_allocations;
  errno = ENOMEM;
  return 1;
}

void* malloc(size_t n) { return fails() ? NULL : __libc_malloc(n); }
void* calloc(size_t n, size_t size) { return fails() ? NULL : __libc_calloc(n, size); }
void* realloc(void* p, size_t n) { return fails() ? NULL : __libc_realloc(p, n); }
void* memalign(size_t alignment, size_t n) { return fails() ? NULL : __libc_memalign(alignment, n); }
void* aligned_alloc(size_t alignment, size_t n) { return memalign(alignment, n); }
int posix_memalign(void** p, size_t alignment, size_t n) { return (*p = memalign(alignment, n)) == NULL ? ENOMEM : 0; }
