// The 16 virtual lanes that every kernel computes on, whatever the width of the machine's vectors.
// Include after one vec/<isa>.hpp.
#pragma once

#include <cstdint>

#include "kernels/table.hpp"

namespace batchnorm::kernels {
namespace {

constexpr int kLanes = kVectorColumns;

// Types of two bytes, which are computed in float32: lanes are widened as they are loaded and rounded as they are
// stored.
template <class T>
constexpr bool kIsSixteen = sizeof(T) == 2;

// 16 values of A (float or double) in as many native vectors as that takes. Arithmetic is lane by lane, each
// operation rounded on its own.
template <class A>
struct Lanes;

template <>
struct Lanes<float> {
  using Native = NativeFloat;
  static constexpr int kWidth = static_cast<int>(sizeof(NativeFloat) / sizeof(float));
  static constexpr int kVectors = kLanes / kWidth;
  NativeFloat v[kVectors];
};
template <>
struct Lanes<double> {
  using Native = NativeDouble;
  static constexpr int kWidth = static_cast<int>(sizeof(NativeDouble) / sizeof(double));
  static constexpr int kVectors = kLanes / kWidth;
  NativeDouble v[kVectors];
};

#define BN_LANEWISE(op)                                                               \
  template <class A>                                                                  \
  BN_INLINE Lanes<A> operator op(const Lanes<A>& a, const Lanes<A>& b) {              \
    Lanes<A> r;                                                                       \
    BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) r.v[k] = a.v[k] op b.v[k]; \
    return r;                                                                         \
  }
BN_LANEWISE(+)
BN_LANEWISE(-)
BN_LANEWISE(*)
#undef BN_LANEWISE

template <class A>
BN_INLINE Lanes<A> broadcast(A value) {
  Lanes<A> r;
  const typename Lanes<A>::Native zero{};
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) r.v[k] = value - zero;  // which keeps the sign of -0
  return r;
}

// Loads and stores of 16 values, converting between the storage type T and the arithmetic type A.
// Vector by vector: GCC 12 takes a memcpy of all lanes at once through the stack.
template <class A>
BN_INLINE void store(A* p, const Lanes<A>& a) {
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k)
      __builtin_memcpy(p + k * Lanes<A>::kWidth, &a.v[k], sizeof a.v[k]);
}
// A native vector at any address. Loaded by memcpy, GCC 12 takes some of them through the stack.
struct __attribute__((packed, may_alias)) UnalignedFloat {
  NativeFloat vector;
};
struct __attribute__((packed, may_alias)) UnalignedDouble {
  NativeDouble vector;
};
BN_INLINE NativeFloat load_whole(const float* p) { return reinterpret_cast<const UnalignedFloat*>(p)->vector; }
BN_INLINE NativeDouble load_whole(const double* p) { return reinterpret_cast<const UnalignedDouble*>(p)->vector; }

// Vector k of the 16 values at p.
template <class A, class T>
BN_INLINE typename Lanes<A>::Native load_vector(const T* p, int k) {
  const T* from = p + k * Lanes<A>::kWidth;
  if constexpr (sizeof(A) == sizeof(T)) {
    return load_whole(from);
  } else if constexpr (sizeof(A) == sizeof(double)) {
    return widen_load(from);
  } else {
    return float_load(from);
  }
}
template <class A, class T>
BN_INLINE Lanes<A> load_as(const T* p) {
  Lanes<A> r;
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) r.v[k] = load_vector<A>(p, k);
  return r;
}
template <class A>
BN_INLINE Lanes<A> load(const A* p) {
  return load_as<A>(p);
}
template <class A, class T>
BN_INLINE void store_as(T* p, const Lanes<A>& a) {
  if constexpr (sizeof(A) == sizeof(T)) {
    store(p, a);
  } else {
    BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) narrow_store(p + k * Lanes<A>::kWidth, a.v[k]);
  }
}

// 16 values around the caches; p is aligned to them, or to kStreamBytes.
template <class A, class T>
BN_INLINE void stream_lanes(T* p, const Lanes<A>& a) {
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) stream(p + k * Lanes<A>::kWidth, a.v[k]);
}

// The first n lanes of a, the others of b; 0 <= n <= 16.
template <class A>
BN_TAIL Lanes<A> join(std::int64_t n, const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<A> r;
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) r.v[k] = first_of(a.v[k], n - k * Lanes<A>::kWidth, b.v[k]);
  return r;
}

// The first n < 16 of 16 values of two bytes, for machines of any kind: as two pieces that overlap, each the largest
// power of two that n holds; below 1, none.
template <class T>
BN_INLINE void copy_first(T* to, const T* from, std::int64_t n) {
  if (n >= 8) {
    __builtin_memcpy(to, from, 16);
    __builtin_memcpy(to + n - 8, from + n - 8, 16);
  } else if (n >= 4) {
    __builtin_memcpy(to, from, 8);
    __builtin_memcpy(to + n - 4, from + n - 4, 8);
  } else if (n >= 2) {
    __builtin_memcpy(to, from, 4);
    __builtin_memcpy(to + n - 2, from + n - 2, 4);
  } else if (n == 1) {
    to[0] = from[0];
  }
}

