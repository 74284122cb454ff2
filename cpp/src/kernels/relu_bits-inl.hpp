// The bits of a ReLU, and what is read and written with them, as inputs of the walks. Included before these, which find
// the overloads by it.
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
// Lanes below 0 become 0; NaN and -0 stay.
template <class A>
BN_INLINE Lanes<A> relu(const Lanes<A>& a) {
  Lanes<A> r;
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) r.v[k] = relu(a.v[k]);
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
// Whether the bits of 16 values are always two bytes: where vectors begin at lines of y, as the mask does.
enum class Bits { whole_bytes, anywhere };

// The first n <= 16 bits, from bit `at` on.
template <Bits kBits>
BN_INLINE void put_bits(std::uint8_t* mask, std::int64_t at, unsigned bits, std::int64_t n) {
  const auto place = static_cast<std::uint64_t>(at);  // whose division is a shift
  std::uint8_t* p = mask + place / 8;
  const auto shift = static_cast<unsigned>(place % 8);
  if ((kBits == Bits::anywhere && shift != 0) || n < kLanes) return put_some_bits(p, shift, bits, n);
  const auto whole = static_cast<std::uint16_t>(bits);
  __builtin_memcpy(p, &whole, sizeof whole);
}

BN_INLINE unsigned bits_at(const std::uint8_t* mask, std::int64_t at) {
  const auto place = static_cast<std::uint64_t>(at);
  std::uint32_t bits;
  __builtin_memcpy(&bits, mask + place / 8, sizeof bits);
  return bits >> (place % 8);
}
// Lanes whose bit is set; the others are 0: of vector k.
template <class A>
BN_INLINE typename Lanes<A>::Native keep_vector(typename Lanes<A>::Native v, unsigned bits, int k) {
#ifdef BN_HAS_KEEP_FOUR
  if constexpr (sizeof(A) == sizeof(double)) return keep_four(v, bits >> (4 * k));
#endif
  using Native = typename Lanes<A>::Native;
  using One = std::conditional_t<sizeof(A) == sizeof(float), std::int32_t, std::int64_t>;
  typedef One Ints __attribute__((vector_size(sizeof(Native))));
  const Ints all = static_cast<One>(bits) - Ints{};
  Ints bit = {};
  BN_UNROLL for (int l = 0; l < Lanes<A>::kWidth; ++l) bit[l] = One{1} << (k * Lanes<A>::kWidth + l);
  return (all & bit) != 0 ? v : Native{};
}

// ---- inputs of the walks ----

// Values whose bit is set, else 0: vector k of 16, or of n < 16; all of either.
template <class A, class T>
BN_INLINE typename Lanes<A>::Native load_kept_vector(const T* p, unsigned bits, int k) {
  return keep_vector<A>(load_vector<A>(p, k), bits, k);
}
#ifdef BN_HAS_KEPT_LOADS
// Where a conversion can leave lanes out: backward through a mask took 1.12, 1.33 and 1.38 times the time without (103,
// 26 and 0.3 MB, Zen 4) with lanes chosen afterwards, 1.05, 1.18 and 1.29 this way.
template <class A>
BN_INLINE typename Lanes<A>::Native load_kept_vector(const float* p, unsigned bits, int k) {
  const int at = k * Lanes<A>::kWidth;
  if constexpr (sizeof(A) == sizeof(double)) {
    return widen_load_kept(p + at, bits >> at);
  } else {
    return load_kept(p + at, bits >> at);
  }
}
#endif
template <class A, class T>
BN_INLINE typename Lanes<A>::Native load_kept_vector_of_first(const T* p, unsigned bits, int k, std::int64_t n) {
  return keep_vector<A>(load_vector_of_first<A>(p, k, n, T(0)), bits, k);
}
template <class A, class T>
BN_INLINE Lanes<A> load_kept(const T* p, unsigned bits, std::int64_t n) {
  Lanes<A> r;
  BN_UNROLL for (int k = 0; k < Lanes<A>::kVectors; ++k) {
    r.v[k] = n < kLanes ? load_kept_vector_of_first<A>(p, bits, k, n) : load_kept_vector<A>(p, bits, k);
  }
  return r;
}

