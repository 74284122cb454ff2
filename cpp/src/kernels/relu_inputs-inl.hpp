// The mask of a ReLU, and what the passes around it read, as inputs of the walks. Included before these, which find the
// overloads by it.
#pragma once

#include <type_traits>

#include "kernels/lanes-inl.hpp"
#include "kernels/table.hpp"

namespace batchnorm::kernels {
namespace {

// ---- bits ----

template <class A>
BN_INLINE unsigned above_zero(const Lanes<A>& a) {
  unsigned bits = 0;
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) bits |= above_zero(a.v[k]) << (k * Lanes<A>::kWidth);
  return bits;
}
// Lanes at or below 0 become 0.
template <class A>
BN_INLINE Lanes<A> relu(const Lanes<A>& a) {
  Lanes<A> r;
  const typename Lanes<A>::Native zero{};
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) r.v[k] = a.v[k] <= 0 ? zero : a.v[k];
  return r;
}

// Bits that are not whole bytes: those of others in the same byte stay, whoever sets them meanwhile.
BN_INLINE void set_bits_of_byte(std::uint8_t* p, unsigned bits, unsigned which) {
  std::uint8_t before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &before, static_cast<std::uint8_t>((before & ~which) | bits), true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}
[[maybe_unused]] __attribute__((noinline)) void put_some_bits(std::uint8_t* p, unsigned shift, unsigned bits,
                                                              std::int64_t n) {
  unsigned which = ((n >= kLanes ? 1u << kLanes : 1u << n) - 1u) << shift;
  for (bits = bits << shift & which; which != 0; ++p, bits >>= 8, which >>= 8) {
    if ((which & 0xffu) == 0xffu) {
      *p = static_cast<std::uint8_t>(bits);
    } else if ((which & 0xffu) != 0) {
      set_bits_of_byte(p, bits & 0xffu, which & 0xffu);
    }
  }
}
// The first n <= 16 bits, from bit `at` on.
BN_INLINE void put_bits(std::uint8_t* mask, std::int64_t at, unsigned bits, std::int64_t n) {
  std::uint8_t* p = mask + at / 8;
  const auto shift = static_cast<unsigned>(at % 8);
  if (shift != 0 || n < kLanes) return put_some_bits(p, shift, bits, n);
  const auto whole = static_cast<std::uint16_t>(bits);
  __builtin_memcpy(p, &whole, sizeof whole);
}

BN_INLINE unsigned bits_at(const std::uint8_t* mask, std::int64_t at) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, mask + at / 8, sizeof bits);
  return bits >> (at % 8);
}
// Lanes whose bit is set; the others are 0.
template <class A>
BN_INLINE Lanes<A> keep_lanes(const Lanes<A>& a, unsigned bits) {
  using Native = typename Lanes<A>::Native;
  using One = std::conditional_t<sizeof(A) == sizeof(float), std::int32_t, std::int64_t>;
  typedef One Ints __attribute__((vector_size(sizeof(Native))));
  const Ints all = static_cast<One>(bits) - Ints{};
  Lanes<A> r;
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) {
    Ints bit = {};
    BN_UNROLL for (int l = 0; l < Lanes<A>::kWidth; ++l) bit[l] = One{1} << (k * Lanes<A>::kWidth + l);
    r.v[k] = (all & bit) != 0 ? a.v[k] : Native{};
  }
  return r;
}

// ---- inputs of the walks ----

template <class T>
BN_INLINE ReluTail<T> operator+(ReluTail<T> tail, std::int64_t n) {
  tail.at += n;
  return tail;
}
template <Fetch kWhere, class T>
BN_INLINE void fetch_lanes(const ReluTail<T>& tail) {
  if (tail.residual != nullptr) fetch_lanes<kWhere>(tail.residual + tail.at);
}

template <class T>
BN_INLINE ReluInputs<T> operator+(ReluInputs<T> in, std::int64_t n) {
  in.at += n;
  return in;
}
template <Fetch kWhere, class T>
BN_INLINE void fetch_lanes(const ReluInputs<T>& in) {
  fetch_lanes<kWhere>(in.dy + in.at);
  if (in.x != nullptr) fetch_lanes<kWhere>(in.x + in.at);
}
template <class T>
BN_INLINE ReluInputs<T> rows_of(const ReluInputs<T>& in, std::int64_t r, std::int64_t, std::int64_t stride,
                                std::int64_t) {
  return in + r * stride;
}
template <class T>
BN_INLINE ReluInputs<T> columns_of(const ReluInputs<T>& in, std::int64_t c) {
  return in + c;
}
template <class T>
BN_INLINE ReluInputs<T> row_of(const ReluInputs<T>& in, std::int64_t r, std::int64_t stride) {
  return in + r * stride;
}
template <class T>
BN_INLINE void fetch_row(const ReluInputs<T>& in, std::int64_t ahead) {
  fetch_lanes<Fetch::kFar>(in + ahead);
}

}  // namespace
}  // namespace batchnorm::kernels
