// What the machine can do with the same bytes: the yardstick of every row.
#pragma once

#include <cstddef>

namespace bench {

// to = from, on `threads` threads, with ordinary stores.
void copy_ordinary(float* to, const float* from, std::size_t n, int threads);
// The same with stores that go around the caches, where the machine has them.
void copy_around_cache(float* to, const float* from, std::size_t n, int threads);
// to = a + b: two streams in, one out, the shape of a backward pass.
void add_streams(float* to, const float* a, const float* b, std::size_t n, int threads);

}  // namespace bench