// What of a Tail or of GradInputs is known to be there or not costs the walks no registers.
enum class Part { absent, present };

// A Tail with a ReLU that moves along with x.
template <class T, Part kResidual, Part kBits, Bits kPlaces>
struct MovingTail {
  static constexpr Part kHasBits = kBits;
  static constexpr Bits kWhere = kPlaces;

  const T* residual;
  std::uint8_t* mask;
  std::int64_t bit;

  MovingTail(const Tail<T>& tail)
      : residual(kResidual == Part::absent ? nullptr : tail.residual + tail.at),
        mask(tail.bits),
        bit(tail.first_bit + tail.at) {}
  static constexpr bool has_residual() { return kResidual == Part::present; }
  static constexpr bool has_bits() { return kBits == Part::present; }
};
template <class T, Part kResidual, Part kBits, Bits kPlaces>
BN_INLINE MovingTail<T, kResidual, kBits, kPlaces> operator+(MovingTail<T, kResidual, kBits, kPlaces> tail,
                                                             std::int64_t n) {
  if constexpr (kResidual == Part::present) tail.residual += n;
  tail.bit += n;
  return tail;
}
template <Fetch kWhere, class T, Part kResidual, Part kBits, Bits kPlaces>
BN_INLINE void fetch_lanes(const MovingTail<T, kResidual, kBits, kPlaces>& tail) {
  if constexpr (kResidual == Part::present) fetch_lanes<kWhere>(tail.residual);
}

// f(tail), as that of the parts there are.
template <Bits kPlaces, class T, class F>
BN_INLINE void with_parts(const Tail<T>& tail, const F& f) {
  if (tail.residual == nullptr) {
    if (tail.bits == nullptr) return f(MovingTail<T, Part::absent, Part::absent, kPlaces>(tail));
    return f(MovingTail<T, Part::absent, Part::present, kPlaces>(tail));
  }
  if (tail.bits == nullptr) return f(MovingTail<T, Part::present, Part::absent, kPlaces>(tail));
  return f(MovingTail<T, Part::present, Part::present, kPlaces>(tail));
}

// GradInputs with bits that move along.
template <class T, Part kX, Part kDresidual>
struct MovingInputs {
  const T *dy, *x;
  const std::uint8_t* mask;
  std::int64_t bit;
  T* dresidual;
  bool streams;

  MovingInputs(const GradInputs<T>& in)
      : dy(in.dy + in.at),
        x(kX == Part::absent ? nullptr : in.x + in.at),
        mask(in.bits),
        bit(in.first_bit + in.at),
        dresidual(in.dresidual == nullptr ? nullptr : in.dresidual + in.at),
        streams(in.streams) {}
  static constexpr bool has_x() { return kX == Part::present; }
  [[nodiscard]] BN_INLINE bool has_dresidual() const { return kDresidual == Part::present && dresidual != nullptr; }
  [[nodiscard]] BN_INLINE unsigned bits() const { return bits_at(mask, bit); }
};
template <class T, Part kX, Part kDresidual>
BN_INLINE MovingInputs<T, kX, kDresidual> operator+(MovingInputs<T, kX, kDresidual> in, std::int64_t n) {
  in.dy += n;
  if (in.has_x()) in.x += n;
  in.bit += n;
  if (in.has_dresidual()) in.dresidual += n;
  return in;
}
template <Fetch kWhere, class T, Part kX, Part kDresidual>
BN_INLINE void fetch_lanes(const MovingInputs<T, kX, kDresidual>& in) {
  fetch_lanes<kWhere>(in.dy);
  if (in.has_x()) fetch_lanes<kWhere>(in.x);
}
template <class T>
using SummedInputs = MovingInputs<T, Part::present, Part::absent>;

// f(inputs), as those of the parts there are.
template <class T, class F>
BN_INLINE void with_parts(const GradInputs<T>& in, const F& f) {
  if (in.x == nullptr) return f(MovingInputs<T, Part::absent, Part::present>(in));
  if (in.dresidual == nullptr) return f(MovingInputs<T, Part::present, Part::absent>(in));
  f(MovingInputs<T, Part::present, Part::present>(in));
}

}  // namespace
}  // namespace batchnorm::kernels