// The same as load_vector, load_as and store_as for the first n < 16 values; the other lanes are loaded as `fill` and
// not stored.
template <class A, class T>
BN_TAIL typename Lanes<A>::Native load_vector_of_first(const T* p, int k, std::int64_t n, Arithmetic<T> fill) {
  const int skip = k * Lanes<A>::kWidth;
  if constexpr (kIsSixteen<T>) {
    T some[kLanes] = {};
    copy_first(some, p + skip, n - skip < Lanes<A>::kWidth ? n - skip : Lanes<A>::kWidth);
    const typename Lanes<A>::Native zero{};
    return first_of(load_vector<A>(some, 0), n - skip, static_cast<A>(fill) - zero);
  } else if constexpr (sizeof(A) == sizeof(T)) {
    return load_part(p + skip, n - skip, fill);
  } else {
    return widen_load_part(p + skip, n - skip, fill);
  }
}
template <class A, class T>
BN_TAIL Lanes<A> load_first(const T* p, std::int64_t n, Arithmetic<T> fill) {
  Lanes<A> r;
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) r.v[k] = load_vector_of_first<A>(p, k, n, fill);
  return r;
}
template <class A, class T>
BN_TAIL void store_first(T* p, std::int64_t n, const Lanes<A>& a) {
  if constexpr (kIsSixteen<T>) {
    T some[kLanes];
    store_as(some, a);
    copy_first(p, some, n);
  } else {
    BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) {
      const int skip = k * Lanes<A>::kWidth;
      if constexpr (sizeof(A) == sizeof(T)) {
        store_part(p + skip, n - skip, a.v[k]);
      } else {
        narrow_store_part(p + skip, n - skip, a.v[k]);
      }
    }
  }
}

// 16 values, or the n there are. `n` is known to be 16 wherever the compiler can see a whole vector.
template <class A, class T>
BN_INLINE Lanes<A> load_upto(const T* p, std::int64_t n, Arithmetic<T> fill) {
  return n >= kLanes ? load_as<A>(p) : load_first<A>(p, n, fill);
}
template <class A, class T>
BN_INLINE void store_upto(T* p, std::int64_t n, const Lanes<A>& a) {
  if (n >= kLanes) {
    store_as(p, a);
  } else {
    store_first(p, n, a);
  }
}

// Asks for the 16 values at p, which need not be addresses of the tensor: kNear into the first-level cache, kFar into
// the second.
enum class Fetch { kNear, kFar };
template <Fetch kWhere, class T>
BN_INLINE void fetch_lanes(const T* p) {
  for (std::int64_t at = 0; at < kLanes; at += kStreamBytes / static_cast<std::int64_t>(sizeof(T))) {
    __builtin_prefetch(p + at, 0, kWhere == Fetch::kNear ? 3 : 2);
  }
}

// What is fetched while a kernel goes down some rows at a time, 16 columns after 16: at row r of the columns from c on,
// what lies at(c, r) values behind row 0 of these columns. Where rows lie side by side that is line after line of the
// rows ahead, since memory gives more in this order than in that of the visit.
struct RowsAhead {
  std::int64_t distance, column, row;

  RowsAhead(const Rows& rows, std::int64_t distance_in_values, std::int64_t rows_a_visit)
      : distance(distance_in_values),
        column(rows.stride == rows.columns ? rows_a_visit - 1 : 0),
        row(rows.stride == rows.columns ? kLanes : rows.stride) {}
  [[nodiscard]] BN_INLINE std::int64_t at(std::int64_t c, std::int64_t r) const {
    return distance + c * column + r * row;
  }
};

template <class T>
BN_INLINE void fetch_lanes_to_store(T* p) {
  for (std::int64_t at = 0; at < kLanes; at += kStreamBytes / static_cast<std::int64_t>(sizeof(T))) {
    __builtin_prefetch(p + at, 1, 2);
  }
}

// a*a - square, exactly; taken as 0 where it reaches below float64's smallest number, since there the fused and the
// split form round it differently. 2^-960 is above the square whose last exact bit is 2^-1074.
BN_INLINE NativeDouble square_error(NativeDouble a, NativeDouble square) {
  const NativeDouble error = product_error(a, a, square);
  return square >= 0x1p-960 ? error : NativeDouble{};
}

BN_INLINE NativeDouble absolute(NativeDouble v) { return v < 0 ? -v : v; }
// What rounding took from product = a*b; taken as 0 where square_error is, and where splitting a or b (vec/native.hpp)
// would overflow.
BN_INLINE NativeDouble normal_product_error(NativeDouble a, NativeDouble b, NativeDouble product) {
  const auto is_normal = (absolute(product) >= 0x1p-960) & (absolute(a) < 0x1p995) & (absolute(b) < 0x1p995);
  return is_normal ? product_error(a, b, product) : NativeDouble{};
}

// What rounding took from sum = a + b, exactly (Knuth's TwoSum), half of it on each kind of unit.
BN_INLINE double sum_error(double a, double b, double sum) {
  const double b_part = sum - a;
  return (a - (sum - b_part)) + (b - b_part);
}
BN_INLINE NativeDouble sum_error(NativeDouble a, NativeDouble b, NativeDouble sum) {
  const NativeDouble b_part = other_subtract(sum, a);
  return other_add(a - (sum - b_part), other_subtract(b, b_part));
}

}  // namespace
}  // namespace batchnorm::kernels
