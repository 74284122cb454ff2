// What the machine can do with the same bytes: the yardstick of every row.
#pragma once

#include <cstddef>
#include <span>

#include "team.hpp"

namespace bench {

enum class Stores {
  ordinary,
  around_caches,  // in the widest vectors of the machine; ordinary where it has no such stores
};

// Sizes are multiples of 64 bytes, and `to` starts at such a multiple.
using Bytes = std::span<std::byte>;
using ConstBytes = std::span<const std::byte>;

// to = from: one stream in, one out.
void copy(Team& team, int threads, Stores stores, Bytes to, ConstBytes from);
// to = a xor b: two streams in, one out, as in a backward pass. Xor costs the same for any bits.
void combine(Team& team, int threads, Stores stores, Bytes to, ConstBytes a, ConstBytes b);

}  // namespace bench
